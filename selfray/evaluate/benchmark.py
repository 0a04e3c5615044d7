"""What every encoder is judged on: the images of each split, their targets, and who they are of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.errors import InputError
from selfray.evals.feature_rows import FeatureRows
from selfray.evals.linear_probe import ProbeData
from selfray.evals.subgroups import age_bands
from selfray.evaluate.held_out import HeldOut, Judgeable
from selfray.evaluate.targets import Target, open_targets
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

    def features_of(
        self, split: str, features: Features, images: np.ndarray | None = None
    ) -> ProbeData:
        """CLS and mean patch token of a split's images, and the targets.

        Args:
            split: Which.
            features: Of all images of the dataset.
            images: bool [N] over the dataset, to take some of the split only.
        """
        arrays = [a for a in (features.cls, features.patch_mean) if a is not None]
        rows, targets = self.rows[split], self.targets[split]
        if images is not None:
            rows, targets = rows[images[rows]], targets[images[rows]]
        return ProbeData(FeatureRows(arrays, rows), targets, self.names, self.numbers)


def open_benchmark(
    data: Path, tasks: Sequence[str], columns: Sequence[str] = (), *, required: bool = True
) -> Benchmark:
    """Open a dataset and find what can be predicted in it.

    Args:
        data: Dataset directory.
        tasks: `classification` (findings) and `metadata` (sex, age, weight, BMI), if these.
        columns: Further columns to predict.
        required: Whether there must be something to predict.

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
    targets, values = open_targets(dataset, tasks, columns)
    if required and np.isnan(values).all():
        raise InputError(
            f"{data} has no label for {' or '.join(tasks) or 'that'}, so there is nothing to judge "
            "by. Ingest it with --table, or choose other tasks."
        )
    test = rows["test"]
    held_out = HeldOut(
        image_ids=dataset.column("image_id")[test],
        patients=dataset.column("patient_id")[test].astype(str),
        targets=tuple(_judgeable(target) for target in targets),
        labels=values[test],
        groups=_groups(dataset, test),
    )
    return Benchmark(dataset, held_out, rows, {s: values[found] for s, found in rows.items()})


def _judgeable(target: Target) -> Judgeable:
    finding = target.kind == "finding"
    return Judgeable(
        target.name,
        "number" if target.kind == "number" else "binary",
        "classification" if finding else "metadata",
        FINDINGS if finding else target.column if target.kind == "category" else "",
    )


def _groups(dataset: RadiographDataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    """What subgroups are made by, where there is more than one of them."""
    known = set(dataset.table.column_names)
    groups = {name: dataset.column(name)[rows] for name in _GROUPED_BY if name in known}
    groups["age"] = age_bands(dataset.column("age_years")[rows])
    return {
        attribute: values
        for attribute, values in groups.items()
        if len({value for value in values if value is not None}) > 1
    }
