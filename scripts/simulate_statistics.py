"""Whether intervals hold the truth and tests find nothing where there is nothing: by simulation.

    python scripts/simulate_statistics.py [STUDIES]

Every study draws new patients with one to three images each, which share half of the variance of
their scores; truths are exact or from half a million patients. Prints coverage of nominal 95 %
intervals and rejections at the 5 % level, in percent of the studies (400, unless told otherwise;
their standard error is then 1.1), as the tables of docs/statistics.md.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import norm

from selfray.evals.bootstrap import (
    Estimate,
    Interval,
    PatientResamples,
    PatientsLeftOut,
    estimates,
    interval,
    mean_estimate,
    point,
    resample,
    seed_mean,
)
from selfray.evals.metrics import binary_resampled, calibration_resampled, real_resampled
from selfray.evals.paired_tests import PatientSwaps, delong_test, mean_test, permutation_test
from selfray.evals.ranking import rank_encoders

TRUTH_PATIENTS = 500_000
Held = dict[tuple[str, str, str], list[bool]]


@dataclass(frozen=True)
class Study:
    """Patients, whether each image is positive for each finding, and scores by each encoder."""

    patients: np.ndarray  # [N]
    labels: np.ndarray  # [N, F]
    scores: np.ndarray  # [encoders, N, F]


def draw_study(
    rng: np.random.Generator,
    patients: int,
    prevalences: tuple[float, ...],
    separations: tuple[float, ...],
) -> Study:
    """Scores are normal, of variance 1, and `separation` higher for positives."""
    patient = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    labels = (rng.random((patients, len(prevalences))) < prevalences).astype(float)[patient]
    shape = (len(separations), patients, len(prevalences))
    shared = rng.normal(size=shape)[:, patient]
    noise = np.sqrt(0.5) * (shared + rng.normal(size=shared.shape))
    scores = labels * np.array(separations)[:, None, None] + noise
    return Study(patient, labels, scores)


def note(held: Held, case: str, metric: str, truth: float, intervals: dict[str, Interval]) -> None:
    for name, bounds in intervals.items():
        held[case, metric, name].append(bounds.low <= truth <= bounds.high)


def kinds(one: Estimate) -> dict[str, Interval]:
    return {"percentile": interval(one.resampled), "BCa": one.interval()}


def one_finding(
    case: str, patients: int, prevalence: float, separation: float, studies: int
) -> Held:
    """Every binary metric, and what becomes of it when resamples are stratified by the finding."""
    held: Held = defaultdict(list)
    many = draw_study(np.random.default_rng(1), TRUTH_PATIENTS, (prevalence,), (separation,))
    truth = point(binary_resampled, many.labels[:, 0], many.scores[0, :, 0])
    truth["auroc"] = float(norm.cdf(separation / np.sqrt(2)))
    for s in range(studies):
        study = draw_study(np.random.default_rng([2, s]), patients, (prevalence,), (separation,))
        y, x = study.labels[:, 0], study.scores[0, :, 0]
        resamples = PatientResamples(study.patients, seed=s)
        strata = PatientResamples(study.patients, seed=s, strata=y)
        stratified = resample(binary_resampled, y, x, strata)
        left_out = PatientsLeftOut(study.patients)
        for metric, one in estimates(binary_resampled, y, x, resamples, left_out).items():
            bounds = kinds(one) | {"percentile, stratified": interval(stratified[metric])}
            note(held, case, metric, truth[metric], bounds)
    return held


def macro_and_difference(patients: int, studies: int) -> Held:
    """The mean AUROC over eight findings of 3 to 40 %, and two encoders' difference of it."""
    held: Held = defaultdict(list)
    prevalences = (0.03, 0.04, 0.05, 0.08, 0.1, 0.15, 0.2, 0.4)
    separations = (1.2, 0.9)
    truth = norm.cdf(np.array(separations) / np.sqrt(2))
    case = f"macro AUROC, {patients} patients"
    for s in range(studies):
        study = draw_study(np.random.default_rng([3, s]), patients, prevalences, separations)
        resamples = PatientResamples(study.patients, seed=s)
        left_out = PatientsLeftOut(study.patients)
        first, second = (
            mean_estimate([
                estimates(binary_resampled, y, x, resamples, left_out)["auroc"]
                for y, x in zip(study.labels.T, scores.T, strict=True)
            ])
            for scores in study.scores
        )  # fmt: skip
        note(held, case, "of one encoder", truth[0], kinds(first))
        note(held, case, "difference of two", truth[0] - truth[1], kinds(first - second))
    return held


