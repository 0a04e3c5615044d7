"""What a summary is written from: run and evaluation directories, read with tolerance.

A run may still be in progress, a file may be cut short, a field may be missing: what is there is
shown. Only a directory with nothing to show is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from selfray.errors import InputError
from selfray.summary.predictions import Predicted, read_predictions

POINTS = 500
"""A curve has at most so many points, and at least half as many where there are more steps."""

_NUMBERS = (
    "value", "ci_low", "ci_high", "prevalence", "n", "n_patients", "n_positive", "probe_seeds",
    "p_value", "p_holm", "probability_best",
)  # fmt: skip
_OF_A_PART = ("trained_on", "subgroup", "grouped_by")
"""Fields of lines that are not of the whole train split and all test images."""


_Key = tuple[str, str, str, str]  # encoder, target, metric, probe


class Curve:
    """The course of one number over the steps, in a bounded number of bins.

    Bins hold mean, least and greatest value, so that thinning hides no spike. When they are full,
    neighbours are joined and each takes twice as many values from then on.
    """

    def __init__(self) -> None:
        self._bins: list[list[float]] = []  # count, sum of steps, sum, least, greatest
        self._width = 1

    def add(self, step: float, value: float) -> None:
        """Add a value; steps come in ascending order."""
        if self._bins and self._bins[-1][0] < self._width:
            last = self._bins[-1]
            last[0] += 1
            last[1] += step
            last[2] += value
            last[3] = min(last[3], value)
            last[4] = max(last[4], value)
            return
        if len(self._bins) == POINTS:
            pairs = zip(self._bins[::2], self._bins[1::2], strict=True)
            self._bins = [
                [a[0] + b[0], a[1] + b[1], a[2] + b[2], min(a[3], b[3]), max(a[4], b[4])]
                for a, b in pairs
            ]
            self._width *= 2
        self._bins.append([1, step, value, value, value])

    def __len__(self) -> int:
        return len(self._bins)

    @property
    def thinned(self) -> bool:
        """Whether a point stands for more than one value."""
        return self._width > 1

    @property
    def steps(self) -> list[float]:
        """Mean step of each bin."""
        return [b[1] / b[0] for b in self._bins]

    @property
    def means(self) -> list[float]:
        """Mean value of each bin."""
        return [b[2] / b[0] for b in self._bins]

    @property
    def least(self) -> list[float]:
        """Least value of each bin."""
        return [b[3] for b in self._bins]

    @property
    def greatest(self) -> list[float]:
        """Greatest value of each bin."""
        return [b[4] for b in self._bins]


@dataclass
class Run:
    """A run directory.

    Attributes:
        path: Where it is.
        config: `config.json`, empty where it cannot be read.
        environment: `environment.json`, likewise.
        card: What the encoder's `selfray.json` says, likewise.
        done: What `DONE` says, or None while the run is in progress.
        step: The last step recorded.
        curves: By metric.
        probes: Probe records, by step; the last one of a step counts.
        seconds: Time spent in steps, as far as recorded.
        images_per_second: Over these steps, or None.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    card: dict[str, Any]
    done: str | None
    step: int = 0
    curves: dict[str, Curve] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    images_per_second: float | None = None

    @property
    def best(self) -> dict[str, Any] | None:
        """The probe with the highest macro-AUROC; the first of equals."""
        judged = [p for p in self.probes if number(p.get("macro_auroc")) is not None]
        return max(judged, key=lambda p: p["macro_auroc"], default=None)

    @property
    def start(self) -> dict[str, Any] | None:
        """The probe before the first step."""
        judged = (p for p in self.probes if number(p.get("macro_auroc")) is not None)
        return next((p for p in judged if p["step"] == 0), None)

    @property
    def data(self) -> list[str]:
        """The dataset directories that the config names."""
        named = self.config.get("data")
        return [p for p in named if isinstance(p, str)] if isinstance(named, list) else []


