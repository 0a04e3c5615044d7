"""What every encoder is judged on: the images of each split, their targets, and who they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.errors import InputError
from selfray.evals.linear_probe import REAL_TARGETS, ProbeData, target_values
from selfray.evaluate.held_out import HeldOut, Judgeable
from selfray.feature_directory import Features

FINDINGS = "macro"
"""Name of the mean over the findings."""

_GROUPED_BY = ("sex", "view", "site", "scanner")


@dataclass(frozen=True)
class Benchmark:
    """A dataset with its targets.

    Attributes:
        data: The dataset.
        held_out: The images of the test split.
        rows: By split, positions of its images in the dataset.
        targets: By split, float64 [n, K], NaN where it is not known.
    """

    data: RadiographDataset
    held_out: HeldOut
    rows: dict[str, np.ndarray]
    targets: dict[str, np.ndarray]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the K targets."""
        return tuple(target.name for target in self.held_out.targets)

    @property
    def numbers(self) -> frozenset[str]:
        """Names of the targets that are numbers; all others are 1/0."""
        return frozenset(t.name for t in self.held_out.targets if t.kind == "number")

    def features_of(self, split: str, features: Features) -> ProbeData:
        """CLS and mean patch token of a split's images, and the targets."""
        arrays = [a for a in (features.cls, features.patch_mean) if a is not None]
        rows = self.rows[split]
        taken = np.concatenate([array[rows] for array in arrays], axis=1)
        return ProbeData(taken, self.targets[split], self.names, self.numbers)


def open_benchmark(data: Path, tasks: Sequence[str], columns: Sequence[str] = ()) -> Benchmark:
    """Open a dataset and find what can be predicted in it.

    Args:
        data: Dataset directory.
        tasks: `classification` (findings) and `metadata` (sex, age, weight, BMI), if these.
        columns: Further columns to predict.

    Raises:
        InputError: A split without images, no label at all, an unknown column.
    """
    dataset = RadiographDataset(data)
    rows = {split: dataset.rows(split) for split in SPLITS}
    for split, found in rows.items():
        if not len(found):
            raise InputError(
                f"{data} has no images in its {split} split; probes are fitted on train, chosen "
                "on validate and scored on test. Ingest it with all three."
            )
    targets, values = _open_targets(dataset, tasks)
    test = rows["test"]
    held_out = HeldOut(
        image_ids=dataset.column("image_id")[test],
        patients=dataset.column("patient_id")[test].astype(str),
        targets=tuple(targets),
        labels=values[test],
        groups=_groups(dataset, test),
    )
    return Benchmark(dataset, held_out, rows, {s: values[found] for s, found in rows.items()})


def _open_targets(
    dataset: RadiographDataset, tasks: Sequence[str]
) -> tuple[list[Judgeable], np.ndarray]:
    metadata = ("sex", *REAL_TARGETS)
    names = list(dataset.findings) if "classification" in tasks else []
    names += metadata if "metadata" in tasks else []
    values = target_values(dataset.column, names) if names else np.empty((len(dataset), 0))
    labelled = [bool((~np.isnan(column)).any()) for column in values.T]
    if not any(labelled):
        raise InputError(
            f"{dataset.directory} has no label for {' or '.join(tasks)}, so there is nothing to "
            "judge by. Ingest it with --table, or choose other tasks."
        )
    kept = [k for k, name in enumerate(names) if labelled[k] or name in dataset.findings]
    judgeable = [
        Judgeable(
            n,
            "number" if n in REAL_TARGETS else "binary",
            "metadata" if n in metadata else "classification",
            "" if n in metadata else FINDINGS,
        )
        for n in (names[k] for k in kept)
    ]
    return judgeable, values[:, kept]


def _groups(dataset: RadiographDataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What subgroups are made by, where there is more than one of them."""
    known = set(dataset.table.column_names)
    groups = {name: dataset.column(name)[rows] for name in _GROUPED_BY if name in known}
    return {
        attribute: values
        for attribute, values in groups.items()
        if len({value for value in values if value is not None}) > 1
    }
