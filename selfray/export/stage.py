"""`selfray export`: an encoder into a directory that another runtime opens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from selfray import __version__
from selfray.errors import InputError, nearest
from selfray.export import FORMATS
from selfray.export.card import card_of, export_card, label, snippet
from selfray.export.graphs import bytes_of_weights, write_onnx, write_openvino, write_torch
from selfray.export.read_back import (
    TOLERANCE,
    Differs,
    Features,
    differences,
    read_dinov2,
    read_huggingface,
    read_onnx,
    read_openvino,
    read_timm,
    read_torch,
)
from selfray.export.vit_files import write_dinov2, write_huggingface, write_timm
from selfray.models.encoder import Encoder
from selfray.models.encoder_directory import DESCRIPTION, replace_directory
from selfray.models.published import load_encoder, recorded_card
from selfray.models.vit import VisionTransformer
from selfray.models.weights_file import sha256_of

RECORD = "export.json"
"""What an export is of, and by what it was read back; it tells an export from other directories."""
# Free space that is asked for, times the bytes of the weights: what is written, and as much again
# for a library that copies it first. [ours]
_ROOM = 2.2


@dataclass(frozen=True)
class _Format:
    """How a format is written and read back.

    Attributes:
        write: Makes the files in a directory.
        read: Opens them by `runtime`.
        runtime: The package that opens the format.
        needs: Packages without which it cannot be written.
        of_vits: Whether it has a class for DINOv2-type vision transformers alone.
    """

    write: Callable[[Encoder, Path], None]
    read: Callable[[Path, Encoder], Features]
    runtime: str
    needs: tuple[str, ...] = ()
    of_vits: bool = False


_FORMATS = {
    "huggingface": _Format(write_huggingface, read_huggingface, "transformers", of_vits=True),
    "dinov2": _Format(write_dinov2, read_dinov2, "selfray", of_vits=True),
    "timm": _Format(write_timm, read_timm, "timm", of_vits=True),
    "onnx": _Format(write_onnx, read_onnx, "onnxruntime", ("onnx", "onnxscript")),
    "openvino": _Format(write_openvino, read_openvino, "openvino", ("openvino",)),
    "torch": _Format(write_torch, read_torch, "torch"),
}


def export_encoder(name: str, to: str, out: Path) -> str:
    """Write an encoder for another runtime, with a model card, and read it back.

    The directory appears whole, and only where its runtime gives the encoder's features or is
    not installed. The same export may be repeated.

    Args:
        name: As for `load_encoder`.
        to: A key of `FORMATS`.
        out: Directory to make.

    Returns:
        How far what was read back differs from the encoder, and Python that opens it.

    Raises:
        InputError: There is no such encoder or format, the encoder is of a kind that the format
            has no class for, packages are missing, there is no room, or `out` holds something
            else.
        Differs: What was read back gives other features.
    """
    if to not in _FORMATS:
        raise InputError(f"--to is {to!r}. {nearest(to, FORMATS)}")
    form = _FORMATS[to]
    _require_packages(to, form.needs)
    before = _record_in(out)
    encoder = load_encoder(name)
    if form.of_vits and not isinstance(encoder.model, VisionTransformer):
        raise InputError(
            f"{name} is no DINOv2-type vision transformer, and {to} has no class for it. "
            "Take onnx, openvino or torch."
        )
    if before and (before["format"], before["weights_sha256"]) != (to, encoder.weights_sha256):
        raise InputError(
            f"{out} holds {before['encoder']} for {before['format']}. Choose another path."
        )
    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _require_room(encoder, target.parent)
    new = target.with_name(f".{target.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir()
        read_back = _write(form, to, name, encoder, new, target.name)
        replace_directory(target, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return f"{read_back}\n\n{snippet(to, encoder, str(out))}\n"


def _write(form: _Format, to: str, name: str, encoder: Encoder, new: Path, folder: str) -> str:
    """All files of an export; returns how it was read back."""
    form.write(encoder, new)
    card = card_of(name, encoder)
    if to in ("huggingface", "dinov2"):  # what this package reads, too
        interpolation = encoder.vit.position_interpolation
        noted = {"position_interpolation": interpolation, "synthetic": encoder.synthetic}
        _write_json(new / DESCRIPTION, {**card, **noted, **recorded_card(name)})
    _write_json(new / "preprocessing.json", encoder.preprocessing.description())
    hashes = {file.name: sha256_of(file) for file in sorted(new.iterdir())}
    by = found = None
    if find_spec(form.runtime):
        by = f"{form.runtime} {__version__ if form.runtime == 'selfray' else version(form.runtime)}"
        try:
            found = differences(encoder, form.read(new, encoder))
        except Differs as cause:
            raise Differs(f"{to}: {cause}") from None
    record = {
        "format": to,
        "encoder": label(name),
        "weights_sha256": encoder.weights_sha256,
        "files": hashes,
        "selfray": __version__,
        "read_back": None if found is None else {"by": by, "largest_difference": found},
    }
    _write_json(new / RECORD, record)
    text = export_card(to, name, encoder, folder, card)
    (new / "README.md").write_text(text, encoding="utf-8")
    for file in new.iterdir():  # safetensors lets the owner alone read
        shutil.copymode(new / RECORD, file)
    if found is None:
        return f"not verified: {form.runtime} is not installed. {_installation((form.runtime,))}"
    told = ", ".join(
        f"{output} {absolute:.1e} ({relative:.1e} of its root mean square)"
        for output, (absolute, relative) in found.items()
    )
    return (
        f"read back by {by}; largest difference from the encoder: {told}; allowed: "
        f"{TOLERANCE:.0e} of it"
    )


def _record_in(out: Path) -> dict[str, Any] | None:
    """The record of an export that is there; None where nothing is.

    Raises:
        InputError: Something else is there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        record = json.loads((out / RECORD).read_bytes())
        return {key: record[key] for key in ("format", "weights_sha256", "encoder")}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{out} exists and is no export. Choose another path.") from None


def _require_room(encoder: Encoder, folder: Path) -> None:
    """Refuse before writing: some of the libraries end the process on a full disk."""
    needed = _ROOM * bytes_of_weights(encoder)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {free / 1e6:.1f} MB are free, an export of {encoder.name} needs "
            f"{needed / 1e6:.1f} MB there. Make room, or give another path."
        )


def _require_packages(to: str, packages: tuple[str, ...]) -> None:
    missing = tuple(package for package in packages if find_spec(package) is None)
    if missing:
        raise InputError(f"{to} needs {' and '.join(missing)}. {_installation(missing)}")


def _installation(packages: tuple[str, ...]) -> str:
    return f"Install: python -m pip install {' '.join(packages)}"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