@dataclass(frozen=True)
class Evaluation:
    """An evaluation directory.

    Attributes:
        path: Where it is.
        info: `evaluation.json`, empty where it cannot be read.
        results: Lines of `results.jsonl` that are no comparison.
        differences: Lines that compare an encoder with a `reference`.
        reports: Lines of either kind that are of generated reports; in neither of the others.
    """

    path: Path
    info: dict[str, Any]
    results: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    reports: list[dict[str, Any]]

    @property
    def encoders(self) -> list[str]:
        """Names, in the order of the command."""
        return list(dict.fromkeys(line["encoder"] for line in (*self.results, *self.reports)))

    @property
    def findings(self) -> list[str]:
        """Names of the findings that were judged."""
        named = self.info.get("findings")
        return [f for f in named if isinstance(f, str)] if isinstance(named, list) else []

    @property
    def dataset(self) -> dict[str, Any]:
        """What `evaluation.json` says of the data."""
        described = self.info.get("dataset")
        return described if isinstance(described, dict) else {}

    @cached_property
    def whole(self) -> list[dict[str, Any]]:
        """Those of `results` that are of the whole train split and all test images."""
        return [line for line in self.results if _is_whole(line)]

    @property
    def probes(self) -> list[str]:
        """Protocols of the whole train split, the linear one first."""
        found = dict.fromkeys(key[3] for key in self._whole)
        return sorted(found, key=lambda probe: probe != "linear")

    @property
    def leaks(self) -> list[dict[str, Any]] | None:
        """What was found of the test images in training; None where nobody looked."""
        found = self.info.get("leaks")
        return (
            [leak for leak in found if isinstance(leak, dict)] if isinstance(found, list) else None
        )

    def main_probe(self, target: str, metric: str) -> str:
        """The protocol that a number is shown of where one is: linear, or the first that has it."""
        return self._main_probes.get((target, metric), "linear")

    def result(
        self, encoder: str, target: str, metric: str, probe: str | None = None
    ) -> dict[str, Any] | None:
        """The line of one number of the whole train split and all test images, or None.

        Args:
            encoder: Its name.
            target: Its name, `macro` for the mean over the findings.
            metric: Its name.
            probe: The protocol; None: the main one.
        """
        return self._whole.get((encoder, target, metric, probe or self.main_probe(target, metric)))

    def difference(
        self, encoder: str, reference: str, target: str, metric: str, probe: str | None = None
    ) -> dict[str, Any] | None:
        """The line of one paired comparison, or None where it is not defined."""
        probe = probe or self.main_probe(target, metric)
        return self._compared.get((encoder, target, f"{metric}_difference", probe, reference))

    def predictions(self, encoder: str, target: str, metric: str) -> Predicted | None:
        """Labels and predictions of the probe that `result` shows, where they were kept."""
        return self._predictions.get((encoder, target, self.main_probe(target, metric)))

    @cached_property
    def _predictions(self) -> dict[tuple[str, str, str], Predicted]:
        return read_predictions(self.path)

    @cached_property
    def _whole(self) -> dict[_Key, dict[str, Any]]:
        found: dict[_Key, dict[str, Any]] = {}
        for line in self.whole:
            found.setdefault(_key(line), line)
        return found

    @cached_property
    def _compared(self) -> dict[tuple[str, str, str, str, str], dict[str, Any]]:
        found: dict[tuple[str, str, str, str, str], dict[str, Any]] = {}
        for line in self.differences:
            if _is_whole(line) and _bounded(line):
                found.setdefault((*_key(line), line["reference"]), line)
        return found

    @cached_property
    def _main_probes(self) -> dict[tuple[str, str], str]:
        found: dict[tuple[str, str], str] = {}
        for line in self.whole:
            _, target, metric, probe = _key(line)
            if probe == "linear" or (target, metric) not in found:
                found[target, metric] = probe
        return found


@dataclass(frozen=True)
class Inputs:
    """All that was found in a directory, which the page is written into."""

    directory: Path
    runs: list[Run]
    evaluations: list[Evaluation]


def number(value: Any) -> float | None:
    """A finite number as it is; anything else is None."""
    ordinary = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if ordinary and math.isfinite(value) else None


