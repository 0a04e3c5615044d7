"""The bootstrap by patient, vectorised over resamples and paired between encoders.

Patients are drawn with replacement, and all images of a patient go along, because two images of one
patient are no two pieces of evidence. A resample is kept as the number of times that each patient
was drawn, which then weighs the patient's images; every metric of `metrics` takes such weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from selfray.evals.metrics import real_resampled

RESAMPLES = 1000
LEVEL = 0.95
JACKKNIFE_GROUPS = 200

_ELEMENTS = 65_536  # weights at once (images x resamples): what stays in a core's cache
_FEWEST = 16  # resamples at once, which is what NumPy's inner loops run along
_STREAM = 0x626F6F74  # "boot": keeps these numbers apart from other uses of the same seed
_JACKKNIFE_STREAM = 0x6A61636B  # "jack"
_SEED_STREAM = 0x73656564  # "seed"

Resampled = Callable[[np.ndarray, np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Interval:
    """An interval from resamples.

    Attributes:
        low: Lower end; NaN where the interval is not defined.
        high: Upper end.
        left_out: Resamples in which the metric was not defined (one class only).
    """

    low: float
    high: float
    left_out: int


class PatientWeights:
    """How often each patient counts in each of many weightings.

    Attributes:
        patient_of_image: int [N].
        n_patients: P.
        multiplicity: uint16 [R, P].
    """

    def __init__(self, patients: Sequence[str] | np.ndarray) -> None:
        names, self.patient_of_image = np.unique(np.asarray(patients), return_inverse=True)
        self.n_patients = len(names)
        self.multiplicity = np.empty((0, self.n_patients), np.uint16)

    def weights(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Weights of some images, float64 [r, n] in blocks of resamples, R in all.

        Args:
            rows: [n] positions of images.
        """
        patients = self.patient_of_image[rows]
        block = max(_FEWEST, _ELEMENTS // max(1, len(rows)))
        for start in range(0, len(self.multiplicity), block):
            part = self.multiplicity[start : start + block].T.astype(np.float64)  # [P, r]
            yield part[patients].T


class PatientResamples(PatientWeights):
    """The same resamples of patients for every metric, target and encoder, which pairs them.

    Resample r is a function of (seed, r) and the number of patients alone.

    Args:
        patients: [N] identifiers, one an image.
        count: R, how many resamples.
        seed: 0 to 2**32 - 1.
        strata: [N], one a patient: each is drawn from as often as it has patients, so that none is
            missing from a resample; default: one stratum.
    """

    def __init__(
        self,
        patients: Sequence[str] | np.ndarray,
        count: int = RESAMPLES,
        seed: int = 0,
        strata: np.ndarray | None = None,
    ) -> None:
        super().__init__(patients)
        of_patient = np.zeros(self.n_patients, np.int64)
        if strata is not None:
            of_patient[self.patient_of_image] = np.unique(strata, return_inverse=True)[1]
        members = [np.flatnonzero(of_patient == s) for s in range(of_patient.max() + 1)]
        self.multiplicity = np.empty((count, self.n_patients), np.uint16)
        for r in range(count):
            generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=r << 64))
            for stratum in members:
                drawn = generator.integers(len(stratum), size=len(stratum))
                self.multiplicity[r, stratum] = np.bincount(drawn, minlength=len(stratum))


class PatientsLeftOut(PatientWeights):
    """Every patient once, less one group of patients at a time: what a jackknife needs.

    With up to `JACKKNIFE_GROUPS` patients a group is one patient; with more, the patients are dealt
    out to that many groups at random, of equal size to within one.

    Args:
        patients: [N] identifiers, one an image.
    """

    def __init__(self, patients: Sequence[str] | np.ndarray) -> None:
        super().__init__(patients)
        groups = min(JACKKNIFE_GROUPS, self.n_patients)
        generator = np.random.Generator(np.random.Philox(key=[0, _JACKKNIFE_STREAM]))
        group = generator.permutation(self.n_patients) % groups
        self.multiplicity = (group != np.arange(groups)[:, None]).astype(np.uint16)


