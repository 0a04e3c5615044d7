"""The statistics of an evaluation, all by patient: what `docs/statistics.md` explains."""

from selfray.evals.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    PatientResamples,
    PatientsLeftOut,
    bca_interval,
    interval,
    point,
    resample,
)
from selfray.evals.metrics import (
    binary_resampled,
    calibration_resampled,
    real_resampled,
    reliability_curve,
)
from selfray.evals.paired_tests import (
    PatientSwaps,
    delong_test,
    holm,
    mean_test,
    permutation_test,
)

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "Interval",
    "PatientResamples",
    "PatientSwaps",
    "PatientsLeftOut",
    "bca_interval",
    "binary_resampled",
    "calibration_resampled",
    "delong_test",
    "holm",
    "interval",
    "mean_test",
    "permutation_test",
    "point",
    "real_resampled",
    "reliability_curve",
    "resample",
]
