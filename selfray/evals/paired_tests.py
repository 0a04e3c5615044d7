"""Is one encoder better than another on the same patients? Two tests, and Holm's correction.

A null hypothesis is about two encoders and one finding. `delong_test` is for the AUROC: quick, and
right under any two score distributions. `permutation_test` is for every metric, and for the mean
over findings: it asks whether the two encoders could be swapped patient by patient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from scipy.stats import t as student

from selfray.evals.bootstrap import PatientWeights, Resampled, point
from selfray.evals.metrics import binary_resampled

PERMUTATIONS = 1999  # with the observed one 2,000, so that 0.05 is reached exactly

_STREAM = 0x73776170  # "swap": keeps these numbers apart from other uses of the same seed
_TIE_STREAM = 0x74696573  # "ties"


@dataclass(frozen=True)
class DeLongTest:
    """Two AUROCs compared.

    Attributes:
        difference: Of the first's AUROC minus the second's, -1 to 1.
        standard_error: Of the difference.
        z: Their ratio.
        p: Two-sided, by Student's t with as many degrees of freedom as the rarer class has
            patients, less one; 1 where the difference and its standard error are both 0, NaN where
            only the standard error is, or a class has fewer than two patients.
    """

    difference: float
    standard_error: float
    z: float
    p: float


def delong_test(
    labels: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    patients: Sequence[str] | np.ndarray,
) -> DeLongTest:
    """DeLong's test of two AUROCs, with the images of a patient taken as one piece of evidence.

    The published test takes p from the normal distribution. With 20 positive patients it rejects
    equals in 6.8 % of studies at the 5 % level, and Student's t in 5.0 % (3,000 simulated studies).

    Args:
        labels: [N]: 1, 0, or NaN where it is not known, which leaves the image out.
        scores_a: [N], higher means more likely 1.
        scores_b: [N], on any scale of its own.
        patients: [N] identifiers.

    Returns:
        The test; all NaN where one class only is known.

    Reference:
        Obuchowski, Nonparametric analysis of clustered ROC curve data, Biometrics 53 (1997), which
        with one image a patient is DeLong et al., Biometrics 44 (1988); placement values from ranks
        as in Sun & Xu, IEEE Signal Processing Letters 21 (2014).
    """
    known = ~np.isnan(labels)
    positive = labels[known] == 1
    if positive.all() or not positive.any():
        return DeLongTest(np.nan, np.nan, np.nan, np.nan)
    names, patient = np.unique(np.asarray(patients)[known], return_inverse=True)
    excess = np.zeros((2, 2, len(names)))  # [class, encoder, patient]: placements less the AUROC
    aurocs = np.empty(2)
    for k, scores in enumerate((scores_a, scores_b)):
        placements = _placements(positive, scores[known])
        aurocs[k] = placements[positive].mean()
        for c, members in enumerate((~positive, positive)):
            beyond = placements[members] - aurocs[k]
            excess[c, k] = np.bincount(patient[members], weights=beyond, minlength=len(names))
    images = np.array([(~positive).sum(), positive.sum()])
    holders = np.array([len(np.unique(patient[members])) for members in (~positive, positive)])
    difference = float(aurocs[0] - aurocs[1])
    if holders.min() < 2:
        return DeLongTest(difference, np.nan, np.nan, np.nan)
    d = excess[:, 0] - excess[:, 1]  # the contrast, [class, patient]
    within = (holders / (holders - 1) * (d**2).sum(axis=1) / images**2).sum()
    between = len(names) / (len(names) - 1) * (d[0] * d[1]).sum() / images.prod()
    error = float(np.sqrt(max(within + 2 * between, 0.0)))
    if error == 0:
        z, p = (0.0, 1.0) if difference == 0 else (np.nan, np.nan)
    else:
        z = difference / error
        p = float(2 * student.sf(abs(z), holders.min() - 1))
    return DeLongTest(difference, error, z, p)


def _placements(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Share of the other class that each image is on the right side of, ties half; [n]."""
    overall = rankdata(scores)
    placements = np.empty(len(scores))
    n_positive, n_negative = positive.sum(), (~positive).sum()
    placements[positive] = (overall[positive] - rankdata(scores[positive])) / n_negative
    placements[~positive] = 1 - (overall[~positive] - rankdata(scores[~positive])) / n_positive
    return placements