def calibration_and_age(patients: int, studies: int) -> Held:
    """A probe that is right about its probabilities, and age with R² of 0.5."""
    held: Held = defaultdict(list)
    case = f"{patients} patients"
    big = np.random.default_rng(4).normal(-1.5, 1, 1_000_000)
    chance = 1 / (1 + np.exp(-big))
    brier = float((chance * (1 - chance)).mean())
    for s in range(studies):
        rng = np.random.default_rng([4, s])
        study = draw_study(rng, patients, (0.5,), (0.0,))
        n = len(study.patients)
        resamples = PatientResamples(study.patients, seed=s)
        left_out = PatientsLeftOut(study.patients)
        p = 1 / (1 + np.exp(1.5 - study.scores[0, :, 0]))
        y = (rng.random(n) < p).astype(float)
        found = estimates(calibration_resampled, y, p, resamples, left_out)
        note(held, case, "brier", brier, kinds(found["brier"]))
        note(held, case, "ece (truth 0)", 0.0, kinds(found["ece"]))
        predictions = study.scores[0, :, 0]
        age = predictions + rng.normal(size=patients)[study.patients]
        real = estimates(real_resampled, age, predictions, resamples, left_out)
        r = np.sqrt(0.5)
        truths = {"r2": 0.5, "mae": np.sqrt(2 / np.pi), "pearson": r}
        truths["spearman"] = 6 / np.pi * np.arcsin(r / 2)  # of two normals (Pearson, 1907)
        for metric, truth in truths.items():
            note(held, case, f"age, {metric}", truth, kinds(real[metric]))
    return held


def seeds_and_ranks(patients: int, studies: int) -> Held:
    """Three seeds of a probe, which differ as much as the patients do; and the best of six."""
    held: Held = defaultdict(list)
    for s in range(studies):
        rng = np.random.default_rng([5, s])
        study = draw_study(rng, patients, (0.3,), (1.0,) * 6)
        y = study.labels[:, 0]
        resamples = PatientResamples(study.patients, seed=s)
        left_out = PatientsLeftOut(study.patients)
        found = [
            estimates(binary_resampled, y, x[:, 0], resamples, left_out)["auroc"]
            for x in study.scores
        ]
        one = found[0]
        shifts = rng.normal(0, np.std(one.resampled), 3)
        seeds = [
            Estimate(one.point + d, one.resampled + d, one.left_out + d, one.evidence)
            for d in shifts
        ]
        truth = float(norm.cdf(1 / np.sqrt(2)))
        note(held, "three seeds", "auroc", truth, {"BCa": seed_mean(seeds).interval()})
        held["best of six equals", "first kept", "set"].append(rank_encoders(found)[0].may_be_best)
    return held


def false_positives(patients: int, prevalence: float, studies: int) -> Held:
    """Two encoders that are as good, by the tests and by whether the interval leaves 0 out."""
    held: Held = defaultdict(list)
    case = f"{patients} patients, {prevalence * patients:.0f} positive"
    for s in range(studies):
        rng = np.random.default_rng([6, s])
        study = draw_study(rng, patients, (prevalence, prevalence), (1.0, 1.0))
        labels, (a, b) = study.labels, study.scores
        p = delong_test(labels[:, 0], a[:, 0], b[:, 0], study.patients).p
        held[case, "auroc", "DeLong"].append(p <= 0.05)
        swaps = PatientSwaps(study.patients, 199, seed=s)
        tests = [
            permutation_test(binary_resampled, labels[:, f], a[:, f], 3 * b[:, f], swaps)
            for f in range(2)
        ]
        for metric, test in tests[0].items():
            held[case, metric, "permutation"].append(test.p <= 0.05)
        macro = mean_test([test["auroc"] for test in tests])
        held[case, "macro auroc", "permutation"].append(macro.p <= 0.05)
    return held


def simulations(studies: int) -> Iterator[Held]:
    yield one_finding("400 patients, 20 positive", 400, 0.05, 1.5, studies)
    yield one_finding("400 patients, 100 positive", 400, 0.25, 1.5, studies)
    yield macro_and_difference(300, studies)
    yield calibration_and_age(200, studies)
    yield seeds_and_ranks(200, studies)
    yield false_positives(400, 0.05, studies)
    yield false_positives(200, 0.3, studies)


def main() -> None:
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 400
    for held in simulations(studies):
        for (case, metric, kind), values in held.items():
            print(f"| {case} | {metric} | {kind} | {100 * np.mean(values):.1f} |", flush=True)


if __name__ == "__main__":
    main()