def resample(
    metrics: Resampled, known: np.ndarray, predictions: np.ndarray, resamples: PatientWeights
) -> dict[str, np.ndarray]:
    """The distribution of metrics over the resamples.

    Args:
        metrics: `binary_resampled`, `calibration_resampled` or `real_resampled`.
        known: [N] labels or values; NaN ones are left out.
        predictions: [N].
        resamples: Of the patients of these N images; or the groups left out, for the jackknife.

    Returns:
        By metric, float64 [R]; NaN where a resample does not define it.
    """
    rows = np.flatnonzero(~np.isnan(known))
    parts = [metrics(known[rows], predictions[rows], w) for w in resamples.weights(rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def point(metrics: Resampled, known: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Metrics of all images, each once: by the same code as their resamples.

    Args:
        metrics: `binary_resampled`, `calibration_resampled` or `real_resampled`.
        known: [N] labels or values; NaN ones are left out.
        predictions: [N].

    Returns:
        By metric; NaN where it is not defined.
    """
    rows = ~np.isnan(known)
    once = np.ones((1, int(rows.sum())))
    values = metrics(known[rows], predictions[rows], once)
    return {name: float(value[0]) for name, value in values.items()}


def interval(values: np.ndarray, level: float = LEVEL) -> Interval:
    """The percentile interval of a resampled metric, or of a difference of two.

    Args:
        values: [R], NaN where not defined.
        level: Nominal coverage, 0 to 1.

    Returns:
        The interval; not defined (NaN) when more than half of the resamples were left out.
    """
    return _between(values, (1 - level) / 2, (1 + level) / 2)


def bca_interval(
    point: float,
    values: np.ndarray,
    left_out: np.ndarray,
    evidence: float,
    level: float = LEVEL,
) -> Interval:
    """The bias-corrected and accelerated interval of a metric, a mean of some, or a difference.

    It is expanded for little evidence, as Student's interval of a mean is: resamples of few
    patients are too much alike.

    Args:
        point: The metric on all images.
        values: [R] over `PatientResamples`, NaN where not defined.
        left_out: [G] over `PatientsLeftOut`, NaN where not defined.
        evidence: Patients of the rarer class, or all where the target is real-valued; see
            `Estimate`.
        level: Nominal coverage, 0 to 1.

    Returns:
        The interval; not defined (NaN) when more than half of the resamples were left out, or with
        evidence below 2: one patient is the same wherever it is drawn.

    Reference:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), eqs. 14.9 to 14.15; the bias
        counts half of the resamples that equal the point, as SciPy's `bootstrap` does. Expanded as
        in Hesterberg, What teachers should know about the bootstrap, The American Statistician 69
        (2015): the expanded percentile interval.
    """
    defined = values[~np.isnan(values)]
    if evidence < 2 or np.isnan(point):
        return Interval(np.nan, np.nan, len(values) - len(defined))
    tail = np.sqrt(evidence / (evidence - 1)) * student.ppf((1 + level) / 2, evidence - 1)
    tails = np.array([-tail, tail])
    below = ((defined < point).mean() + (defined <= point).mean()) / 2 if len(defined) else np.nan
    known = left_out[~np.isnan(left_out)]
    influence = known.mean() - known if len(known) else known
    cubes, squares = (influence**3).sum(), (influence**2).sum()
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    if not 0 < below < 1:  # no resample on one side: the correction would be infinite
        low, high = norm.cdf(tails)
        return _between(values, float(low), float(high))
    bias = norm.ppf(below)
    z = bias + tails
    # Past its pole the formula would turn round; no |z| here comes near it unless a is huge.
    low, high = norm.cdf(bias + z / np.maximum(1 - acceleration * z, 1e-3))
    return _between(values, float(low), float(high))


def _between(values: np.ndarray, low: float, high: float) -> Interval:
    """The quantiles of the defined values, 0 <= low <= high <= 1."""
    defined = values[~np.isnan(values)]
    left_out = len(values) - len(defined)
    if left_out * 2 > len(values):
        return Interval(np.nan, np.nan, left_out)
    ends = np.quantile(defined, [low, high])
    return Interval(float(ends[0]), float(ends[1]), left_out)


@dataclass(frozen=True)
class Estimate:
    """A number with all that its interval needs. Two of the same patients subtract, paired.

    Attributes:
        point: On all images; NaN where it is not defined.
        resampled: [R] over `PatientResamples`.
        left_out: [G] over `PatientsLeftOut`.
        evidence: Patients of the rarer class, or all where the target is real-valued. For a mean, 1
            more than its degrees of freedom.
    """

    point: float
    resampled: np.ndarray
    left_out: np.ndarray
    evidence: float

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(
            self.point - other.point,
            self.resampled - other.resampled,
            self.left_out - other.left_out,
            min(self.evidence, other.evidence),
        )

    def interval(self) -> Interval:
        """The 95 % interval, `bca_interval`."""
        return bca_interval(self.point, self.resampled, self.left_out, self.evidence)


def estimates(
    metrics: Resampled,
    known: np.ndarray,
    predictions: np.ndarray,
    resamples: PatientResamples,
    left_out: PatientsLeftOut,
) -> dict[str, Estimate]:
    """Metrics of one target with what their intervals need.

    Args:
        metrics: `binary_resampled`, `calibration_resampled` or `real_resampled`.
        known: [N] labels or values; NaN ones are left out.
        predictions: [N].
        resamples: Of the patients of these N images.
        left_out: Of the same patients.

    Returns:
        By metric.
    """
    points = point(metrics, known, predictions)
    resampled = resample(metrics, known, predictions, resamples)
    jackknife = resample(metrics, known, predictions, left_out)
    classes = [~np.isnan(known)] if metrics is real_resampled else [known == 0, known == 1]
    evidence = min(len(np.unique(resamples.patient_of_image[images])) for images in classes)
    return {
        name: Estimate(value, resampled[name], jackknife[name], evidence)
        for name, value in points.items()
    }


def mean_estimate(parts: Sequence[Estimate]) -> Estimate:
    """The mean over findings (the macro).

    A resample that lacks a class of a rare finding takes that finding's point, so that the mean
    does not jump because a finding that is easy or hard dropped out, and stays within 0 to 1.

    Args:
        parts: Of one metric and the same resamples; those that are not defined are left out.

    Returns:
        The mean; its point is NaN where none is defined.
    """
    defined = [part for part in parts if not np.isnan(part.point)]
    if not defined:
        return Estimate(np.nan, np.empty(0), np.empty(0), 0)
    columns = [(part.resampled, part.left_out, part.point) for part in defined]
    resampled, left_out = (
        np.mean([np.where(np.isnan(c[k]), c[2], c[k]) for c in columns], axis=0) for k in (0, 1)
    )
    variances = [float(np.nanvar(part.resampled)) for part in defined]
    freedom = _degrees_of_freedom(variances, [part.evidence - 1 for part in defined])
    return Estimate(
        float(np.mean([part.point for part in defined])), resampled, left_out, 1 + freedom
    )


def seed_mean(seeds: Sequence[Estimate]) -> Estimate:
    """The mean over several seeds of a probe, uncertain by its patients and by its seeds.

    The point is the mean of the seeds' points. A resample of patients gives the mean of the seeds'
    metrics on it, plus the mean of S deviations drawn with replacement from those of the S points,
    made larger by sqrt(S / (S - 1)), without which S draws have too small a variance. So the
    variance is that of the mean by patients plus the variance between seeds over S: the interval is
    that of the expected metric of a seed.

    Args:
        seeds: Of one metric, one a seed, of the same resamples; one seed is returned as it is, and
            its interval knows nothing of seeds.

    Returns:
        The mean. Means of as many seeds subtract, also where their seeds have nothing in common.

    Reference:
        Davison & Hinkley, Bootstrap Methods and their Application (1997), section 3.8, on
        resampling a sample of few groups.
    """
    count = len(seeds)
    if count == 1:
        return seeds[0]
    points = np.array([one.point for one in seeds])
    resampled = np.mean([one.resampled for one in seeds], axis=0)
    generator = np.random.Generator(np.random.Philox(key=[0, _SEED_STREAM]))
    drawn = generator.integers(count, size=(len(resampled), count))
    deviations = (points - points.mean()) * np.sqrt(count / (count - 1))
    defined = resampled[~np.isnan(resampled)]
    by_patients = float(defined.var()) if len(defined) else 0.0
    variances = [by_patients, float(points.var(ddof=1)) / count]
    freedom = _degrees_of_freedom(variances, [seeds[0].evidence - 1, count - 1])
    return Estimate(
        float(points.mean()),
        resampled + deviations[drawn].mean(axis=1),
        np.mean([one.left_out for one in seeds], axis=0),
        1 + freedom,
    )


def _degrees_of_freedom(variances: Sequence[float], freedoms: Sequence[float]) -> float:
    """Of a sum of independent parts (Satterthwaite, Biometrics Bulletin 2, 1946)."""
    v, f = np.array(variances), np.array(freedoms, float)
    varies = v > 0
    if not varies.any() or (f[varies] <= 0).any():
        return float(f.min())
    return float(v.sum() ** 2 / (v[varies] ** 2 / f[varies]).sum())
