"""Metrics of an encoder's predictions, series by series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from selfray.evals.bootstrap import (
    Estimate,
    Interval,
    PatientResamples,
    PatientsLeftOut,
    Resampled,
    estimates,
    mean_estimate,
    seed_mean,
)
from selfray.evals.metrics import binary_resampled, calibration_resampled, real_resampled
from selfray.evaluate.held_out import HeldOut, Judged

LOWER_IS_BETTER = frozenset({"mae", "brier", "ece", "hd95", "asd"})
MEAN_METRICS = ("auroc", "auprc")
"""Metrics whose mean over a family of targets is taken."""


class Series(NamedTuple):
    """Fits that differ in their seed alone."""

    target: str
    probe: str
    trained_on: str


Measures = dict[tuple[Series, str], Estimate]
"""By series and metric."""


class Ruler:
    """Measures predictions for the same images.

    Args:
        held_out: The images.
        seed: Of the bootstrap.
    """

    def __init__(self, held_out: HeldOut, seed: int) -> None:
        self.held_out = held_out
        self.resamples = PatientResamples(held_out.patients, seed=seed)
        self.left_out = PatientsLeftOut(held_out.patients)

    def measure(self, judged: Judged) -> Measures:
        """Metrics of every series of an encoder, and their means over families of targets."""
        measured: Measures = {}
        for series, predictions in by_series(judged).items():
            measured |= self.measure_series(series, predictions)
        return measured | self._means(measured)

    def measure_series(
        self, series: Series, predictions: Sequence[np.ndarray], images: np.ndarray | None = None
    ) -> Measures:
        """Metrics of one series: means over its seeds.

        Args:
            series: Whose.
            predictions: One array [n] a seed.
            images: bool [n], to measure some of the images only.
        """
        known = self.held_out.known(series.target)
        if images is not None:
            known = np.where(images, known, np.nan)
        measured: Measures = {}
        for metrics in self.metrics(series.target):
            by_seed = [
                estimates(metrics, known, p, self.resamples, self.left_out) for p in predictions
            ]
            for metric in by_seed[0]:
                measured[series, metric] = seed_mean([of[metric] for of in by_seed])
        return measured

    def metrics(self, target: str) -> tuple[Resampled, ...]:
        """What a target is measured by."""
        if self.held_out.target(target).kind == "number":
            return (real_resampled,)
        return (binary_resampled, calibration_resampled)

    def _means(self, measured: Mapping[tuple[Series, str], Estimate]) -> Measures:
        parts: dict[tuple[Series, str], list[Estimate]] = {}
        for (series, metric), one in measured.items():
            family = self.held_out.target(series.target).family
            if family and metric in MEAN_METRICS and not math.isnan(one.point):
                parts.setdefault((series._replace(target=family), metric), []).append(one)
        return {key: mean_estimate(members) for key, members in parts.items()}


def by_series(judged: Judged) -> dict[Series, list[np.ndarray]]:
    """Predictions of each series, one array [n] a seed."""
    seeds: dict[Series, list[np.ndarray]] = {}
    for fit, predictions in judged.predictions.items():
        seeds.setdefault(Series(*fit[:3]), []).append(predictions)
    return seeds


def interval_of(estimate: Estimate) -> Interval:
    """95 %, by resampling patients; not defined where next to no patient is the evidence.

    One patient is the same wherever it is drawn, so that the interval would have next to no width,
    which is not certainty.
    """
    if math.isnan(estimate.point) or estimate.evidence < 2:
        return Interval(math.nan, math.nan, int(np.isnan(estimate.resampled).sum()))
    return estimate.interval()


def in_favour(one: Estimate, other: Estimate, metric: str) -> Estimate:
    """The paired difference, positive where `one` is better."""
    return other - one if metric in LOWER_IS_BETTER else one - other
