"""What is predicted from features: findings, and records of patients and of machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from selfray.data.dataset import RadiographDataset
from selfray.data.metadata_table import MAX_CATEGORIES
from selfray.errors import InputError, nearest

Kind = Literal["finding", "binary", "number", "category"]

METADATA = ("sex", "age_years", "weight_kg", "bmi")
"""The records of the task `metadata`."""

# Pixels, texts, and what says who or which image it is.
_NO_TARGETS = {
    "image", "image_id", "patient_id", "study_id", "split", "mask", "finding_mask", "report",
    "source_file",
}  # fmt: skip
_SEXES = {"F": 1.0, "M": 0.0}


@dataclass(frozen=True)
class Target:
    """One thing that a probe predicts.

    Attributes:
        name: For results: the column's name, of a category `view=PA`.
        kind: `finding` and `binary` are 1/0, `number` is real-valued, `category` is 1 where the
            column has this value and 0 where it has another.
        column: Of the dataset.
    """

    name: str
    kind: Kind
    column: str


def open_targets(
    dataset: RadiographDataset, tasks: Sequence[str], columns: Sequence[str] = ()
) -> tuple[tuple[Target, ...], np.ndarray]:
    """Collect what is to be predicted.

    A category of three or more values becomes a target for each, one against the rest; of two
    values the first in the alphabet alone, since the other is its mirror image. Of the task
    `metadata`, records that no image has are left out; findings never are.

    Args:
        dataset: Opened.
        tasks: `classification` for the findings, `metadata` for sex, age, weight and BMI.
        columns: More columns by name, e.g. `site`, `scanner`, `view` or one of the dataset's own
            records: numbers, or text of at most `MAX_CATEGORIES` values.

    Returns:
        K targets, and their values: float64 [N, K], NaN where it is not known; sex is 1 for F.

    Raises:
        InputError: A column is missing, constant, of too many values, or no target.
    """
    targets: list[Target] = []
    values: list[np.ndarray] = []
    names = list(dataset.findings) if "classification" in tasks else []
    if "metadata" in tasks:
        names += [name for name in METADATA if name in dataset.table.column_names]
    for name in names:
        column = _numbers(dataset, name)
        if name in dataset.findings or not np.isnan(column).all():
            targets.append(Target(name, _kind(dataset, name), name))
            values.append(column)
    taken = {target.column for target in targets}
    for name in dict.fromkeys(columns):
        if name in taken:
            continue
        _require_target(dataset, name)
        for target, column in _targets_of(dataset, name):
            targets.append(target)
            values.append(column)
    return tuple(targets), np.stack(values, axis=1) if values else np.empty((len(dataset), 0))


def _kind(dataset: RadiographDataset, name: str) -> Kind:
    if name in dataset.findings:
        return "finding"
    return "binary" if name == "sex" else "number"


def _numbers(dataset: RadiographDataset, name: str) -> np.ndarray:
    """A column of numbers or of sexes, float64 [N]."""
    column = dataset.column(name)
    if name == "sex":
        return np.array([_SEXES.get(value, np.nan) for value in column])
    return column


def _targets_of(dataset: RadiographDataset, name: str) -> list[tuple[Target, np.ndarray]]:
    column = _numbers(dataset, name)
    if column.dtype != object:
        _require_varying(dataset, name, len(np.unique(column[~np.isnan(column)])))
        return [(Target(name, _kind(dataset, name), name), column)]
    known = np.array([value is not None for value in column])
    categories = sorted(set(column[known]))
    _require_varying(dataset, name, len(categories))
    if len(categories) > MAX_CATEGORIES:
        raise InputError(
            f"{dataset.directory}: column {name!r} has {len(categories)} different texts, at most "
            f"{MAX_CATEGORIES} can be targets. Join values, or choose another column."
        )
    return [
        (
            Target(f"{name}={category}", "category", name),
            np.where(known, (column == category).astype(np.float64), np.nan),
        )
        for category in (categories if len(categories) > 2 else categories[:1])
    ]


def _require_target(dataset: RadiographDataset, name: str) -> None:
    allowed = [column for column in dataset.table.column_names if column not in _NO_TARGETS]
    if name in _NO_TARGETS:
        raise InputError(
            f"{dataset.directory}: column {name!r} is no target. Allowed: {', '.join(allowed)}."
        )
    if name not in allowed:
        raise InputError(f"{dataset.directory} has no column {name!r}. {nearest(name, allowed)}")


def _require_varying(dataset: RadiographDataset, name: str, different: int) -> None:
    if different < 2:
        found = "one value only" if different else "no value at all"
        raise InputError(
            f"{dataset.directory}: column {name!r} has {found}, so there is nothing to predict. "
            "Choose another column."
        )