class PatientSwaps(PatientWeights):
    """Which patients have the predictions of two encoders swapped, in each of many permutations.

    The same swaps serve every metric and finding, so that means over findings can be tested.

    Args:
        patients: [N] identifiers, one an image.
        count: M, how many permutations.
        seed: 0 to 2**32 - 1.
    """

    def __init__(
        self, patients: Sequence[str] | np.ndarray, count: int = PERMUTATIONS, seed: int = 0
    ) -> None:
        super().__init__(patients)
        generator = np.random.Generator(np.random.Philox(key=[seed, _STREAM]))
        self.multiplicity = generator.integers(2, size=(count, self.n_patients), dtype=np.uint16)

    def stacked(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Weights, 1 or 0, of the rows' predictions by a and then by b: two [m, 2n] a block.

        The first picks what stands in a's place after the swaps, the second what stands in b's.
        """
        for swapped in self.weights(rows):
            yield (
                np.concatenate([1 - swapped, swapped], axis=1),
                np.concatenate([swapped, 1 - swapped], axis=1),
            )


def _interleaved_ranks(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of each, where those of b are a little above or below the same rank of a, at random.

    Ties within an encoder stay ties. Ties between the two, which no encoder made, would count as
    half a success after a swap, and give average precision too little variance.
    """
    generator = np.random.Generator(np.random.Philox(key=[0, _TIE_STREAM]))
    values, place = np.unique(rankdata(b), return_inverse=True)
    # Ranks differ by at least 0.5, so that b's order stays.
    return rankdata(a), (values + generator.choice([-0.1, 0.1], len(values)))[place]


@dataclass(frozen=True)
class PermutationTest:
    """A difference between two encoders, and what it is when patients are swapped at random.

    Attributes:
        difference: The first's metric minus the second's.
        swapped: [M], the same after each permutation.
    """

    difference: float
    swapped: np.ndarray

    @property
    def p(self) -> float:
        """Two-sided, (b + 1) / (M + 1): never 0; NaN where the difference is not defined.

        b counts permutations that are at least as far from 0.

        Reference:
            Phipson & Smyth, Permutation p-values should never be zero, Statistical Applications in
            Genetics and Molecular Biology 9 (2010).
        """
        if np.isnan(self.difference):
            return float("nan")
        # The same sum in another order may differ in its last digits, and still is as far.
        as_far = np.abs(self.swapped) >= np.abs(self.difference) - 1e-12
        return float((as_far.sum() + 1) / (len(self.swapped) + 1))


def permutation_test(
    metrics: Resampled,
    known: np.ndarray,
    predictions_a: np.ndarray,
    predictions_b: np.ndarray,
    swaps: PatientSwaps,
) -> dict[str, PermutationTest]:
    """Test every metric by swapping the two encoders' predictions, patient by patient.

    For AUROC and the like, each encoder's scores become ranks first, which changes no metric: two
    probes with scores on different scales can then stand in for each other.

    Args:
        metrics: `binary_resampled`, `calibration_resampled` or `real_resampled`.
        known: [N] labels or values; NaN ones are left out.
        predictions_a: [N].
        predictions_b: [N].
        swaps: Of the patients of these N images.

    Returns:
        By metric.

    Reference:
        Venkatraman & Begg, A distribution-free procedure for comparing receiver operating
        characteristic curves from a paired experiment, Biometrika 83 (1996), which swaps ranks.
    """
    rows = np.flatnonzero(~np.isnan(known))
    y, a, b = known[rows], predictions_a[rows], predictions_b[rows]
    if metrics is binary_resampled:
        a, b = _interleaved_ranks(a, b)
    before, after = point(metrics, y, a), point(metrics, y, b)
    both, stacked = np.r_[y, y], np.r_[a, b]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in before}
    for in_place_of_a, in_place_of_b in swaps.stacked(rows):
        first = metrics(both, stacked, in_place_of_a)
        second = metrics(both, stacked, in_place_of_b)
        for name, values in parts.items():
            values.append(first[name] - second[name])
    return {
        name: PermutationTest(before[name] - after[name], np.concatenate(values))
        for name, values in parts.items()
    }


def mean_test(tests: Sequence[PermutationTest]) -> PermutationTest:
    """The test of a mean difference: over findings (the macro), or over seeds of a probe.

    Args:
        tests: Of one metric and one pair of encoders, all with the same `PatientSwaps`; those whose
            difference is not defined are left out.

    Returns:
        The test of the mean; its difference is NaN where none is defined.
    """
    defined = [test for test in tests if not np.isnan(test.difference)]
    if not defined:
        return PermutationTest(float("nan"), np.empty(0))
    return PermutationTest(
        float(np.mean([test.difference for test in defined])),
        np.mean([test.swapped for test in defined], axis=0),
    )


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values adjusted for their number, so that the chance of any false finding stays bounded.

    Args:
        p_values: [T], NaN where there was no test, which then does not count.

    Returns:
        float64 [T], 0 to 1, in the same order; compare each with the level, such as 0.05.

    Reference:
        Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    p = np.asarray(p_values, float)
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return adjusted
