"""A config of a report model: what is refused before anything is computed, and in which words."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from selfray.data.report_text import SECTIONS
from selfray.errors import InputError
from selfray.evaluate import ReportTask, evaluate
from selfray.field_options import add_report_fields, report_config
from selfray.report_config import (
    PROMPT_SECTIONS,
    RECIPES,
    ReportConfig,
    report_recipe,
    validate_report_config,
)

TEMPLATE = "USER: {image} {prompt} BOT:"
RANGES = [
    ("visual_tokens", 0, 256),
    ("word_steps", 0, 10**8),
    ("projector_layers", 1, 64),
    ("batch_size", 1, 2**16),
    ("micro_batch", 1, 2**16),
    ("image_dropout", 0, 0.9),
    ("max_target_tokens", 2, 4096),
    ("max_new_tokens", 1, 4096),
    ("beams", 1, 64),
    ("candidates", 1, 1000),
    ("checkpoint_every", 1, 10**8),
    ("seed", 0, 2**32 - 1),
    ("projector__steps", 0, 10**8),
    ("projector__learning_rate", 1e-9, 1),
    ("projector__warmup", 0, 1),
    ("language__steps", 0, 10**8),
    ("language__learning_rate", 1e-9, 1),
    ("language__warmup", 0, 1),
    ("language__weight_decay", 0, 10),
    ("language__lora_rank", 1, 4096),
    ("language__lora_alpha", 1e-3, 1e5),
    ("language__lora_dropout", 0, 0.9),
    ("decoder__width", 2, 2**14),
    ("decoder__depth", 1, 256),
    ("decoder__heads", 1, 256),
    ("decoder__vocabulary", 258, 2**20),
]


def changed(config: ReportConfig, changes: dict[str, Any]) -> ReportConfig:
    """The config with fields replaced, those of groups by `group__field`."""
    for name, value in changes.items():
        group, _, field = name.rpartition("__")
        if group:
            name, value = group, replace(getattr(config, group), **{field: value})
        config = replace(config, **{name: value})
    return config


def read(*words: str) -> ReportConfig | None:
    """What the command line makes of words."""
    parser = argparse.ArgumentParser()
    add_report_fields(parser)
    return report_config(parser.parse_args(words))


def said(changes: dict[str, Any], recipe: str = "tiny") -> str:
    with pytest.raises(InputError) as error:
        validate_report_config(changed(report_recipe(recipe), changes))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_allowed_once_a_language_model_is_named(name: str) -> None:
    validate_report_config(replace(report_recipe(name), language_model="somewhere"))


@pytest.mark.parametrize("name", ["smollm2", "vicuna-7b"])
def test_recipes_for_a_language_model_are_refused_without_one(name: str) -> None:
    assert "--report.language-model names no language model" in said({}, name)


@pytest.mark.parametrize(("name", "least", "most"), RANGES)
def test_a_number_outside_its_range_is_refused_by_its_option(
    name: str, least: float, most: float
) -> None:
    option = "--report." + name.replace("__", ".").replace("_", "-")
    whole = isinstance(most, int) and most > 1 and "decay" not in name
    past = 1 if whole else 1e-12
    for value in (-1, least - past, most + (1 if whole else 0.01), 10**12):
        assert f"{option} is {value}. It must lie between" in said({name: value})
    for value in (float("nan"), float("inf"), "many", True):
        assert f"{option} is {value!r}. It must" in said({name: value})


def test_the_ranges_of_all_numbers_are_tested() -> None:
    config = ReportConfig()
    groups = {f"{name}__": getattr(config, name) for name in ("projector", "language", "decoder")}
    numbers = {
        prefix + name
        for prefix, group in ({"": config} | groups).items()
        for name, value in vars(group).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert numbers == {name for name, _, _ in RANGES}


def test_a_number_of_the_wrong_kind_is_refused() -> None:
    assert "--report.batch-size is 2.5. It must be a number of kind int" in said(
        {"batch_size": 2.5}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"beams": 3},
            "--report.beams is 3 and --report.candidates is 10: reports are either searched for "
            "or drawn. Set one of them to 1.",
        ),
        (
            {"image_dropout": 0.0},
            "--report.candidates is 10, and --report.image-dropout is 0",
        ),
        (
            {"language__steps": 0},
            "--report.projector.steps and --report.language.steps are both 0",
        ),
        (
            {"language__trained": "none", "language_model": "x"},
            "--report.language.trained is none and --report.language.projector is false",
        ),
        ({"language__trained": "lora"}, "--report.language.trained is lora, and --report.language"),
        ({"language__trained": "lore"}, "--report.language.trained is 'lore'. Did you mean 'lora'"),
        ({"target": "finding"}, "--report.target is 'finding'. Did you mean 'findings'"),
        ({"precision": "float16"}, "--report.precision is 'float16'. Did you mean 'bfloat16'"),
        (
            {"prompt_sections": ("indication", "technic")},
            "--report.prompt-sections has 'technic'. Did you mean 'technique'",
        ),
        ({"prompt_sections": ("findings",)}, "--report.prompt-sections has 'findings'"),
        ({"word_steps": 10}, "--report.word-steps is 10. It must be 0, or 25 or more"),
        ({"language__lora_targets": ()}, "--report.language.lora-targets is ''"),
        (
            {"language__lora_targets": ("all-linear", "q_proj")},
            "--report.language.lora-targets is 'all-linear q_proj'. Give all-linear alone",
        ),
        ({"language__lora_targets": ("q_proj", " ")}, "--report.language.lora-targets is"),
        ({"decoder__heads": 5}, "--report.decoder.width is 128, no multiple of 2 * --report.dec"),
        ({"prompt_template": TEMPLATE}, "--report.prompt-template is given, and --report.language"),
        *(
            (
                {"prompt_template": text, "language_model": "x"},
                "It must have {image} once and, after it, {prompt} once.",
            )
            for text in ("{image}", "{prompt}", "{prompt}{image}", "{image}{image}{prompt}")
        ),
    ],
)
def test_what_cannot_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in said(changes)


def test_beams_and_templates_are_allowed_where_they_fit() -> None:
    for changes in (
        {"beams": 3, "candidates": 1},
        {"image_dropout": 0.0, "candidates": 1},
        {"prompt_template": TEMPLATE, "language_model": "x"},
        {"language__steps": 0, "projector__steps": 1},
    ):
        validate_report_config(changed(report_recipe("tiny"), changes))


def test_the_sections_of_a_prompt_are_those_of_a_report_before_what_is_seen() -> None:
    assert (*PROMPT_SECTIONS, "findings", "impression") == SECTIONS


def test_no_prompt_is_the_option_without_a_value_as_help_and_error_say() -> None:
    config = read("--report.prompt-sections")
    assert config is not None and config.prompt_sections == ()
    (field,) = (one for one in fields(ReportConfig) if one.name == "prompt_sections")
    assert field.metadata["help"].endswith("; no value: no prompt")
    with pytest.raises(InputError, match=r"'none'.*For no prompt, give the option without a value"):
        read("--report.prompt-sections", "none")


def test_the_command_line_and_the_function_refuse_the_same(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--report\.beams is 3 and"):
        read("--report.beams", "3")
    task = ReportTask(changed(report_recipe("tiny"), {"beams": 3}))
    with pytest.raises(InputError, match=r"--report\.beams is 3 and"):
        evaluate(("pixels:pca",), tmp_path, tmp_path / "out", tasks=["reports"], report=task)
    assert not (tmp_path / "out").exists()


def test_the_options_of_a_task_give_its_config_again() -> None:
    config = changed(
        report_recipe("smollm2"),
        {"prompt_sections": (), "language_model": "a b", "language__lora_targets": ("k", "v")},
    )
    assert read(*ReportTask(config).changed()) == config
