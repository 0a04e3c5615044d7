"""The run directory: config, environment, metrics, the best checkpoint's mark, DONE."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

import selfray
from selfray.checkpoint import NO_ROOM, list_checkpoints
from selfray.config import RunConfig, differences, from_json, to_json
from selfray.data.dataset import write_atomically
from selfray.errors import InputError, nearest

RESUME = ("auto", "must", "never")


class RunDirectory:
    """One run's directory, made or taken up again.

    Args:
        path: RUN.
        config: What is to run.
        fingerprints: Of the datasets, in order.
        resume: `auto` resumes an unfinished run or begins one; `must` only resumes; `never`
            only begins.

    Raises:
        InputError: `path` holds something else, another config or other data, or `resume` does
            not allow what would happen.
    """

    def __init__(self, path: Path, config: RunConfig, fingerprints: list[str], resume: str) -> None:
        if resume not in RESUME:
            raise InputError(f"--resume is {resume!r}. {nearest(resume, RESUME)}")
        self.path, self.config = path, config
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self._fingerprints = fingerprints
        self._first_step = 1
        if config.engine.tensorboard:
            _require_tensorboard()
        if path.exists() and not (path.is_dir() and _never_begun(path)):
            self._require_same(resume)
        if resume == "must" and not list_checkpoints(self.checkpoints):
            raise InputError(
                f"--resume must: {path} has no checkpoint. Give the directory of the run to "
                "resume, or begin it with --resume auto."
            )

    @property
    def done(self) -> bool:
        """Whether the run finished before."""
        return (self.path / "DONE").exists()

    def begin(self) -> None:
        """Write what the run is, before its first step."""
        with self.needs_room():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        environment = describe_environment() | {"data_fingerprints": self._fingerprints}
        self._write("environment.json", json.dumps(environment, indent=2))
        self._write("config.json", to_json(self.config))

    def finish(self, why: str) -> None:
        """Mark the run as finished; last."""
        self._write("DONE", f"{why}\n")

    @contextmanager
    def needs_room(self) -> Iterator[None]:
        """What is written inside may fail for want of room, and then says so.

        Raises:
            InputError: The disk is full or not writable.
        """
        try:
            yield
        except (OSError, SafetensorError) as cause:
            # Safetensors hides the operating system's error.
            if isinstance(cause, OSError) and cause.errno not in NO_ROOM:
                raise
            raise InputError(
                f"{self.path} could not be written to ({cause}). Checkpoints are intact: make "
                "room there, then repeat the command to resume."
            ) from cause

    def _write(self, name: str, content: str) -> None:
        with self.needs_room():
            write_atomically(self.path / name, content.encode())

    def records(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a line that a crash cut short ends them."""
        if not self.metrics.exists():
            return
        with self.metrics.open() as lines:
            for line in lines:
                try:
                    record = json.loads(line)
                except ValueError:
                    return
                if not line.endswith("\n"):
                    return
                yield record

    def truncate_metrics(self, step: int) -> None:
        """Drop what was recorded after the checkpoint that the run resumes from."""
        kept = [json.dumps(r) + "\n" for r in self.records() if r["step"] <= step]
        self._write("metrics.jsonl", "".join(kept))
        self._first_step = max(0, step) + 1

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to `metrics.jsonl`; numbers that are not finite become null."""
        clean = _without_not_finite(record)
        with self.needs_room(), self.metrics.open("a") as file:
            file.write(json.dumps(clean) + "\n")
        if self.config.engine.tensorboard:
            self._write_events(clean)

    def sync_metrics(self) -> None:
        """Force the metrics to disk, before a checkpoint that relies on them."""
        with self.metrics.open("a") as file:
            os.fsync(file.fileno())

    def probes(self) -> list[dict[str, Any]]:
        """The probe records so far that have a macro-AUROC."""
        return [
            r for r in self.records() if r["kind"] == "probe" and r.get("macro_auroc") is not None
        ]

    def mark_best(self) -> int | None:
        """Mark the step with the best probe in `checkpoints/best.json`, and return it.

        Step 0 counts only in a run that continues an encoder: random weights are no result.
        """
        probes = [record for record in self.probes() if record["step"] or self.config.init]
        if not probes:
            return None
        best = max(probes, key=lambda record: record["macro_auroc"])
        mark = {"step": best["step"], "macro_auroc": best["macro_auroc"]}
        self._write("checkpoints/best.json", json.dumps(mark))
        return int(best["step"])

    def _write_events(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                self._events.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    @cached_property
    def _events(self) -> Any:
        from torch.utils.tensorboard.writer import SummaryWriter

        # Events of steps that are taken again are hidden.
        return SummaryWriter(str(self.path / "tensorboard"), purge_step=self._first_step)

    def _require_same(self, resume: str) -> None:
        try:
            text = (self.path / "config.json").read_text()
            environment = json.loads((self.path / "environment.json").read_text())
        except (OSError, ValueError) as cause:
            raise InputError(
                f"{self.path} exists and is not a run directory. Give a new --out."
            ) from cause
        if resume == "never":
            raise InputError(f"--resume never: {self.path} holds a run. Give a new --out.")
        changed = differences(from_json(text, self.path / "config.json"), self.config)
        if changed:
            raise InputError(
                f"{self.path} was begun with another config ({'; '.join(changed)}). Repeat the "
                "values of the run, or give a new --out."
            )
        if environment.get("data_fingerprints") != self._fingerprints:
            raise InputError(
                f"{self.path} was begun on other data (fingerprints differ). Give that data, or "
                "a new --out."
            )


def describe_environment() -> dict[str, Any]:
    """Versions, hardware and command of this process."""
    import torch

    return {
        "selfray": selfray.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": " ".join(["selfray", *sys.argv[1:]]),
    }


def _require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError(
            "engine.tensorboard needs the package tensorboard. Install selfray[tensorboard], or "
            "leave the option out; metrics.jsonl holds the same numbers."
        )


def _never_begun(path: Path) -> bool:
    """Whether a directory is empty, or holds only what `begin` writes before the config."""
    before = {"checkpoints", "environment.json", ".environment.json.partial",
              ".config.json.partial"}  # fmt: skip
    return {entry.name for entry in path.iterdir()} <= before and not list_checkpoints(
        path / "checkpoints"
    )


def _git_commit() -> str | None:
    here = Path(selfray.__file__).parent
    try:
        answer = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None


def _without_not_finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _without_not_finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
