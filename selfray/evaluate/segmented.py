"""From scores of label maps, image by image, to result lines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import combinations, permutations

import numpy as np
import pyarrow as pa

from selfray.evals.bootstrap import (
    Estimate,
    PatientResamples,
    PatientsLeftOut,
    PatientWeights,
    mean_estimate,
    seed_mean,
)
from selfray.evals.paired_tests import PatientSwaps, PermutationTest, mean_test
from selfray.evaluate.measure import in_favour, interval_of, mark_best
from selfray.evaluate.score import Line, add_holm

METRICS = ("dice", "iou", "hd95", "asd")
_DISTANCES = ("hd95", "asd")
MEAN = "macro"
"""Name of the mean over the labels."""

_Key = tuple[str, str, str]  # decoder, label, metric


def score_segmentation(
    tables: Mapping[str, pa.Table], *, seed: int, baseline: str | None = None
) -> list[Line]:
    """Means over the test images, with intervals by patient, and paired differences.

    An image in which a metric is not defined (the distance to an empty mask) is left out of it.

    Args:
        tables: By encoder, of `judge_segmentation`; of the same images.
        seed: Of the bootstrap and the permutations.
        baseline: As for `score`.
    """
    if not tables:
        return []
    scorer = _Scorer(next(iter(tables.values())), seed)
    values = {encoder: scorer.values(table) for encoder, table in tables.items()}
    measured = {encoder: scorer.measure(of) for encoder, of in values.items()}
    units = {encoder: _unit(table) for encoder, table in tables.items()}
    lines = []
    for encoder, found in measured.items():
        for key, estimate in found.items():
            line = scorer.line(encoder, key, key[2], estimate, units[encoder], values[encoder])
            lines.append(
                line | ({"probe_seeds": n} if (n := scorer.seeds(values[encoder])) > 1 else {})
            )
    _rank(lines, measured)
    p_values = {
        frozenset(pair): scorer.p_values(values[pair[0]], values[pair[1]])
        for pair in combinations(tables, 2)
        if baseline is None or baseline in pair
    }
    for one, other in permutations(tables, 2):
        if baseline in (None, other):
            tested = p_values[frozenset((one, other))]
            lines += scorer.differences(one, other, measured, values, units, tested)
    return lines


def _unit(table: pa.Table) -> str:
    """Of distances: mm where some images' spacing is known, which alone are measured then."""
    return "mm" if "mm" in table["unit"].unique().to_pylist() else "px"


def _rank(lines: list[Line], measured: Mapping[str, Mapping[_Key, Estimate]]) -> None:
    groups: dict[_Key, list[Line]] = {}
    for line in lines:
        if line["value"] is not None:
            groups.setdefault((line["probe"], line["target"], line["metric"]), []).append(line)
    for key, members in groups.items():
        mark_best(members, [measured[line["encoder"]][key] for line in members], key[2])


_Values = dict[tuple[str, str, str, int], np.ndarray]  # decoder, label, metric, seed -> [n]


