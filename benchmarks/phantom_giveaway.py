"""What 16 × 16 thumbnails of the phantom give away to a linear model.

    python benchmarks/phantom_giveaway.py [DIR] [--patients 1500] [--size 128] [--seed 0]

Prints AUROC of sex and of each finding, and R² of age and BMI, on the test split of held-out
patients. The strength of the penalty is chosen on the validation split. Limits: sex 0.90, each
finding 0.85.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import cv2
import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score, roc_auc_score

from selfray.data.dataset import RadiographDataset
from selfray.data.phantom import write_phantom

SEX_LIMIT, FINDING_LIMIT = 0.90, 0.85
_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


def thumbnails(dataset: RadiographDataset) -> np.ndarray:
    """Gray values of 16 × 16 thumbnails, standardised on the train split, float64 [N, 256]."""
    small = [
        cv2.resize(dataset.pixels(row), (16, 16), interpolation=cv2.INTER_AREA).reshape(-1)
        for row in range(len(dataset))
    ]
    features = np.array(small, float)
    train = features[dataset.rows("train")]
    return (features - train.mean(0)) / np.maximum(train.std(0), 1e-6)


def _split(dataset: RadiographDataset, target: np.ndarray) -> dict[str, np.ndarray]:
    known = ~np.isnan(target)
    return {
        name: rows[known[rows]]
        for name in ("train", "validate", "test")
        for rows in [dataset.rows(name)]
    }


def auroc(dataset: RadiographDataset, features: np.ndarray, target: np.ndarray) -> float:
    """AUROC on the test split of logistic regression, its strength chosen on validation."""
    rows = _split(dataset, target)
    models = [
        LogisticRegression(C=c, max_iter=2000).fit(features[rows["train"]], target[rows["train"]])
        for c in _STRENGTHS
    ]

    def score(model: LogisticRegression, split: str) -> float:
        chosen = rows[split]
        return float(roc_auc_score(target[chosen], model.decision_function(features[chosen])))

    return score(max(models, key=lambda m: score(m, "validate")), "test")


def r2(dataset: RadiographDataset, features: np.ndarray, target: np.ndarray) -> float:
    """R² on the test split of ridge regression, its strength chosen on validation."""
    rows = _split(dataset, target)
    models = [
        Ridge(alpha=1 / c).fit(features[rows["train"]], target[rows["train"]]) for c in _STRENGTHS
    ]

    def score(model: Ridge, split: str) -> float:
        chosen = rows[split]
        return float(r2_score(target[chosen], model.predict(features[chosen])))

    return score(max(models, key=lambda m: score(m, "validate")), "test")


def measure(dataset: RadiographDataset) -> dict[str, float]:
    """AUROC by finding and `sex`; R² by `age_years` and `bmi`."""
    features = thumbnails(dataset)
    sex = dataset.column("sex")
    female = np.array([np.nan if s is None else float(s == "F") for s in sex])
    result = {"sex": auroc(dataset, features, female)}
    for name in dataset.findings:
        result[name] = auroc(dataset, features, dataset.column(name))
    for name in ("age_years", "bmi"):
        result[name] = r2(dataset, features, dataset.column(name))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", nargs="?", type=Path, help="a phantom; made when absent")
    parser.add_argument("--patients", type=int, default=1500)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dataset = (
            RadiographDataset(given.directory)
            if given.directory
            else write_phantom(
                Path(folder) / "phantom", patients=given.patients, size=given.size, seed=given.seed
            )
        )
        result = measure(dataset)
        labels = dataset.labels()
    counts = dataset.info["counts"]
    print(f"synthetic phantom, {counts['patients']} patients, {counts['images']} images")
    print(f"{'target':20s} {'metric':6s} {'value':>6s}  limit  prevalence")
    for name, value in result.items():
        metric = "R2" if name in ("age_years", "bmi") else "AUROC"
        limit = {"R2": "", "AUROC": f"{FINDING_LIMIT:.2f}"}[metric] if name != "sex" else "0.90"
        share = ""
        if name in dataset.findings:
            share = f"{np.nanmean(labels[:, dataset.findings.index(name)]):.2f}"
        print(f"{name:20s} {metric:6s} {value:6.3f}  {limit:5s}  {share}")


if __name__ == "__main__":
    main()
