"""Encoders x tasks x dataset -> results: what frozen features know, with the uncertainty of it.

Every encoder is judged by the same probes on the same patients. Probes are fitted on the train
split, their penalty (or k) is chosen on the validate split, every number is of the test split.

`results.jsonl` has one line a (encoder, task, target, metric, probe). Target `macro` is the mean
over the findings. A paired difference between two encoders is a line with metric
`auroc_difference` (or `auprc_`, `r2_`) and the other encoder as `reference`; positive when
`encoder` is better. A metric that is not defined has value null and a `reason`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.errors import InputError, nearest
from selfray.evals.knn import NEIGHBOURS, knn_scores
from selfray.evals.linear_probe import (
    REAL_TARGETS,
    ProbeData,
    fit_probes,
    select,
    target_values,
)
from selfray.evals.metrics import auroc_by_column, binary_metrics, real_metrics
from selfray.evals.statistics import (
    PatientResamples,
    binary_resampled,
    interval,
    real_resampled,
    resample,
)
from selfray.feature_directory import Features, is_feature_directory, open_features
from selfray.features import extract_features, require_encoder

FORMAT_NAME = "selfray-evaluation"
TASKS = ("classification", "metadata")

_METADATA = ("sex", *REAL_TARGETS)
_MACRO = "macro"
_COMPARED = {"auroc", "r2"}  # metrics that get paired differences


@dataclass(frozen=True)
class _Split:
    """The images of one split: positions in the dataset, and their targets."""

    rows: np.ndarray
    targets: np.ndarray  # [n, K]


@dataclass(frozen=True)
class _Benchmark:
    """What every encoder is judged on."""

    data: RadiographDataset
    names: tuple[str, ...]  # K targets
    splits: dict[str, _Split]
    image_ids: np.ndarray  # of the test split, as the next
    patients: np.ndarray
    resamples: PatientResamples
    seed: int


@dataclass
class _Judged:
    """One encoder's results.

    `points` and `distributions` are by (target, metric, probe); the latter are over the resamples.
    """

    encoder: str
    manifest: dict[str, Any]
    arrays: str
    predictions: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    points: dict[tuple[str, str, str], float] = field(default_factory=dict)
    distributions: dict[tuple[str, str, str], np.ndarray] = field(default_factory=dict)


def evaluate(
    encoders: Sequence[str],
    data: Path,
    out: Path,
    *,
    tasks: Sequence[str] = TASKS,
    baseline: str | None = None,
    seed: int = 0,
) -> Path:
    """Judge encoders on a dataset's findings and patient records.

    Features are kept under `OUT/features`, so that the same command, interrupted or repeated with
    more encoders, goes on with what is done.

    Args:
        encoders: Names, run directories, Hugging Face directories, `random:ARCH`, `pixels:pca`,
            `pixels:16x16`, or feature directories made from `data`.
        data: Dataset directory with train, validate and test splits.
        out: Evaluation directory.
        tasks: `classification` (the findings) and `metadata` (sex, age, weight, BMI).
        baseline: Compare each encoder with this one only; default: with each other one.
        seed: Of the bootstrap, 0 to 2**32 - 1.

    Returns:
        `out`, with `results.jsonl`, `predictions.parquet` and `evaluation.json`.

    Raises:
        InputError: An empty split, no labels at all, unknown task or baseline, features of another
            dataset, or `out` holds something else.
    """
    encoders = list(dict.fromkeys(encoders))
    _require_valid(encoders, tasks, baseline, seed)
    _require_evaluation_or_empty(out)
    benchmark = _open_benchmark(data, tasks, seed)
    for encoder in encoders:
        _require_usable(encoder, benchmark)
    (out / "features").mkdir(parents=True, exist_ok=True)
    judged = []
    for encoder in encoders:
        directory = _feature_directory(encoder, data, out)
        judged.append(_judge(encoder, open_features(directory), benchmark))
    lines = [line for one in judged for line in _result_lines(one, benchmark)]
    for one in judged:
        for other in judged:
            if other is not one and baseline in (None, other.encoder):
                lines.extend(_difference_lines(one, other, benchmark))
    _write_predictions(out / "predictions.parquet", judged, benchmark)
    command = ["selfray", "evaluate", *encoders, "--data", str(data), "--out", str(out)]
    command += ["--tasks", *tasks, "--seed", str(seed)]
    command += ["--baseline", baseline] if baseline else []
    description = _describe(judged, benchmark, tasks, baseline, shlex.join(command))
    write_atomically(out / "evaluation.json", json.dumps(description, indent=2).encode())
    # Last, because its presence says that the evaluation is complete.
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_atomically(out / "results.jsonl", text.encode())
    return out


def _require_valid(
    encoders: list[str], tasks: Sequence[str], baseline: str | None, seed: int
) -> None:
    if not encoders:
        raise InputError("no encoder was given. Name at least one, e.g. pixels:pca.")
    for encoder in encoders:
        if not encoder.isprintable():
            raise InputError(
                f"encoder {encoder!a} holds a character that cannot be printed. Rename it."
            )
    for task in tasks:
        if task not in TASKS:
            raise InputError(f"task {task!r} is unknown. {nearest(task, TASKS)}")
    if not tasks:
        raise InputError(f"no task was given. Allowed: {', '.join(TASKS)}.")
    if baseline is not None and baseline not in encoders:
        raise InputError(
            f"baseline {baseline!r} is none of the encoders. {nearest(baseline, encoders)}"
        )
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}. Allowed: 0 to {2**32 - 1}.")


def _require_evaluation_or_empty(out: Path) -> None:
    ours = (out / "evaluation.json").is_file() or (out / "features").is_dir()
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not ours)):
        raise InputError(
            f"{out} exists and holds no evaluation. Give a new directory, or remove it."
        )


def _open_benchmark(data: Path, tasks: Sequence[str], seed: int) -> _Benchmark:
    dataset = RadiographDataset(data)
    names: list[str] = []
    if "classification" in tasks:
        names += dataset.findings
    if "metadata" in tasks:
        names += _METADATA
    values = target_values(dataset.column, names) if names else np.empty((len(dataset), 0))
    labelled = [bool((~np.isnan(column)).any()) for column in values.T]
    if not any(labelled):
        raise InputError(
            f"{data} has no label for {' or '.join(tasks)}, so there is nothing to judge by. "
            "Ingest it with --table, or choose other tasks."
        )
    # A record that no image has is not part of this dataset; a finding that the dataset names but
    # never labels is reported as not defined.
    kept = [k for k, name in enumerate(names) if labelled[k] or name in dataset.findings]
    splits = {}
    for split in ("train", "validate", "test"):
        rows = dataset.rows(split)
        if not len(rows):
            raise InputError(
                f"{data} has no images in its {split} split; probes are fitted on train, chosen "
                "on validate and scored on test. Ingest it with all three."
            )
        splits[split] = _Split(rows, values[rows][:, kept])
    test = splits["test"].rows
    patients = dataset.column("patient_id")[test].astype(str)
    return _Benchmark(
        data=dataset,
        names=tuple(names[k] for k in kept),
        splits=splits,
        image_ids=dataset.column("image_id")[test],
        patients=patients,
        resamples=PatientResamples(patients, seed=seed),
        seed=seed,
    )


def _require_usable(encoder: str, benchmark: _Benchmark) -> None:
    """Refuse a wrong name now, and not when the encoders before it have taken their hours."""
    if not is_feature_directory(Path(encoder)):
        require_encoder(encoder, benchmark.data)
        return
    manifest = open_features(Path(encoder)).manifest
    if manifest.get("left_out"):
        raise InputError(
            f"{encoder} leaves out {manifest['left_out']} images of the dataset, which do not "
            "decode. Make the dataset anew."
        )
    found = manifest["dataset"]["fingerprint"]
    if found != benchmark.data.fingerprint:
        raise InputError(
            f"{encoder} holds features of another dataset (fingerprint {found[:12]}, the data's is "
            f"{benchmark.data.fingerprint[:12]}). Extract them again from the data."
        )


def _feature_directory(encoder: str, data: Path, out: Path) -> Path:
    """Where the encoder's features are, made now if need be."""
    if is_feature_directory(Path(encoder)):
        return Path(encoder)
    readable = re.sub(r"[^A-Za-z0-9]+", "-", encoder).strip("-")[-60:]
    slug = f"{readable}-{hashlib.sha256(encoder.encode()).hexdigest()[:8]}"
    return extract_features(encoder, data, out / "features" / slug)


