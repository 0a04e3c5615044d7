"""Checkpoints: write, verify, rotate, resume.

A checkpoint is a directory `step_00001000/` with `tensors.safetensors` and `checkpoint.json`
(format, step, SHA-256 of the tensors). It is written under a temporary name, synced and renamed,
so a directory of that name is whole; a damaged one is found by its checksum.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfray.data.dataset import write_atomically
from selfray.errors import InputError

FORMAT_VERSION = 1
# What the user can mend: no room, a limit, no permission.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS}
_STEP = re.compile(r"step_(\d{8})")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint in memory.

    Attributes:
        step: Steps done when it was written.
        tensors: Everything that changes in a step, by name, on the CPU.
    """

    step: int
    tensors: dict[str, Tensor]


def save_checkpoint(directory: Path, step: int, tensors: dict[str, Tensor]) -> Path:
    """Write one checkpoint; older ones are not touched.

    Args:
        directory: `RUN/checkpoints`.
        step: Steps done.
        tensors: By name.

    Returns:
        The checkpoint's directory.

    Raises:
        InputError: The disk is full or not writable; nothing half-written keeps the name.
    """
    final = directory / _name(step)
    partial = directory / f".{final.name}.partial"
    try:
        for left in directory.glob(".step_*.partial"):  # of a process killed while it wrote
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
        file = partial / "tensors.safetensors"
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)
        _sync(file)
        manifest = {"format": FORMAT_VERSION, "step": step, "sha256": _sha256(file)}
        write_atomically(partial / "checkpoint.json", json.dumps(manifest).encode())
        shutil.copymode(partial / "checkpoint.json", file)  # safetensors lets the owner alone read
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _sync(directory)
    except (OSError, SafetensorError) as cause:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(cause, OSError) and cause.errno not in NO_ROOM:
            raise
        raise InputError(
            f"the checkpoint of step {step} could not be written to {directory} ({cause}). Older "
            "checkpoints are intact: make room there, then repeat the command to resume."
        ) from cause
    return final


def list_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, directory) of every checkpoint, oldest first, not verified."""
    found = [(m, p) for p in directory.glob("step_*") if (m := _STEP.fullmatch(p.name))]
    return sorted((int(match[1]), path) for match, path in found)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify one checkpoint.

    Raises:
        InputError: A file is missing, of another format version, or fails its checksum.
    """
    try:
        manifest = json.loads((path / "checkpoint.json").read_text())
        file = path / "tensors.safetensors"
        if manifest["format"] != FORMAT_VERSION:
            raise InputError(
                f"checkpoint {path} is of format {manifest['format']}, this program knows "
                f"{FORMAT_VERSION}. Resume with the version of selfray that began the run."
            )
        if _sha256(file) != manifest["sha256"]:
            raise InputError(f"checkpoint {path} is damaged: its checksum does not match")
        if path.name != _name(manifest["step"]):
            raise InputError(f"checkpoint {path} is damaged: it says step {manifest['step']}")
        return Checkpoint(manifest["step"], load_file(file))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as cause:
        raise InputError(f"checkpoint {path} is damaged ({cause})") from cause


def load_newest(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies.

    Args:
        directory: `RUN/checkpoints`; may be missing.

    Returns:
        The checkpoint, or None when there is none; and a line for each newer one that was
        damaged and passed over.

    Raises:
        InputError: There are checkpoints and all are damaged.
    """
    damaged: list[str] = []
    for _, path in reversed(list_checkpoints(directory)):
        try:
            return load_checkpoint(path), damaged
        except InputError as cause:
            damaged.append(str(cause))
    if damaged:
        raise InputError(
            f"every checkpoint in {directory} is damaged, the newest: {damaged[0]}. Restore one "
            "from a copy, or start anew with another --out."
        )
    return None, damaged


def rotate(directory: Path, keep: int, protected: set[int]) -> None:
    """Remove all but the newest checkpoints.

    Args:
        directory: `RUN/checkpoints`.
        keep: How many of the newest stay, >= 1.
        protected: Steps that stay in any case.
    """
    for step, path in list_checkpoints(directory)[:-keep]:
        if step not in protected:
            shutil.rmtree(path, ignore_errors=True)


def _name(step: int) -> str:
    return f"step_{step:08d}"


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
