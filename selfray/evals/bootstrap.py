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

RESAMPLES = 1000
LEVEL = 0.95
JACKKNIFE_GROUPS = 200

_ELEMENTS = 65_536  # weights at once (images x resamples): what stays in a core's cache
_FEWEST = 16  # resamples at once, which is what NumPy's inner loops run along
_STREAM = 0x626F6F74  # "boot": keeps these numbers apart from other uses of the same seed
_JACKKNIFE_STREAM = 0x6A61636B  # "jack"

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
    evidence: int,
    level: float = LEVEL,
) -> Interval:
    """The bias-corrected and accelerated interval of a metric, a mean of some, or a difference.

    It is expanded for little evidence, as Student's interval of a mean is: resamples of few patients
    are too much alike.

    Args:
        point: The metric on all images.
        values: [R] over `PatientResamples`, NaN where not defined.
        left_out: [G] over `PatientsLeftOut`, NaN where not defined.
        evidence: Patients of the rarer class (of the rarest finding, for a mean over findings), or
            patients where the target is real-valued; >= 2.
        level: Nominal coverage, 0 to 1.

    Returns:
        The interval; not defined (NaN) when more than half of the resamples were left out.

    Reference:
        Efron & Tibshirani, An Introduction to the Bootstrap (1993), eqs. 14.9 to 14.15; the bias
        counts half of the resamples that equal the point, as SciPy's `bootstrap` does. Expanded as
        in Hesterberg, What teachers should know about the bootstrap, The American Statistician 69
        (2015), section 3.3.
    """
    tail = np.sqrt(evidence / (evidence - 1)) * student.ppf((1 + level) / 2, evidence - 1)
    tails = np.array([-tail, tail])
    defined = values[~np.isnan(values)]
    below = ((defined < point).mean() + (defined <= point).mean()) / 2 if len(defined) else np.nan
    influence = np.nanmean(left_out) - left_out[~np.isnan(left_out)]
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