def _judge(encoder: str, features: Features, benchmark: _Benchmark) -> _Judged:
    arrays = "cls" if features.patch_mean is None else "cls+patch_mean"
    judged = _Judged(encoder, features.manifest, arrays)
    print(f"evaluate {encoder}: probes on {len(benchmark.names)} targets", file=sys.stderr)
    _probe_linearly(judged, features, benchmark)
    _probe_neighbours(judged, features, benchmark)
    test = benchmark.splits["test"].targets
    for (target, probe), predictions in judged.predictions.items():
        known = test[:, benchmark.names.index(target)]
        real = target in REAL_TARGETS
        points = (real_metrics if real else binary_metrics)(known, predictions)
        resampled = real_resampled if real else binary_resampled
        distributions = resample(resampled, known, predictions, benchmark.resamples)
        for metric, value in points.items():
            if probe == "linear" or metric == "auroc":
                judged.points[target, metric, probe] = value
                judged.distributions[target, metric, probe] = distributions[metric]
    _add_macro(judged, benchmark)
    return judged


def _probe_linearly(judged: _Judged, features: Features, benchmark: _Benchmark) -> None:
    arrays = [a for a in (features.cls, features.patch_mean) if a is not None]
    data = {
        name: ProbeData(
            np.concatenate([a[split.rows] for a in arrays], axis=1),
            split.targets,
            benchmark.names,
        )
        for name, split in benchmark.splits.items()
    }
    probes = fit_probes(data["train"], data["validate"])
    judged.reasons.update(probes.undefined)
    for target, values in probes.predict(data["test"].features).items():
        judged.predictions[target, "linear"] = values


