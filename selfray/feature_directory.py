"""The feature directory: arrays that grow chunk by chunk, rows, and what made them.

`cls.npy` and `patch_mean.npy` [N, D] float32, on request `patch_tokens.npy` [N, h, w, D] float16;
`rows.parquet`, what is known of each image; `manifest.json`; `left_out.jsonl`, images that could
not be used, which have no row.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.dataset import write_atomically
from selfray.errors import InputError

FORMAT_NAME = "selfray-features"
CHUNK_ROWS = 64
"""Images whose features are lost at most, a process, by an interruption."""

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_COPY_ROWS = 1024
# What a manifest is known by.
_FIELDS = {"encoder", "weights_sha256", "preprocessing", "precision", "arrays", "dataset"}
# Of what an unfinished directory holds; the finished one has none of it.
_PLAN, _DONE, _LOCK = "plan.json", "done.{rank}.jsonl", "lock"


@dataclass(frozen=True)
class Features:
    """A feature directory opened for reading.

    Attributes:
        cls: [N, D] float32, memory-mapped.
        patch_mean: [N, D] float32, memory-mapped; None for pixel baselines.
        rows: The columns of the images without pixels; row i belongs to array row i.
        manifest: What made them.
        patch_tokens: [N, h, w, D] float16, memory-mapped; None where they were not asked for.
    """

    cls: np.ndarray
    patch_mean: np.ndarray | None
    rows: pa.Table
    manifest: dict[str, Any]
    patch_tokens: np.ndarray | None = None

    def to_arrow(self) -> pa.Table:
        """Rows and features in one Arrow table, the features still memory-mapped.

        `datasets.Dataset(features.to_arrow())` is a dataset of Hugging Face's.
        """
        table = self.rows
        for name, array in (("cls", self.cls), ("patch_mean", self.patch_mean)):
            if array is not None:
                values = pa.array(array.reshape(-1))
                column = pa.FixedSizeListArray.from_arrays(values, array.shape[1])
                table = table.append_column(name, column)
        return table


def is_feature_directory(path: Path) -> bool:
    """Whether this is a finished feature directory."""
    try:
        return json.loads((path / "manifest.json").read_text())["format"] == FORMAT_NAME
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_features(directory: Path) -> Features:
    """Open what `extract_features` wrote.

    Raises:
        InputError: Not a feature directory, or a file of it is missing or damaged.
    """
    if not is_feature_directory(directory):
        raise InputError(f"{directory} is no feature directory. Make one with `selfray features`.")
    manifest = json.loads((directory / "manifest.json").read_text())
    try:
        arrays = {
            name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("cls", "patch_mean", "patch_tokens")
            if name in manifest["arrays"]
        }
        rows = pq.read_table(directory / "rows.parquet")
        if any(len(array) != len(rows) for array in arrays.values()):
            raise ValueError("arrays and rows differ in length")
    except (OSError, ValueError, pa.ArrowInvalid) as cause:
        raise InputError(
            f"{directory}: a file of the features is missing or damaged. Remove the directory and "
            "extract them again."
        ) from cause
    return Features(
        arrays["cls"], arrays.get("patch_mean"), rows, manifest, arrays.get("patch_tokens")
    )


def require_same(directory: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to continue or to reuse what was made from something else.

    Args:
        directory: For the error.
        found: The manifest there.
        wanted: The manifest of what was asked for.

    Raises:
        InputError: Names the first thing that differs.
    """
    named = {
        "encoder (SHA-256 of its weights)": lambda m: m["weights_sha256"] or m["encoder"],
        "dataset": lambda m: m["dataset"]["fingerprint"],
        "preprocessing": lambda m: m["preprocessing"],
        "precision": lambda m: m["precision"],
        "kind (arrays)": lambda m: {name: a["shape"][1:] for name, a in m["arrays"].items()},
    }
    for what, value in named.items():
        if value(found) != value(wanted):
            raise InputError(
                f"{directory} holds features of another {what}: {_short(value(found))}, asked for "
                f"{_short(value(wanted))}. Give another --out, or remove the directory."
            )


def read_manifest(directory: Path, file: str) -> dict[str, Any]:
    """The manifest in a directory that exists.

    Raises:
        InputError: There is none: the directory holds something else.
    """
    try:
        found = json.loads((directory / file).read_text())
        if found["format"] != FORMAT_NAME or not found.keys() >= _FIELDS:
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise InputError(
            f"{directory} exists and holds no features. Give a new directory, or remove it."
        ) from cause
    return found


