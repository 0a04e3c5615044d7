"""Our batched logistic probes against scikit-learn's, at equal loss; and on features on disk.

    python benchmarks/linear_probe.py speed
    python benchmarks/linear_probe.py disk --rows 1000000 --folder FOLDER

`speed`: 45 penalties x 14 findings x 50,000 images x 768 features on two threads. scikit-learn
makes one fit a (finding, penalty), and all 630 would take an hour, so that some spread ones are
measured, in turn with three repeats of ours, and scaled up by the number of cells. For each cell
scikit-learn is given the loosest of its tolerances that comes within 1e-6 of the best loss found,
and only that fit's time counts. Prints CPU seconds (all threads together), which other work on the
machine changes less than the clock, and wall seconds.

`disk`: writes features to a file, fits a few penalties from there, and prints the peak of the
memory that is not the file's (RssAnon of Linux). The file is deleted.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch
from sklearn.linear_model import LogisticRegression

from selfray.evals.feature_rows import FeatureRows
from selfray.evals.linear_probe import ProbeData, fit_logistic, fit_probes

ROWS, FEATURES, REPEATS, THREADS = 50_000, 768, 3, 2
RATES = (0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)
STRENGTHS = np.logspace(-2, 5, 45)
CELLS = ((2, 10), (13, 1), (22, 4), (22, 12), (31, 7), (42, 10))  # positions (strength, finding)
TOLERANCES = (1e-5, 1e-6, 1e-7, 1e-8)
EQUAL = 1e-6  # of the loss


def problem() -> tuple[np.ndarray, np.ndarray]:
    """Correlated standardised features, findings that depend on them, a twentieth null."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, FEATURES + 1, dtype=np.float32) ** -0.5  # a power law, as encoders'
    rotation = np.linalg.qr(rng.normal(size=(FEATURES, FEATURES)))[0].astype(np.float32)
    x = (rng.standard_normal((ROWS, FEATURES), dtype=np.float32) * spectrum) @ rotation
    x = ((x - x.mean(axis=0)) / x.std(axis=0)).astype(np.float64)
    score = x @ rng.normal(size=(FEATURES, len(RATES))) * 0.1 + rng.logistic(size=(ROWS, 1))
    y = (score > np.quantile(score, [1 - r for r in RATES], axis=0).diagonal()).astype(float)
    y[rng.random(y.shape) < 0.05] = np.nan
    return x, y