def _probe_neighbours(judged: _Judged, features: Features, benchmark: _Benchmark) -> None:
    """k-NN on CLS tokens, as published; k by AUROC on the validate split."""
    binary = [k for k, name in enumerate(benchmark.names) if name not in REAL_TARGETS]
    if not binary:
        return
    train, validate, test = (benchmark.splits[s] for s in ("train", "validate", "test"))
    queries = features.cls[np.concatenate([validate.rows, test.rows])]
    scores = knn_scores(features.cls[train.rows], train.targets[:, binary], queries)
    on_validate = np.stack(
        [
            auroc_by_column(validate.targets[:, binary], scores[k][: len(validate.rows)])
            for k in NEIGHBOURS
        ]
    )
    for t, best in enumerate(select(on_validate, NEIGHBOURS)):
        target = benchmark.names[binary[t]]
        if target not in judged.reasons:
            chosen = scores[NEIGHBOURS[best]][len(validate.rows) :, t]
            judged.predictions[target, "knn"] = chosen


def _add_macro(judged: _Judged, benchmark: _Benchmark) -> None:
    """The mean over the findings that are defined.

    A resample that lacks a class of a rare finding takes that finding's point, so that the mean
    does not jump because a finding that is easy or hard dropped out, and stays within 0 to 1.
    """
    for probe, metrics in (("linear", ("auroc", "auprc")), ("knn", ("auroc",))):
        for metric in metrics:
            keys = [
                (finding, metric, probe)
                for finding in benchmark.data.findings
                if not math.isnan(judged.points.get((finding, metric, probe), math.nan))
            ]
            if keys:
                key = (_MACRO, metric, probe)
                points = np.array([judged.points[k] for k in keys])
                values = np.stack([judged.distributions[k] for k in keys], axis=1)  # [R, F]
                defined = ~np.isnan(values)
                means = np.where(defined, values, points).mean(axis=1)
                judged.points[key] = float(points.mean())
                judged.distributions[key] = np.where(defined.any(axis=1), means, np.nan)


