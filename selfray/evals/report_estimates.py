"""Intervals and paired tests for metrics of generated reports, by patient.

A metric of reports is a function of the reports' weights, many weightings at once: `text_resampled`
and `clinical_resampled` make such functions of statistics that are taken from each report once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import numpy as np

from selfray.evals.bootstrap import Estimate, PatientResamples, PatientsLeftOut, PatientWeights
from selfray.evals.paired_tests import PatientSwaps, PermutationTest

Key = TypeVar("Key", bound=Hashable)


def report_estimates(
    metrics: Callable[[np.ndarray], dict[Key, np.ndarray]],
    resamples: PatientResamples,
    left_out: PatientsLeftOut,
    evidence: Mapping[Key, float],
) -> dict[Key, Estimate]:
    """Metrics of all reports, each once, with what their intervals need.

    Args:
        metrics: Of weights [r, n], float64; by name [r].
        resamples: Of the patients of the n reports.
        left_out: Of the same patients.
        evidence: By name, as in `Estimate`.

    Returns:
        By name.
    """
    rows = np.arange(len(resamples.patient_of_image))

    def over(weightings: PatientWeights) -> dict[Key, np.ndarray]:
        parts = [metrics(weights) for weights in weightings.weights(rows)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    points = metrics(np.ones((1, len(rows))))
    resampled, jackknife = over(resamples), over(left_out)
    return {
        name: Estimate(float(value[0]), resampled[name], jackknife[name], evidence[name])
        for name, value in points.items()
    }


def report_tests(
    metrics: Callable[[np.ndarray], dict[Key, np.ndarray]], swaps: PatientSwaps
) -> dict[Key, PermutationTest]:
    """Test every metric by swapping the reports of two encoders, patient by patient.

    Args:
        metrics: Of weights [r, 2n] of the n reports by the first encoder and then of the n by the
            second; by name [r].
        swaps: Of the patients of the n reports.

    Returns:
        By name.
    """
    rows = np.arange(len(swaps.patient_of_image))
    first = np.repeat([[1.0, 0.0]], len(rows), axis=1)
    before, after = metrics(first), metrics(1 - first)
    parts: dict[Key, list[np.ndarray]] = {name: [] for name in before}
    for in_place_of_a, in_place_of_b in swaps.stacked(rows):
        a, b = metrics(in_place_of_a), metrics(in_place_of_b)
        for name, values in parts.items():
            values.append(a[name] - b[name])
    return {
        name: PermutationTest(float((before[name] - after[name])[0]), np.concatenate(values))
        for name, values in parts.items()
    }
