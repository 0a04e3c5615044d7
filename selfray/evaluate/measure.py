"""Metrics of an encoder's predictions, series by series."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import binomtest

from selfray.evals.bootstrap import (
    LEVEL,
    Estimate,
    Interval,
    PatientResamples,
    PatientsLeftOut,
    Resampled,
    estimates,
    mean_estimate,
    seed_mean,
)
from selfray.evals.clinical_metrics import CLINICAL_METRICS
from selfray.evals.metrics import binary_resampled, calibration_resampled, real_resampled
from selfray.evals.ranking import Rank, rank_encoders
from selfray.evals.text_metrics import VARIANTS
from selfray.evaluate.held_out import HeldOut, Judged

LOWER_IS_BETTER = frozenset({"mae", "brier", "ece", "hd95", "asd"})
# Means over patients (of the rarer class) of values between 0 and 1.
_SHARES = frozenset(
    {"auroc", "sensitivity_at_90_specificity", "sensitivity_at_80_specificity", "dice", "iou"}
)
CLINICAL = tuple(f"clinical_{metric}" for metric in CLINICAL_METRICS)
_WITHIN_0_AND_1 = frozenset({"auprc", "brier", *CLINICAL, "radgraph_rg_er", *VARIANTS})
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


def interval_of(estimate: Estimate, metric: str) -> Interval:
    """95 %, by resampling patients; not defined where next to no patient is the evidence.

    One patient is the same wherever it is drawn, so that the interval would have next to no width,
    which is not certainty. Nor is it where every resample is alike, as where no image is on the
    wrong side: metrics that are means over patients of what lies between 0 and 1 then get the exact
    interval of a share of all patients (or of none), others have none.

    Args:
        estimate: What was measured.
        metric: Its name; a difference may be exactly 0, and then its interval is.

    Reference:
        Clopper & Pearson, Biometrika 26 (1934). For a mean of values in 0..1 that are all 1, the
        bound for a share is the widest that can be needed.
    """
    resampled = estimate.resampled[~np.isnan(estimate.resampled)]
    left_out = len(estimate.resampled) - len(resampled)
    if math.isnan(estimate.point) or estimate.evidence < 2:
        return Interval(math.nan, math.nan, left_out)
    if metric.endswith("_difference"):
        return estimate.interval()
    if not (resampled == estimate.point).all():
        bounds = estimate.interval()
        if metric not in _SHARES | _WITHIN_0_AND_1:
            return bounds
        # What seeds add to the spread of the resamples knows no ends.
        return replace(bounds, low=max(0.0, bounds.low), high=min(1.0, bounds.high))
    if metric not in _SHARES or estimate.point not in (0, 1):
        return Interval(math.nan, math.nan, left_out)
    patients = int(estimate.evidence)
    share = binomtest(patients if estimate.point else 0, patients).proportion_ci(LEVEL)
    return Interval(float(share.low), float(share.high), left_out)


def in_favour(one: Estimate, other: Estimate, metric: str) -> Estimate:
    """The paired difference, positive where `one` is better."""
    return other - one if metric in LOWER_IS_BETTER else one - other


def mark_best(
    lines: Sequence[dict[str, Any]], found: Sequence[Estimate], metric: str
) -> list[Rank]:
    """Mark the best of several encoders, and those that may be it too.

    Args:
        lines: Of one series and metric, one an encoder; get `best` or `like_best`.
        found: What the lines are of.
        metric: Its name.

    Returns:
        The encoders' ranks; none where there is nobody to compare with, or next to no patient.
    """
    if len(lines) < 2 or min(one.evidence for one in found) < 2:
        return []
    zero = found[0] - found[0]
    signed = [zero - one for one in found] if metric in LOWER_IS_BETTER else found
    best = max(range(len(signed)), key=lambda k: signed[k].point)
    ranks = rank_encoders(signed)
    for k, (line, rank) in enumerate(zip(lines, ranks, strict=True)):
        line.update({"best": True} if k == best else {"like_best": rank.may_be_best})
    return ranks