def _line(
    judged: _Judged, target: str, metric: str, probe: str, benchmark: _Benchmark
) -> dict[str, Any]:
    """The fields that every line has."""
    findings = [k for k, n in enumerate(benchmark.names) if n in benchmark.data.findings]
    columns = findings if target == _MACRO else [benchmark.names.index(target)]
    test = benchmark.splits["test"].targets[:, columns]
    known = ~np.isnan(test).all(axis=1)
    line: dict[str, Any] = {
        "encoder": judged.encoder,
        "task": "metadata" if target in _METADATA else "classification",
        "target": target,
        "metric": metric,
        "value": None,
        "ci_low": None,
        "ci_high": None,
        "n": int(known.sum()),
        "n_patients": len(set(benchmark.patients[known])),
        "split": "test",
        "seed": benchmark.seed,
        "features": judged.arrays if probe == "linear" else "cls",
        "probe": probe,
    }
    if target != _MACRO and target not in REAL_TARGETS and known.any():
        line["prevalence"] = float(np.nanmean(test))
    return line


def _enough_patients(judged: _Judged, target: str, benchmark: _Benchmark) -> bool:
    """Whether resamples of the patients say anything about the spread of a number.

    One patient is the same wherever it is drawn, so that the interval would have next to no width,
    which is not certainty. Needed are two patients of each class; of a real-valued target, two in
    all; of the macro, one finding that has them.
    """
    if target == _MACRO:
        defined = {name for name, _ in judged.predictions} & set(benchmark.data.findings)
        return any(_enough_patients(judged, finding, benchmark) for finding in defined)
    known = benchmark.splits["test"].targets[:, benchmark.names.index(target)]
    real = target in REAL_TARGETS
    groups = [~np.isnan(known)] if real else [known == 0, known == 1]
    return all(len(set(benchmark.patients[group])) > 1 for group in groups)


def _set_value(line: dict[str, Any], value: float, distribution: np.ndarray, enough: bool) -> None:
    bounds = interval(distribution)
    numbers = {"value": value}
    if enough:
        numbers |= {"ci_low": bounds.low, "ci_high": bounds.high}
    line |= {name: None if math.isnan(number) else number for name, number in numbers.items()}
    line["resamples_left_out"] = bounds.left_out


def _result_lines(judged: _Judged, benchmark: _Benchmark) -> list[dict[str, Any]]:
    lines = []
    for (target, metric, probe), value in judged.points.items():
        line = _line(judged, target, metric, probe, benchmark)
        enough = _enough_patients(judged, target, benchmark)
        _set_value(line, value, judged.distributions[target, metric, probe], enough)
        if math.isnan(value):
            lacking = "a second value" if target in REAL_TARGETS else "both classes"
            line["reason"] = f"the test split lacks {lacking}"
        lines.append(line)
    for target, reason in judged.reasons.items():
        metric = "r2" if target in REAL_TARGETS else "auroc"
        lines.append(_line(judged, target, metric, "linear", benchmark) | {"reason": reason})
    return lines


def _difference_lines(
    judged: _Judged, other: _Judged, benchmark: _Benchmark
) -> list[dict[str, Any]]:
    lines = []
    for (target, metric, probe), value in judged.points.items():
        if probe != "linear" or metric not in _COMPARED or math.isnan(value):
            continue
        key = (target, metric, probe)
        line = _line(judged, target, f"{metric}_difference", probe, benchmark)
        difference = judged.distributions[key] - other.distributions[key]
        enough = _enough_patients(judged, target, benchmark)
        _set_value(line, value - other.points[key], difference, enough)
        lines.append(line | {"reference": other.encoder})
    return lines


