"""From predictions and labels to result lines: points, intervals, differences, p-values, ranks.

Nothing here runs an encoder or fits a probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from selfray.evals.metrics import BINARY_METRICS, REAL_METRICS, binary_metrics, real_metrics
from selfray.evals.statistics import (
    PatientResamples,
    binary_resampled,
    interval,
    real_resampled,
    resample,
)
from selfray.evaluate.held_out import ALL_TRAINING, HeldOut, Judged

COMPARED = ("auroc", "auprc", "r2", "mae")
"""Metrics that get paired differences."""
LOWER_IS_BETTER = frozenset({"mae", "brier", "ece"})
MEAN_METRICS = ("auroc", "auprc")
"""Metrics whose mean over a family of targets is taken."""

Line = dict[str, Any]


class _Series(NamedTuple):
    """Fits that differ in their seed alone."""

    target: str
    probe: str
    trained_on: str


@dataclass(frozen=True)
class _Measured:
    """One metric of one series: the point, and its values over the resamples [R]."""

    value: float
    distribution: np.ndarray
    seeds: int


_Measures = dict[tuple[_Series, str], _Measured]


def score(
    judged: Sequence[Judged], held_out: HeldOut, *, seed: int, baseline: str | None = None
) -> list[Line]:
    """Every number of an evaluation.

    Args:
        judged: Encoders with their predictions for the same images.
        held_out: Those images.
        seed: Of the bootstrap.
        baseline: Compare each encoder with this one only; None: with each other one.
    """
    scorer = _Scorer(held_out, seed)
    measured = {one.encoder: scorer.measure(one) for one in judged}
    lines = [line for one in judged for line in scorer.lines(one, measured[one.encoder])]
    for one in judged:
        for other in judged:
            if other is not one and baseline in (None, other.encoder):
                lines.extend(scorer.differences(one, other, measured))
    return lines


class _Scorer:
    def __init__(self, held_out: HeldOut, seed: int) -> None:
        self._held_out, self._seed = held_out, seed
        self._resamples = PatientResamples(held_out.patients, seed=seed)
        self._families = dict.fromkeys(t.family for t in held_out.targets if t.family)

    def measure(self, judged: Judged) -> _Measures:
        """Metrics of every series, and their means over families of targets."""
        seeds: dict[_Series, list[np.ndarray]] = {}
        for fit, predictions in judged.predictions.items():
            seeds.setdefault(_Series(*fit[:3]), []).append(predictions)
        measured: _Measures = {}
        for series, predictions in seeds.items():
            measured |= self._measure_series(series, predictions)
        return measured | self._means(measured)

    def _measure_series(self, series: _Series, predictions: list[np.ndarray]) -> _Measures:
        """The mean over the seeds; a resample of patients meets one of the seeds, in turn."""
        known = self._held_out.known(series.target)
        number = self._held_out.target(series.target).kind == "number"
        names = REAL_METRICS if number else BINARY_METRICS
        points = [(real_metrics if number else binary_metrics)(known, p) for p in predictions]
        resampled = real_resampled if number else binary_resampled
        spread = [resample(resampled, known, p, self._resamples) for p in predictions]
        turns = np.arange(len(self._resamples.multiplicity)) % len(predictions)
        return {
            (series, metric): _Measured(
                float(np.mean([point[metric] for point in points])),
                np.choose(turns, [distribution[metric] for distribution in spread]),
                len(predictions),
            )
            for metric in names
        }

    def _means(self, measured: _Measures) -> _Measures:
        """The mean over the targets of each family that are defined.

        A resample that lacks a class of a rare finding takes that finding's point, so that the mean
        does not jump because a finding that is easy or hard dropped out, and stays within 0 to 1.
        """
        parts: dict[tuple[_Series, str], list[_Measured]] = {}
        for (series, metric), one in measured.items():
            family = self._held_out.target(series.target).family
            if family and metric in MEAN_METRICS and not math.isnan(one.value):
                parts.setdefault((series._replace(target=family), metric), []).append(one)
        means: _Measures = {}
        for key, members in parts.items():
            points = np.array([one.value for one in members])
            values = np.stack([one.distribution for one in members], axis=1)  # [R, F]
            defined = ~np.isnan(values)
            mean = np.where(defined, values, points).mean(axis=1)
            mean = np.where(defined.any(axis=1), mean, np.nan)
            means[key] = _Measured(float(points.mean()), mean, members[0].seeds)
        return means

    def lines(self, judged: Judged, measured: _Measures) -> Iterator[Line]:
        """One line a metric of a series."""
        for (series, metric), one in measured.items():
            line = self._line(judged, series, metric)
            line |= self._numbers(series.target, one.value, one.distribution)
            if one.seeds > 1:
                line["probe_seeds"] = one.seeds
            if math.isnan(one.value):
                number = series.target in self._names("number")
                lacking = "a second value" if number else "both classes"
                line["reason"] = f"the test split lacks {lacking}"
            yield line
        for fit, reason in judged.undefined.items():
            metric = "r2" if fit.target in self._names("number") else "auroc"
            yield self._line(judged, _Series(*fit[:3]), metric) | {"reason": reason}

    def differences(
        self, one: Judged, other: Judged, measured: dict[str, _Measures]
    ) -> Iterator[Line]:
        """One line a metric of a series that both have, `one` minus `other`, paired by patient.

        A positive difference is in favour of `one`, also where lower numbers are better.
        """
        ours, theirs = measured[one.encoder], measured[other.encoder]
        for (series, metric), mine in ours.items():
            its = theirs.get((series, metric))
            comparable = metric in COMPARED and series.trained_on == ALL_TRAINING
            if its is None or not comparable or math.isnan(mine.value) or math.isnan(its.value):
                continue
            sign = -1 if metric in LOWER_IS_BETTER else 1
            line = self._line(one, series, f"{metric}_difference")
            value = sign * (mine.value - its.value)
            spread = sign * (mine.distribution - its.distribution)
            line |= self._numbers(series.target, value, spread)
            yield line | {"reference": other.encoder}

    def _line(self, judged: Judged, series: _Series, metric: str) -> Line:
        """The fields that every line has."""
        members = self._held_out.family(series.target) or [series.target]
        labels = np.stack([self._held_out.known(name) for name in members], axis=1)
        target = self._held_out.target(members[0])
        known = ~np.isnan(labels).all(axis=1)
        line: Line = {
            "encoder": judged.encoder,
            "task": target.task,
            "target": series.target,
            "metric": metric,
            "value": None,
            "ci_low": None,
            "ci_high": None,
            "n": int(known.sum()),
            "n_patients": len(set(self._held_out.patients[known])),
            "split": "test",
            "seed": self._seed,
            "features": judged.inputs[series.probe],
            "probe": series.probe,
        }
        if series.trained_on != ALL_TRAINING:
            line["trained_on"] = series.trained_on
        if members == [series.target] and target.kind == "binary" and known.any():
            line["n_positive"] = int(np.nansum(labels))
            line["prevalence"] = float(np.nanmean(labels))
        return line

    def _numbers(self, target: str, value: float, distribution: np.ndarray) -> Line:
        bounds = interval(distribution)
        numbers = {"value": value}
        if self._enough_patients(target):
            numbers |= {"ci_low": bounds.low, "ci_high": bounds.high}
        line: Line = {k: None if math.isnan(v) else v for k, v in numbers.items()}
        return line | {"resamples_left_out": bounds.left_out}

    def _enough_patients(self, target: str) -> bool:
        """Whether resamples of the patients say anything about the spread of a number.

        One patient is the same wherever it is drawn, so that the interval would have next to no
        width, which is not certainty. Needed are two patients of each class; of a number, two in
        all; of a mean, one target that has them.
        """
        members = self._held_out.family(target)
        if members:
            return any(self._enough_patients(member) for member in members)
        known = self._held_out.known(target)
        number = self._held_out.target(target).kind == "number"
        groups = [~np.isnan(known)] if number else [known == 0, known == 1]
        return all(len(set(self._held_out.patients[group])) > 1 for group in groups)

    def _names(self, kind: str) -> set[str]:
        return {target.name for target in self._held_out.targets if target.kind == kind}
