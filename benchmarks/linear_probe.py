"""Our batched logistic probes against scikit-learn's, at equal loss.

    python benchmarks/linear_probe.py

15 penalties x 9 findings x 3,000 images x 384 features, all on one thread, taken in turn within one
process, three times. scikit-learn makes one fit a (finding, penalty); its default tolerance stops
far from the optimum at the weakest penalties, where features nearly separate the rare findings, so
that equal loss needs a smaller one. Prints CPU seconds, the worst relative distance to the best
loss that any of them found, and the ratio of the medians.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from selfray.evals.linear_probe import STRENGTHS, fit_logistic

ROWS, FEATURES, REPEATS = 3000, 384, 3
RATES = (0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.4)

Coefficients = tuple[np.ndarray, np.ndarray]  # weights [S, T, D], biases [S, T]


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Correlated standardised features, findings that depend on them, a twentieth null."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, FEATURES + 1) ** -0.5  # a power law, as in encoders' features
    rotation = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0]
    x = (rng.normal(size=(ROWS, FEATURES)) * spectrum) @ rotation
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    signal = x @ rng.normal(size=(FEATURES, len(RATES))) * 0.1
    score = signal + rng.logistic(size=(ROWS, 1))
    thresholds = np.sort(score, axis=0)[[int(ROWS * (1 - r)) for r in RATES], range(len(RATES))]
    y = (score > thresholds).astype(float)
    y[rng.random(y.shape) < 0.05] = np.nan
    return x, y


def ours(x: np.ndarray, y: np.ndarray) -> Coefficients:
    probe = fit_logistic(x, y, STRENGTHS)
    return probe.weights.numpy(), probe.biases.numpy()


def scikit_learn(tolerance: float) -> Callable[[np.ndarray, np.ndarray], Coefficients]:
    def fit(x: np.ndarray, y: np.ndarray) -> Coefficients:
        weights = np.empty((len(STRENGTHS), y.shape[1], x.shape[1]))
        biases = np.empty(weights.shape[:2])
        for t, column in enumerate(y.T):
            known = ~np.isnan(column)
            for s, strength in enumerate(STRENGTHS):
                model = LogisticRegression(C=1 / strength, tol=tolerance, max_iter=10_000)
                model.fit(x[known], column[known])
                weights[s, t], biases[s, t] = model.coef_[0], np.ravel(model.intercept_)[0]
        return weights, biases

    return fit


def losses(x: np.ndarray, y: np.ndarray, coefficients: Coefficients) -> np.ndarray:
    """The objective of each problem, [S, T]."""
    weights, biases = coefficients
    z = np.einsum("nd,std->nst", x, weights, optimize=True) + biases
    log_loss = np.where(np.isnan(y)[:, None], 0, np.logaddexp(0, z) - np.nan_to_num(y)[:, None] * z)
    return log_loss.sum(axis=0) + np.array(STRENGTHS)[:, None] / 2 * (weights**2).sum(axis=-1)


def main() -> None:
    torch.set_num_threads(1)
    x, y = problem()
    contestants = {
        "selfray": ours,
        "scikit-learn lbfgs, its default tol 1e-4": scikit_learn(1e-4),
        "scikit-learn lbfgs, tol 1e-6": scikit_learn(1e-6),
        "scikit-learn lbfgs, tol 1e-7": scikit_learn(1e-7),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    found: dict[str, np.ndarray] = {}
    with threadpool_limits(1):
        for _ in range(REPEATS):
            for name, fit in contestants.items():
                began = time.process_time()
                coefficients = fit(x, y)
                seconds[name].append(time.process_time() - began)
                found[name] = losses(x, y, coefficients)
    best = np.min(list(found.values()), axis=0)
    for name in contestants:
        record = {
            "what": name,
            "cpu_seconds": round(float(np.median(seconds[name])), 3),
            "all_cpu_seconds": [round(s, 3) for s in seconds[name]],
            "worst_relative_loss": float(f"{((found[name] - best) / best).max():.1e}"),
            "times_selfray": round(
                float(np.median(seconds[name]) / np.median(seconds["selfray"])), 1
            ),
        }
        print(json.dumps(record))
    print(f"scikit-learn {sklearn.__version__}, torch {torch.__version__}, {platform.processor()}")


if __name__ == "__main__":
    main()