def _write_predictions(path: Path, judged: list[_Judged], benchmark: _Benchmark) -> None:
    """Every test prediction, so that every number can be recomputed without the encoder."""
    test = benchmark.splits["test"].targets
    tables = []
    for one in judged:
        for (target, probe), predictions in one.predictions.items():
            n = len(predictions)
            columns = {
                "image_id": pa.array(benchmark.image_ids, pa.string()),
                "patient_id": pa.array(benchmark.patients, pa.string()),
                "encoder": pa.array([one.encoder] * n, pa.string()),
                "probe": pa.array([probe] * n, pa.string()),
                "target": pa.array([target] * n, pa.string()),
                "label": pa.array(test[:, benchmark.names.index(target)], from_pandas=True),
                "prediction": pa.array(predictions, pa.float64()),
            }
            tables.append(pa.table(columns))
    if tables:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(tables), buffer)
        write_atomically(path, buffer.getvalue().to_pybytes())


def _describe(
    judged: list[_Judged],
    benchmark: _Benchmark,
    tasks: Sequence[str],
    baseline: str | None,
    command: str,
) -> dict[str, Any]:
    info = benchmark.data.info
    described = ("weights_sha256", "synthetic", "preprocessing", "precision")
    return {
        "format": FORMAT_NAME,
        "version": 1,
        "command": command,
        "dataset": {
            name: info[name] for name in ("name", "origin", "fingerprint", "synthetic", "counts")
        },
        "data": str(benchmark.data.directory),
        "findings": [n for n in benchmark.names if n in benchmark.data.findings],
        "encoders": [
            {"name": one.encoder, "features": one.arrays}
            | {name: one.manifest[name] for name in described}
            for one in judged
        ],
        "tasks": list(tasks),
        "baseline": baseline,
        "seed": benchmark.seed,
        "resamples": len(benchmark.resamples.multiplicity),
        "versions": {
            package: version(package) for package in ("selfray", "torch", "numpy", "scikit-learn")
        },
    }


_TABLE = (
    ("macro-AUROC", _MACRO, "auroc"),
    ("sex AUROC", "sex", "auroc"),
    ("age R²", "age_years", "r2"),
    ("weight R²", "weight_kg", "r2"),
    ("BMI R²", "bmi", "r2"),
)


def results_table(out: Path) -> str:
    """The main numbers of an evaluation as text for a terminal.

    Args:
        out: Evaluation directory.

    Returns:
        Linear probes, 95 % intervals in brackets: one line an encoder; then one line for each
        encoder that the first was compared with, the first minus the other, paired by patient.

    Raises:
        InputError: Not an evaluation directory.
    """
    try:
        lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as cause:
        raise InputError(
            f"{out} holds no results.jsonl. Make one with `selfray evaluate`."
        ) from cause
    linear = [line for line in lines if line["probe"] == "linear"]
    by_key = {
        (line["encoder"], line.get("reference"), line["target"], line["metric"]): line
        for line in linear
    }
    encoders = list(dict.fromkeys(line["encoder"] for line in linear))
    columns = [c for c in _TABLE if any((e, None, *c[1:]) in by_key for e in encoders)]
    compared = dict.fromkeys(
        reference for encoder, reference, *_ in by_key if encoder in encoders[:1]
    )
    pairs = [(encoder, None) for encoder in encoders]
    pairs += [(encoders[0], reference) for reference in compared if reference]
    table = [["encoder", *(title for title, _, _ in columns)]]
    for encoder, reference in pairs:
        suffix, sign = ("_difference", "+") if reference else ("", "")
        keys = [(encoder, reference, target, metric + suffix) for _, target, metric in columns]
        name = f"{encoder} minus {reference}" if reference else encoder
        table.append([name, *(_cell(by_key.get(key), sign) for key in keys)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _cell(line: dict[str, Any] | None, sign: str = "") -> str:
    if line is None or line["value"] is None:
        return "not defined"
    numbers = [line["value"], line["ci_low"], line["ci_high"]]
    value, *ends = [format(number, f"{sign}.3f") for number in numbers if number is not None]
    return f"{value} [{', '.join(ends)}]" if ends else value
