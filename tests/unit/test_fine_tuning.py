"""Fine-tuning: what moves, how fast, and what must stay."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from trained_probe_data import (
    PlantedImages,
    assert_a_function_of_the_seed,
    assert_unchanged,
    chance,
    micro_encoder,
    other_encoder,
    weights_of,
)

from selfray.errors import InputError
from selfray.evals import fine_tuning as module
from selfray.evals.fine_tuning import FineTuned, default_steps, fine_tune, parameter_groups
from selfray.evals.linear_probe import ProbeData, fit_probes
from selfray.evals.metrics import auroc_by_column, r2_by_column
from selfray.evals.stepwise import known_losses


def zero_head(model: FineTuned, *_: object) -> None:
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)


def test_learning_rates_fall_from_the_head_to_the_patches_as_beit_has_it():
    model = FineTuned(micro_encoder().vit, 3, None)
    factors = {
        id(parameter): (group["rate"], group["weight_decay"])
        for group in parameter_groups(model)
        for parameter in group["params"]
    }
    assert len(factors) == len(list(model.parameters()))
    depth = 2
    scales = [0.65 ** (depth + 1 - i) for i in range(depth + 2)]  # `LayerDecayValueAssigner`'s
    for name, parameter in model.named_parameters():
        short = name.removeprefix("encoder.")
        if short.startswith("blocks."):
            layer = int(short.split(".")[1]) + 1
        else:
            layer = depth + 1 if short.startswith(("norm", "head")) else 0
        positional = short in ("cls_token", "pos_embed", "register_tokens", "mask_token")
        decay = 0.0 if parameter.ndim == 1 or positional else 0.05
        assert factors[id(parameter)] == (pytest.approx(scales[layer]), decay), name


def test_only_the_last_blocks_the_norm_and_the_head_are_trained():
    model = FineTuned(micro_encoder().vit, 2, 1)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    prefixes = ("encoder.blocks.1.", "encoder.norm.", "head.")
    assert trained == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}
    groups = parameter_groups(model)
    assert sum(len(group["params"]) for group in groups) == len(trained)


def test_a_target_without_labels_gives_no_gradient():
    model = FineTuned(micro_encoder().vit, 2, None)
    images = torch.randn(4, 1, 28, 28)
    nothing = torch.full((4, 2), torch.nan)
    known_losses(model(images), nothing, torch.tensor([False, True])).mean().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all((gradient == 0).all() for gradient in gradients)
    model.zero_grad()
    half = torch.tensor([[1.0, torch.nan]] * 4)
    known_losses(model(images), half, torch.tensor([False, True])).mean().backward()
    assert model.head.weight.grad is not None
    assert (model.head.weight.grad[0] != 0).any() and (model.head.weight.grad[1] == 0).all()


@pytest.mark.parametrize("last_blocks", [None, 1])
def test_finds_what_is_there_and_nothing_in_noise(last_blocks, monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 2e-2)  # 40 steps of a tiny network, not 10,000
    monkeypatch.setattr(module, "CHECKS", 3)
    monkeypatch.setattr(module, "_begin_as_linear_probe", zero_head)  # the probe finds it
    images, encoder = PlantedImages(), micro_encoder()
    before = weights_of(encoder)
    found = fine_tune(encoder, images, images.splits, last_blocks=last_blocks, steps=40, seed=0)
    assert_unchanged(encoder, before)
    known = images.known
    auroc = auroc_by_column(known[:, :2], found.predictions[:, :2])
    assert auroc[0] == 1
    assert abs(auroc[1] - 0.5) < 4 * chance(known[:, 1])
    assert r2_by_column(known[:, 2:], found.predictions[:, 2:])[0] > 0.8


def test_the_head_begins_as_the_linear_probe(monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 0.0)
    images, encoder = PlantedImages(40, 30), micro_encoder()
    found = fine_tune(encoder, images, images.splits, last_blocks=None, steps=1, seed=0)
    cls, patches = encoder.features(images.pixels)
    features = torch.cat([cls, patches.mean(dim=(2, 3))], dim=1)
    train, validate = (
        ProbeData(features[split.rows], split.targets, ("a", "b", "c"), frozenset("c"))
        for split in (images.splits.train, images.splits.validate)
    )
    expected = fit_probes(train, validate).predict(features[images.splits.test_rows])
    for k, name in enumerate("abc"):
        np.testing.assert_allclose(found.predictions[:, k], expected[name], rtol=1e-3, atol=1e-4)
    assert found.settings["chosen_step"] == 0


def test_numbers_are_a_function_of_the_seed(monkeypatch):
    # From a probe that finds it already, no step would be better.
    monkeypatch.setattr(module, "_begin_as_linear_probe", zero_head)
    images, encoder = PlantedImages(20, 20), micro_encoder()
    assert_a_function_of_the_seed(
        lambda seed: fine_tune(encoder, images, images.splits, last_blocks=None, steps=4, seed=seed)
    )


def test_the_weights_of_the_best_step_on_validate_are_kept(monkeypatch):
    monkeypatch.setattr(module, "LEARNING_RATE", 2e-2)
    monkeypatch.setattr(module, "CHECKS", 4)
    images = PlantedImages(20, 20)
    splits = dataclasses.replace(images.splits, test_rows=images.splits.validate.rows)
    seen, told = [], iter([0.1, 0.2, 0.8, 0.5, np.nan])

    def score(known, outputs, real):
        seen.append(outputs)
        return np.full(3, next(told))

    monkeypatch.setattr(module, "validation_scores", score)
    found = fine_tune(micro_encoder(), images, splits, last_blocks=1, steps=8, seed=0)
    assert found.settings["chosen_step"] == 4
    expected = 1 / (1 + np.exp(-seen[2][:, :2].astype(float)))
    np.testing.assert_allclose(found.predictions[:, :2], expected, atol=1e-6)
    assert np.abs(seen[2] - seen[4]).max() > 1e-3


def test_what_is_no_vision_transformer_is_refused():
    images = PlantedImages(8, 8)
    with pytest.raises(InputError, match=r"other is no vision transformer.*sgd or attentive"):
        fine_tune(other_encoder(), images, images.splits, last_blocks=None, steps=1, seed=0)
    with pytest.raises(InputError, match=r"fine-tune-last-3: micro has 2 blocks"):
        fine_tune(micro_encoder(), images, images.splits, last_blocks=3, steps=1, seed=0)


def test_steps_are_twenty_passes_or_five_hundred():
    assert default_steps(500) == 500
    assert default_steps(32_000) == 20_000
