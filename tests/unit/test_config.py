"""A run's config: JSON in and out, every field checked by name, the published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_run import command_line, micro_config, micro_language_config

from selfray.cli import parse
from selfray.config import PretrainConfig, differences, from_json, to_json, validate
from selfray.errors import InputError
from selfray.models.vit import build_vit
from selfray.recipes import RECIPES, recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_survives_json(name: str) -> None:
    config = recipe(name)
    validate(config)
    assert from_json(to_json(config), "there") == config
    assert config.recipe == name


def test_the_command_line_gives_every_field() -> None:
    config = micro_config(
        Path("d"), init="there", seed=3, heads__batch_norm=True, guard=0.1, evaluate_every=2
    )
    _, arguments = parse(command_line(config, Path("r")))
    assert differences(arguments.config, config) == []


def test_the_published_recipe_has_the_published_numbers() -> None:
    config = recipe("base-518")
    assert (config.steps, config.batch_size) == (100_000, 2560)
    assert config.peak_learning_rate == pytest.approx(1e-3 * 2.5**0.5)
    assert (config.crops.global_size, config.crops.global_scale) == (518, (0.5, 1.0))
    assert (config.crops.local_size, config.crops.local_scale) == (196, (0.2, 0.5))
    assert (config.crops.local_count, config.crops.flip, config.crops.jitter) == (8, 0.5, 0.8)
    assert config.optimizer.weight_decay == (0.04, 0.4)
    assert (config.optimizer.layer_decay, config.optimizer.patch_embed_factor) == (0.9, 0.2)
    assert (config.optimizer.gradient_clip, config.loss.koleo_weight) == (3.0, 0.1)
    assert config.teacher.momentum == (0.992, 1.0)
    assert config.loss.teacher_temperature == (0.04, 0.07)


def test_the_published_encoder_has_as_many_parameters_as_was_published() -> None:
    config = recipe("base-518").encoder
    with torch.device("meta"):
        encoder = build_vit(
            config.arch, patch_size=config.patch_size, image_size=config.image_size,
            layerscale_init=config.layerscale_init, drop_path=config.drop_path,
        )  # fmt: skip
    count = sum(p.numel() for p in encoder.parameters())
    assert round(count / 1e6, 2) == 86.58
    # microsoft/rad-dino, model.safetensors: 346,345,912 bytes; the header is below 30 kB.
    assert 0 < 346_345_912 - 4 * count < 30_000


def test_an_unknown_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="Did you mean 'base-518'"):
        recipe("base518")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops__global_size": 200}, r"crops.global_size is 200, .* 14. Use 196 or 210"),
        ({"crops__local_size": 13}, r"crops.local_size is 13, not a multiple .* Use 14 or 28"),
        ({"encoder__image_size": 30}, r"encoder.image_size is 30.* Use 28 or 42"),
        ({"batch_size": 0}, "batch_size is 0. It must be more than 0"),
        ({"batch_size": 5, "engine__accumulate": 2}, "cannot be cut into engine.accumulate 2"),
        ({"batch_size": 1}, "koleo_weight needs at least 2 images"),
        ({"steps": -1}, "steps is -1"),
        ({"optimizer__learning_rate": float("nan")}, "learning_rate is nan. It must be finite"),
        ({"optimizer__learning_rate_end": float("inf")}, "rate_end is inf. It must be finite"),
        ({"seed": 2**63}, "seed is 9223372036854775808. It must be at most 9223372036854775807"),
        ({"heads__prototypes": 2**20 + 1}, "heads.prototypes is .* at most 1048576"),
        ({"heads__hidden": 10**400}, "heads.hidden is .* at most 1048576"),
        ({"heads__bottleneck": 2**20 + 1}, "heads.bottleneck is .* at most 1048576"),
        ({"encoder__registers": 65}, "encoder.registers is 65. It must be at most 64"),
        ({"crops__local_count": 65}, "crops.local_count is 65. It must be at most 64"),
        ({"encoder__image_size": 5000}, "encoder.image_size is 5000. It must be at most 4096"),
        ({"crops__global_size": 5000}, "crops.global_size is 5000. It must be at most 4096"),
        ({"crops__local_size": 5000}, "crops.local_size is 5000. It must be at most 4096"),
        (
            {"loss__dino_weight": 0.0, "loss__ibot_weight": 0.0, "loss__koleo_weight": 0.0},
            "dino_weight, loss.ibot_weight and loss.koleo_weight are all 0",
        ),
        ({"crops__flip": 1.5}, "crops.flip is 1.5. It must lie between 0 and 1"),
        ({"masks__ratio": (0.5, 0.1)}, "masks.ratio is .* The first must not exceed the second"),
        ({"crops__global_scale": (0.0, 1.0)}, "must begin above 0"),
        ({"loss__centering": "sinkhom"}, "Did you mean 'sinkhorn'"),
        ({"engine__precision": "float16"}, "Allowed: auto, bfloat16, float32"),
        ({"loss__student_temperature": 0.0}, "loss.student_temperature is 0.0"),
        ({"guard": 0.1}, "guard is 0.1, but evaluate_every is 0"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        validate(micro_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrastive__loss": "cilp"}, "contrastive.loss is 'cilp'. Did you mean 'clip'"),
        ({"contrastive__logit_scale": 0.0}, "contrastive.logit_scale is 0.0. It must be more than"),
        ({"contrastive__logit_scale": 101.0}, "101.0 is above contrastive.logit_scale_largest"),
        ({"contrastive__logit_bias": float("nan")}, "logit_bias is nan. It must be finite"),
        ({"batch_size": 1}, "batch_size is 1: there is no other report"),
        ({"text__width": 15}, "text.width 15 cannot be shared out over text.heads 2"),
        ({"text__vocabulary": 258}, "text.vocabulary is 258. It must be at least 259"),
        ({"text__max_tokens": 2}, "text.max_tokens is 2. It must be at least 3"),
        ({"text__sentences": -1}, "text.sentences is -1. It must be 0 or more"),
        ({"crops__blur": 1.5}, "crops.blur is 1.5. It must lie between 0 and 1"),
        ({"crops__global_size": 200}, r"crops.global_size is 200, .* 14. Use 196 or 210"),
        ({"guard": 0.1}, "guard is 0.1, but evaluate_every is 0"),
    ],
)
def test_a_value_of_a_run_with_reports_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        validate(micro_language_config(**changes))


@pytest.mark.parametrize("name", ["demo", "small", "base-518"])
def test_a_control_differs_from_its_pair_in_supervision_alone(name: str) -> None:
    paired, control = recipe(name), recipe(f"clip-{name}")
    ours, theirs = (json.loads(to_json(c)) for c in (control, paired))
    assert ours["encoder"] == theirs["encoder"]
    assert ours["engine"] == theirs["engine"]
    for field in ("steps", "batch_size", "seed", "evaluate_every", "evaluate_images"):
        assert ours[field] == theirs[field]
    differing = {key for key, value in ours["crops"].items() if theirs["crops"].get(key) != value}
    assert differing == {"flip", "blur"}
    assert ours["crops"]["blur"] == theirs["crops"]["blur_global_first"]
    changed = {k for k, v in ours["optimizer"].items() if theirs["optimizer"][k] != v}
    assert changed == ({"learning_rate"} if name == "demo" else set())


def test_a_config_written_before_there_were_reports_is_read() -> None:
    config = recipe("demo")
    values = json.loads(to_json(config))
    assert "contrastive" not in values
    assert from_json(json.dumps(dict(sorted(values.items()))), "there") == config


def _json(**changes: Any) -> str:
    return json.dumps(json.loads(to_json(PretrainConfig())) | changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "expected fields of PretrainConfig"),
        (_json(batchsize=3), "unknown field 'batchsize'. Did you mean 'batch_size'"),
        (
            _json(crops={"global-size": 3}),
            "there: crops: unknown field 'global-size'. Did you mean",
        ),
        (_json(steps=1.5), "there: steps: 1.5 is of another type"),
        (_json(steps=True), "there: steps: True is of another type"),
        (_json(crops=3), "expected fields of CropsConfig"),
        (_json(masks={"ratio": [0.1]}), r"there: masks: ratio: \[0.1\] is of another type"),
    ],
)
def test_a_config_file_that_was_changed_by_hand_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json(text, "there")


def test_differences_name_the_fields_but_not_where_the_data_lies() -> None:
    before, after = micro_config(), micro_config(steps=9, crops__flip=0.1, data=("elsewhere",))
    assert differences(before, after) == ["steps: 8 -> 9", "crops.flip: 0.5 -> 0.1"]