def timed(fit: Callable[[], Any]) -> tuple[Any, float, float]:
    """The result, CPU seconds of all threads, wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = fit()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def loss(x: np.ndarray, y: np.ndarray, strength: float, w: np.ndarray, b: float) -> float:
    z = x @ w + b
    return float((np.logaddexp(0, z) - y * z).sum() + strength / 2 * (w @ w))


def scikit_learn(
    x: np.ndarray, y: np.ndarray, strength: float, solver: str, ours: float
) -> dict[str, Any]:
    """The fit with the loosest tolerance that is as good as ours."""
    record: dict[str, Any] = {}
    for tolerance in TOLERANCES:
        model = LogisticRegression(C=1 / strength, tol=tolerance, max_iter=20_000, solver=solver)
        _, cpu, wall = timed(lambda model=model: model.fit(x, y))
        found = loss(x, y, strength, model.coef_[0], float(np.ravel(model.intercept_)[0]))
        record = {
            "solver": solver,
            "tol": tolerance,
            "cpu_seconds": round(cpu, 2),
            "wall_seconds": round(wall, 2),
            "loss_above_ours": float(f"{found / ours - 1:.1e}"),
        }
        if found <= ours * (1 + EQUAL):
            break
    return record


def speed() -> None:
    x, y = problem()
    ours: list[tuple[float, float]] = []
    theirs: list[dict[str, Any]] = []
    for k, (s, t) in enumerate(CELLS):
        if k % (len(CELLS) // REPEATS) == 0:
            probe, cpu, wall = timed(lambda: fit_logistic(x, y, STRENGTHS.tolist()))
            ours.append((cpu, wall))
            print(json.dumps({"selfray, all cells": {"cpu": cpu, "wall": wall}}), flush=True)
        known = ~np.isnan(y[:, t])
        cell = x[known], y[known, t], STRENGTHS[s]
        reached = loss(*cell, probe.weights[s, t].numpy(), float(probe.biases[s, t]))
        fits = [scikit_learn(*cell, solver, reached) for solver in ("lbfgs", "newton-cholesky")]
        for fit in fits:
            print(json.dumps({"strength": STRENGTHS[s], "rate": RATES[t], **fit}), flush=True)
        theirs.append(min(fits, key=lambda fit: fit["cpu_seconds"]))
    cells = len(STRENGTHS) * len(RATES)
    summary: dict[str, Any] = {"scikit-learn": f"{len(CELLS)} of {cells} cells, scaled up"}
    for which, key in enumerate(("cpu_seconds", "wall_seconds")):
        scaled = float(np.mean([fit[key] for fit in theirs])) * cells
        each = sorted(pair[which] for pair in ours)
        summary[key] = {
            "selfray": [round(value, 1) for value in each],
            "scikit-learn": round(scaled),
            "ratio": [round(scaled / value) for value in reversed(each)],
        }
    summary["worst_loss_of_scikit_learn_above_ours"] = max(f["loss_above_ours"] for f in theirs)
    summary["worst_loss_of_ours_above_scikit_learn"] = max(-f["loss_above_ours"] for f in theirs)
    print(json.dumps(summary))


class AnonymousMemory(threading.Thread):
    """Watches the memory of this process that belongs to no file."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.05):
            self.peak = max(self.peak, self.now())

    def now(self) -> int:
        """MiB."""
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024

    def end(self) -> None:
        self._ended.set()
        self.join()


def disk(rows: int, folder: Path) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((32, FEATURES), dtype=np.float32)
    effect = rng.normal(size=(FEATURES, len(RATES))).astype(np.float32) * 0.03
    labels = np.empty((rows, len(RATES)))
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "features.npy"
        shape = (rows, FEATURES)
        written = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        for first in range(0, rows, 10_000):
            n = min(10_000, rows - first)
            x = rng.standard_normal((n, 32), dtype=np.float32) @ mixing
            x += rng.standard_normal((n, FEATURES), dtype=np.float32)
            written[first : first + n] = x
            score = x @ effect + rng.logistic(size=(n, 1)) - np.log(1 / np.array(RATES) - 1)
            labels[first : first + n] = np.where(rng.random(score.shape) < 0.05, np.nan, score > 0)
        del written
        features = np.load(path, mmap_mode="r")
        cut = rows * 9 // 10
        names = tuple(f"finding {k}" for k in range(len(RATES)))
        train, validate = (
            ProbeData(FeatureRows([features], where), labels[where], names)
            for where in (np.arange(cut), np.arange(cut, rows))
        )
        watch = AnonymousMemory()
        before = watch.now()
        watch.start()
        strengths = (1.0, 10.0, 100.0, 1000.0, 10_000.0)
        probes, cpu, wall = timed(lambda: fit_probes(train, validate, strengths))
        watch.end()
        record = {
            "rows": rows,
            "features_gib": round(path.stat().st_size / 2**30, 2),
            "problems": len(strengths) * len(RATES),
            "anonymous_mib_before": before,
            "anonymous_mib_peak": watch.peak,
            "cpu_seconds": round(cpu, 1),
            "wall_seconds": round(wall, 1),
            "undefined": len(probes.undefined),
        }
        print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="speed", choices=["speed", "disk"])
    parser.add_argument("--rows", type=int, default=1_000_000, help="images on disk")
    parser.add_argument("--folder", type=Path, help="where the file is written for a while")
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.part == "speed":
        speed()
    else:
        disk(arguments.rows, arguments.folder)
    versions = f"scikit-learn {sklearn.__version__}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
