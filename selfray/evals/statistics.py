"""The statistics of an evaluation, all by patient: what `docs/statistics.md` explains."""

from selfray.evals.bootstrap import (
    LEVEL,
    RESAMPLES,
    Estimate,
    Interval,
    PatientResamples,
    PatientsLeftOut,
    bca_interval,
    estimates,
    interval,
    mean_estimate,
    point,
    resample,
    seed_mean,
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
from selfray.evals.ranking import rank_encoders
from selfray.evals.subgroups import age_bands, subgroup_results

__all__ = [
    "LEVEL",
    "RESAMPLES",
    "Estimate",
    "Interval",
    "PatientResamples",
    "PatientSwaps",
    "PatientsLeftOut",
    "age_bands",
    "bca_interval",
    "binary_resampled",
    "calibration_resampled",
    "delong_test",
    "estimates",
    "holm",
    "interval",
    "mean_estimate",
    "mean_test",
    "permutation_test",
    "point",
    "rank_encoders",
    "real_resampled",
    "reliability_curve",
    "resample",
    "seed_mean",
    "subgroup_results",
]