class FeatureWriter:
    """Arrays under way to a feature directory; several processes may write different chunks.

    Args:
        out: Feature directory to make; beside it `OUT.partial` grows.
        rank: Of this process.
    """

    def __init__(self, out: Path, rank: int = 0) -> None:
        self.out, self._rank = out, rank
        self.partial = out.with_name(out.name + ".partial")
        self._arrays: dict[str, np.memmap] = {}
        self.manifest: dict[str, Any] = {}
        self._lock: TextIO | None = None

    def __enter__(self) -> FeatureWriter:
        """Keep other commands away from what is under way.

        Raises:
            InputError: Another command is at it.
        """
        if self._rank == 0:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / _LOCK).open("a")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise InputError(
                    f"{self.partial} is being written by another command. Wait for it, or give "
                    "another --out."
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    def begun(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The manifest of an interrupted extraction that can go on, or None.

        Raises:
            InputError: What lies there is of something else.
        """
        nothing = {_LOCK, f".{_PLAN}.partial"}  # the plan half written, by `write_atomically`
        if not self.partial.exists() or {f.name for f in self.partial.iterdir()} <= nothing:
            return None
        found = read_manifest(self.partial, _PLAN)
        require_same(self.partial, found, wanted)
        return found

    def begin(self, manifest: dict[str, Any]) -> None:
        """Make the arrays that are not there yet, with their room on the disk; one process does it.

        Raises:
            InputError: There is no room.
        """
        self.partial.mkdir(parents=True, exist_ok=True)
        self.note(manifest)
        for name, array in manifest["arrays"].items():
            file = self.partial / f"{name}.npy"
            if not file.exists():
                self._make_array(file, np.dtype(array["dtype"]), tuple(array["shape"]))

    def note(self, manifest: dict[str, Any]) -> None:
        """Write down what is under way."""
        write_atomically(self.partial / _PLAN, json.dumps(manifest).encode())

    def open(self, manifest: dict[str, Any]) -> None:
        """Open the arrays that `begin` made."""
        self.manifest = manifest
        for name in manifest["arrays"]:
            array = np.lib.format.open_memmap(self.partial / f"{name}.npy", mode="r+")
            self._arrays[name] = array

    def done(self) -> dict[int, dict[int, str]]:
        """Chunks that are done, and of each the rows that were left out with their reasons."""
        chunks: dict[int, dict[int, str]] = {}
        for file in sorted(self.partial.glob(_DONE.format(rank="*"))):
            for line in file.read_text().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:  # cut off by a kill
                    continue
                bad = {int(row): reason for row, reason in record["left_out"].items()}
                chunks[record["chunk"]] = bad
        return chunks

    def write(self, rows: Sequence[int], values: Mapping[str, np.ndarray]) -> None:
        """Features of these rows."""
        for name, array in values.items():
            self._arrays[name][rows] = array

    def finish_chunk(self, chunk: int, left_out: Mapping[int, str]) -> None:
        """Put a chunk's rows on the disk, then note that they are there."""
        for array in self._arrays.values():
            array.flush()
        record = {"chunk": chunk, "left_out": {str(row): why for row, why in left_out.items()}}
        with (self.partial / _DONE.format(rank=self._rank)).open("a") as file:
            # A line that a kill cut off must not swallow this one.
            file.write(("\n" if file.tell() else "") + json.dumps(record))
            file.flush()
            os.fsync(file.fileno())

    def finish(self, rows: pa.Table) -> None:
        """Make the feature directory from what is done; one process does it.

        Args:
            rows: Of all images, also of those left out.
        """
        left_out = {row: why for bad in self.done().values() for row, why in bad.items()}
        kept = np.setdiff1d(np.arange(len(rows)), np.fromiter(left_out, int, len(left_out)))
        self._arrays.clear()
        if left_out:
            self._drop_rows(kept)
        table = pa.BufferOutputStream()
        pq.write_table(rows.take(pa.array(kept)), table)
        write_atomically(self.partial / "rows.parquet", table.getvalue().to_pybytes())
        ids = rows["image_id"].to_pylist()
        lines = [{"image_id": ids[row], "reason": left_out[row]} for row in sorted(left_out)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(self.partial / "left_out.jsonl", text.encode())
        for array in self.manifest["arrays"].values():
            array["shape"][0] = len(kept)
        manifest = json.dumps({**self.manifest, "left_out": len(left_out)}, indent=2)
        write_atomically(self.partial / "manifest.json", manifest.encode())
        if self.out.exists():
            self.out.rmdir()
        self.partial.rename(self.out)
        # Only now: without its plan, a partial directory could not be taken up again.
        for file in (self.out / _PLAN, self.out / _LOCK, *self.out.glob(_DONE.format(rank="*"))):
            file.unlink(missing_ok=True)

    def _drop_rows(self, kept: np.ndarray) -> None:
        """Write the arrays anew without the rows that were left out."""
        for name in self.manifest["arrays"]:
            file = self.partial / f"{name}.npy"
            whole = np.load(file, mmap_mode="r")
            if len(whole) == len(kept):  # an interrupted end had come so far
                continue
            smaller = self.partial / f"{name}.kept.npy"
            target = self._make_array(smaller, whole.dtype, (len(kept), *whole.shape[1:]))
            for start in range(0, len(kept), _COPY_ROWS):
                target[start : start + _COPY_ROWS] = whole[kept[start : start + _COPY_ROWS]]
            target.flush()
            smaller.replace(file)

    def _make_array(self, file: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        new = file.with_suffix(".new")
        with _room_for(math.prod(shape) * dtype.itemsize, self.partial):
            np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=shape)
            _reserve(new)
        new.replace(file)
        return np.lib.format.open_memmap(file, mode="r+")


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


def _reserve(file: Path) -> None:
    """Take a mapped file's room on the disk now; what it holds stays.

    A mapped file has holes until it is written to, and on a full disk that kills the process
    (SIGBUS) where no exception can tell why.
    """
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


@contextmanager
def _room_for(size: int, partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno not in _NO_ROOM:
            raise
        raise InputError(
            f"{partial} needs {math.ceil(size / 1e6)} MB, and there is no room for it "
            f"({cause.strerror}). Make room there, then repeat the command."
        ) from cause
