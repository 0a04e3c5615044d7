"""Does an encoder serve some patients worse than others? Metrics by sex, age band, view or site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfray.evals.bootstrap import (
    LEVEL,
    Estimate,
    Interval,
    PatientResamples,
    PatientsLeftOut,
    Resampled,
    estimates,
)
from selfray.evals.metrics import real_resampled

FEWEST = 20
AGE_BANDS = ((0, "0-19"), (20, "20-39"), (40, "40-59"), (60, "60-79"), (80, "80 and over"))


@dataclass(frozen=True)
class Subgroup:
    """One group of images.

    Attributes:
        group: Its name.
        n: Images whose label or value is known.
        n_patients: Patients of these.
        positives: Positive images; None where the target is real-valued.
        too_few: Fewer than 20 patients of a class (of all, where the target is real-valued): no
            number is given, `value` is NaN.
        value: The metric.
        estimate: Of `value`, for its interval and for means; None where there are too few.
    """

    group: str
    n: int
    n_patients: int
    positives: int | None
    too_few: bool
    value: float
    estimate: Estimate | None


@dataclass(frozen=True)
class Subgroups:
    """A metric by group, and how far groups lie apart.

    Attributes:
        groups: In the order of their names.
        gap: The largest value minus the smallest; NaN with fewer than two groups that have one.
        gap_interval: Of the difference between these two groups, wide enough for their having been
            picked among all: it holds 0 in 95 % of studies where no groups differ.
    """

    groups: list[Subgroup]
    gap: float
    gap_interval: Interval


def age_bands(age_years: np.ndarray) -> np.ndarray:
    """Names of age bands of twenty years: 0-19, 20-39, 40-59, 60-79, 80 and over.

    Args:
        age_years: [N], years, NaN where it is not known.

    Returns:
        Object array [N] of names; None where the age is not known or negative.

    Reference:
        The bands of Seyyed-Kalantari et al., Underdiagnosis bias of artificial intelligence
        algorithms applied to chest radiographs, Nature Medicine 27 (2021).
    """
    names = np.full(len(age_years), None, object)
    for least, name in AGE_BANDS:
        names[age_years >= least] = name
    return names


def subgroup_results(
    metrics: Resampled,
    metric: str,
    known: np.ndarray,
    predictions: np.ndarray,
    groups: np.ndarray,
    resamples: PatientResamples,
    left_out: PatientsLeftOut,
) -> Subgroups:
    """A metric for each group of images, with intervals by patient from the shared resamples.

    Args:
        metrics: `binary_resampled`, `calibration_resampled` or `real_resampled`.
        metric: One that `metrics` gives.
        known: [N] labels or values; NaN ones are left out.
        predictions: [N].
        groups: Object array [N] of group names, None where the group is not known. A patient may
            have images in several groups, such as views.
        resamples: Of the patients of these N images.
        left_out: Of the same patients.
    """
    real = metrics is real_resampled
    named = np.array([name is not None for name in groups]) & ~np.isnan(known)
    rows, of_group = [], []
    for name in sorted(set(groups[named])):
        inside = named & (groups == name)
        images = np.where(inside, known, np.nan)
        value = estimates(metrics, images, predictions, resamples, left_out)[metric]
        too_few = value.evidence < FEWEST
        rows.append(
            Subgroup(
                group=str(name),
                n=int(inside.sum()),
                n_patients=len(np.unique(resamples.patient_of_image[inside])),
                positives=None if real else int((known[inside] == 1).sum()),
                too_few=too_few,
                value=np.nan if too_few else value.point,
                estimate=None if too_few else value,
            )
        )
        of_group += [] if too_few else [value]
    return Subgroups(rows, *gap(of_group))


def gap(values: Sequence[Estimate]) -> tuple[float, Interval]:
    """The largest minus the smallest of some values, and an interval for having picked the two.

    It is Tukey's: as many standard errors wide as the largest of all paired differences is from its
    point in 95 % of the resamples, both over their own standard errors.

    Args:
        values: Of one metric, one a group, and the same resamples.

    Returns:
        The gap and its interval; NaN both with fewer than two groups.

    Reference:
        Westfall & Young, Resampling-Based Multiple Testing (1993), section 2.6: the largest of all
        studentised differences less their points.
    """
    if len(values) < 2:
        return np.nan, Interval(np.nan, np.nan, 0)
    points = np.array([one.point for one in values])
    resampled = np.stack([one.resampled for one in values])
    whole = ~np.isnan(resampled).any(axis=0)
    noise = resampled[:, whole] - points[:, None]  # [G, R]
    first, second = np.triu_indices(len(values), 1)
    between = noise[first] - noise[second]  # [pairs, R]
    error = between.std(axis=1)
    scaled = np.abs(between) / np.where(error > 0, error, 1)[:, None]
    factor = np.quantile(scaled.max(axis=0), LEVEL)
    top, bottom = int(points.argmax()), int(points.argmin())
    apart = float(points[top] - points[bottom])
    reach = float(factor * (noise[top] - noise[bottom]).std())
    return apart, Interval(apart - reach, apart + reach, int((~whole).sum()))
