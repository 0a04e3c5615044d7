"""The bootstrap over resamples at once against a loop over scikit-learn's metrics.

    python benchmarks/statistics.py

1,000 resamples by patient of 2,000 images of 1,200 patients, AUROC and average precision of one
finding at 10 %, on one thread, each three times in turn; scikit-learn takes the same weights, and
of them the first 100, times ten. Prints CPU seconds, the largest difference of any value and the
ratio of the medians; `selfray` computes two sensitivities besides.
"""

from __future__ import annotations

import json
import time

import numpy as np
import sklearn
from sklearn.metrics import average_precision_score, roc_auc_score
from threadpoolctl import threadpool_limits

from selfray.evals.bootstrap import PatientResamples, resample
from selfray.evals.metrics import binary_resampled

IMAGES, PATIENTS, LOOPED, REPEATS = 2000, 1200, 100, 3


def main() -> None:
    rng = np.random.default_rng(0)
    patients = rng.integers(0, PATIENTS, IMAGES)
    labels = (rng.random(PATIENTS) < 0.1).astype(float)[patients]
    scores = labels + rng.normal(size=IMAGES)
    resamples = PatientResamples(patients)
    weights = resamples.multiplicity[:, resamples.patient_of_image].astype(float)
    seconds: dict[str, list[float]] = {"selfray": [], "scikit-learn": []}
    worst = 0.0
    with threadpool_limits(1):
        for _ in range(REPEATS):
            began = time.process_time()
            ours = resample(binary_resampled, labels, scores, resamples)
            seconds["selfray"].append(time.process_time() - began)
            began = time.process_time()
            theirs = [
                (
                    roc_auc_score(labels, scores, sample_weight=w),
                    average_precision_score(labels, scores, sample_weight=w),
                )
                for w in weights[:LOOPED]
            ]
            elapsed = time.process_time() - began
            seconds["scikit-learn"].append(elapsed * len(weights) / LOOPED)
            found = np.stack([ours["auroc"], ours["auprc"]], axis=1)[:LOOPED]
            worst = max(worst, float(np.abs(found - theirs).max()))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, values in seconds.items():
        record = {"what": name, "cpu_seconds": round(medians[name], 3)}
        print(json.dumps(record | {"all_cpu_seconds": [round(s, 3) for s in values]}))
    ratio = round(medians["scikit-learn"] / medians["selfray"], 1)
    print(json.dumps({"ratio": ratio, "largest_difference": float(f"{worst:.1e}")}))
    print(f"scikit-learn {sklearn.__version__}, numpy {np.__version__}")


if __name__ == "__main__":
    main()