def find_inputs(directory: Path) -> Inputs:
    """Find and read what a summary can show.

    Args:
        directory: A run, an evaluation, or a directory that holds such at most two levels down.

    Raises:
        InputError: There is none.
    """
    if not directory.is_dir():
        raise InputError(
            f"{directory} is not a directory. Give one made by `selfray pretrain` or "
            "`selfray evaluate`."
        )
    found = list(_walk(directory, levels=2))
    evaluations = [read_evaluation(path) for path in found if _is_evaluation(path)]
    runs = [path for path in found if _is_run(path)]
    judged = [Path(name) for e in evaluations for name in e.encoders]
    runs += [path for path in judged if _is_run(path)]
    if not found:
        raise InputError(
            f"{directory} holds neither a run (config.json, metrics.jsonl) nor an evaluation "
            "(results.jsonl), itself or two levels down. Make one with `selfray pretrain` or "
            "`selfray evaluate`."
        )
    distinct = {path.resolve(): path for path in reversed(runs)}
    shown = [read_run(path) for path in reversed(distinct.values())]
    return Inputs(directory, shown, evaluations)


def read_run(path: Path) -> Run:
    """Read a run directory; a line that is no record is passed over."""
    done = path / "DONE"
    run = Run(
        path,
        _read_object(path / "config.json"),
        _read_object(path / "environment.json"),
        _read_object(path / "encoder" / "selfray.json"),
        done.read_text(errors="replace").strip() if done.is_file() else None,
    )
    batch_size = number(run.config.get("batch_size"))
    probes: dict[float, dict[str, Any]] = {}
    images = 0.0
    for record in _records(path / "metrics.jsonl"):
        step = number(record.get("step"))
        if step is None:
            continue
        run.step = max(run.step, int(step))
        if record.get("kind") == "probe":
            probes[step] = record
            continue
        speed = number(record.get("images_per_second"))
        if speed and batch_size and speed > 0:
            run.seconds += batch_size / speed
            images += batch_size
        for name, value in record.items():
            if name != "step" and (known := number(value)) is not None:
                run.curves.setdefault(name, Curve()).add(step, known)
    run.probes = [probes[step] for step in sorted(probes)]
    run.images_per_second = images / run.seconds if run.seconds else None
    return run


def read_evaluation(path: Path) -> Evaluation:
    """Read an evaluation directory; a line without encoder, target and metric is passed over.

    Every line has the fields of `_NUMBERS`, each a finite number or None, and a `probe`.
    """
    results, differences, reports = [], [], []
    for line in _records(path / "results.jsonl"):
        if not all(isinstance(line.get(name), str) for name in ("encoder", "target", "metric")):
            continue
        line |= {name: number(line.get(name)) for name in _NUMBERS}
        line["probe"] = line["probe"] if isinstance(line.get("probe"), str) else "linear"
        if line.get("task") == "reports":
            reports.append(line)
        elif isinstance(line.get("reference"), str):
            differences.append(line)
        else:
            results.append(line)
    return Evaluation(path, _read_object(path / "evaluation.json"), results, differences, reports)


def _key(line: dict[str, Any]) -> _Key:
    return line["encoder"], line["target"], line["metric"], line["probe"]


def _is_whole(line: dict[str, Any]) -> bool:
    return not any(line.get(name) for name in _OF_A_PART)


def _bounded(line: dict[str, Any]) -> bool:
    return all(line[name] is not None for name in ("value", "ci_low", "ci_high"))


def _is_run(path: Path) -> bool:
    recorded = (path / "metrics.jsonl").is_file() or (path / "environment.json").is_file()
    return recorded and (path / "config.json").is_file()


def _is_evaluation(path: Path) -> bool:
    return (path / "results.jsonl").is_file()


def _walk(directory: Path, levels: int) -> Iterator[Path]:
    """Runs and evaluations; what is below one of them belongs to it."""
    if _is_run(directory) or _is_evaluation(directory):
        yield directory
    elif levels:
        for child in sorted(directory.iterdir()):
            if child.is_dir() and not child.name.startswith("."):
                yield from _walk(child, levels - 1)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file of lines, one at a time: the file may have a million."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record
