"""No field of a run's config is without effect: each is read by a stage, or passed on."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path

import pytest

import selfray
from selfray.config import (
    ContrastiveConfig,
    CropsConfig,
    GlobalCropConfig,
    OneCropConfig,
    PretrainConfig,
)
from selfray.data.crops import MultiCrop, OneCrop

READERS = (
    "pretrain",
    "pretrain_language",
    "run_loop",
    "preview",
    "initialise",
    "probe",
    "run_encoder",
    "run_directory",
)


def _attributes_read() -> set[str]:
    package = Path(selfray.__file__).parent
    trees = [ast.parse(path.read_text()) for path in package.glob("*.py") if path.stem in READERS]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _fields() -> list[str]:
    names = []
    fields = [f for c in (PretrainConfig, ContrastiveConfig) for f in dataclasses.fields(c)]
    for field in fields:
        group = field.default
        if not dataclasses.is_dataclass(group) or isinstance(group, type):
            names.append(field.name)
        elif not isinstance(group, GlobalCropConfig):
            names += [f"{field.name}.{inner.name}" for inner in dataclasses.fields(group)]
    return sorted({*names} - {"recipe"})  # a name for readers of config.json


@pytest.mark.parametrize("name", _fields())
def test_a_field_is_read(name: str) -> None:
    assert name.rpartition(".")[2] in _attributes_read(), f"nothing reads {name}"


def test_every_field_of_the_crops_is_an_argument_of_the_crops() -> None:
    for config, crops in ((CropsConfig, MultiCrop), (OneCropConfig, OneCrop)):
        arguments = set(inspect.signature(crops).parameters)
        assert {field.name for field in dataclasses.fields(config)} == arguments