class _Scorer:
    def __init__(self, table: pa.Table, seed: int) -> None:
        owners = dict(
            zip(table["image_id"].to_pylist(), table["patient_id"].to_pylist(), strict=True)
        )
        self._place = {image: k for k, image in enumerate(owners)}
        self._patients = np.array(list(owners.values()), dtype=str)
        self._seed = seed
        self._resamples = PatientResamples(self._patients, seed=seed)
        self._left_out = PatientsLeftOut(self._patients)
        self._swaps = PatientSwaps(self._patients, seed=seed)

    def values(self, table: pa.Table) -> _Values:
        """Scores of the images, NaN where not defined, or measured in another unit than others."""
        found: _Values = {}
        unit = _unit(table)
        rows = table.select(["image_id", "decoder", "label", "seed", "unit", *METRICS]).to_pylist()
        for row in rows:
            for metric in METRICS:
                key = (row["decoder"], row["label"], metric, row["seed"])
                array = found.setdefault(key, np.full(len(self._patients), np.nan))
                of_unit = metric not in _DISTANCES or row["unit"] == unit
                if row[metric] is not None and of_unit:
                    array[self._place[row["image_id"]]] = row[metric]
        return found

    def seeds(self, values: _Values) -> int:
        """Number of seeds."""
        return len({seed for *_, seed in values})

    def measure(self, values: _Values) -> dict[_Key, Estimate]:
        """Means over images and seeds; and over labels."""
        by_seed: dict[_Key, list[Estimate]] = {}
        for (decoder, label, metric, _), scores in values.items():
            by_seed.setdefault((decoder, label, metric), []).append(self._estimate(scores))
        measured = {key: seed_mean(seeds) for key, seeds in by_seed.items()}
        labels: dict[_Key, list[Estimate]] = {}
        for (decoder, _, metric), estimate in measured.items():
            if not math.isnan(estimate.point):
                labels.setdefault((decoder, MEAN, metric), []).append(estimate)
        return measured | {key: mean_estimate(members) for key, members in labels.items()}

    def _estimate(self, scores: np.ndarray) -> Estimate:
        rows = np.flatnonzero(~np.isnan(scores))
        if not len(rows):
            return Estimate(math.nan, np.full(1, np.nan), np.full(1, np.nan), 0)

        def means(weights: PatientWeights) -> np.ndarray:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.concatenate(
                    [w @ scores[rows] / w.sum(axis=1) for w in weights.weights(rows)]
                )

        evidence = len(set(self._patients[rows]))
        point = float(scores[rows].mean())
        return Estimate(point, means(self._resamples), means(self._left_out), evidence)

    def line(
        self, encoder: str, key: _Key, named: str, estimate: Estimate, unit: str, values: _Values
    ) -> Line:
        """The fields of a line; `n` counts images for which the metric is defined."""
        decoder, label, metric = key
        known = np.zeros(len(self._patients), bool)
        for (of_decoder, of_label, of_metric, _), scores in values.items():
            if (of_decoder, of_metric) == (decoder, metric) and label in (of_label, MEAN):
                known |= ~np.isnan(scores)
        bounds = interval_of(estimate, named)
        line: Line = {
            "encoder": encoder,
            "task": "segmentation",
            "target": label,
            "metric": named,
            "value": _or_none(estimate.point),
            "ci_low": _or_none(bounds.low),
            "ci_high": _or_none(bounds.high),
            "n": int(known.sum()),
            "n_patients": len(set(self._patients[known])),
            "split": "test",
            "seed": self._seed,
            "features": "patch_tokens",
            "probe": decoder,
        }
        if metric in _DISTANCES:
            line["unit"] = unit
        if line["value"] is None:
            line["reason"] = "no test image has both masks"
        return line

    def differences(
        self,
        one: str,
        other: str,
        measured: Mapping[str, Mapping[_Key, Estimate]],
        values: Mapping[str, _Values],
        units: Mapping[str, str],
        p_values: Mapping[_Key, float],
    ) -> Iterator[Line]:
        """Paired by patient, in favour of `one`; of Dice, with p-values by permutation."""
        found = []
        for key, mine in measured[one].items():
            its = measured[other].get(key)
            if key not in p_values or its is None or math.isnan(mine.point - its.point):
                continue
            difference = in_favour(mine, its, key[2])
            named = f"{key[2]}_difference"
            line = self.line(one, key, named, difference, units[one], values[one])
            line["reference"] = other
            if self.seeds(values[one]) == self.seeds(values[other]) == 1:
                line |= {"p_value": p_values[key], "test": "permutation"}
            found.append(line)
        for decoder in dict.fromkeys(line["probe"] for line in found):
            add_holm(
                [
                    line
                    for line in found
                    if line["probe"] == decoder and line["target"] != MEAN and "p_value" in line
                ]
            )
        yield from found

    def p_values(self, one: _Values, other: _Values) -> dict[_Key, float]:
        """Two-sided, of each label and of their mean: the order of the encoders is no matter."""
        tests: dict[_Key, list[PermutationTest]] = {}
        for (decoder, label, metric, seed), mine in one.items():
            its = other.get((decoder, label, metric, seed))
            if metric == "dice" and seed == 0 and its is not None:
                test = self._test(mine - its)
                tests[decoder, label, metric] = [test]
                tests.setdefault((decoder, MEAN, metric), []).append(test)
        return {key: mean_test(of).p for key, of in tests.items()}

    def _test(self, differences: np.ndarray) -> PermutationTest:
        """Whether the mean difference could be 0: encoders swapped patient by patient."""
        rows = np.flatnonzero(~np.isnan(differences))
        if not len(rows):
            return PermutationTest(math.nan, np.empty(0))
        d = differences[rows]
        swapped = np.concatenate([(1 - 2 * w) @ d for w in self._swaps.weights(rows)]) / len(d)
        return PermutationTest(float(d.mean()), swapped)


def _or_none(number: float) -> float | None:
    return None if math.isnan(number) else float(number)
