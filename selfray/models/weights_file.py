"""The tensors of a checkpoint, and their match with a network: all of them or an error."""

from __future__ import annotations

import glob
import hashlib
import json
import pickle
import re
import shlex
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from selfray.errors import InputError

PICKLED = (".bin", ".pth", ".pt", ".th")
"""Ends of the names of files that PyTorch wrote; they are read without unpickling objects."""

_POINTER = (
    b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs, spec.md
)
_SHOWN = 6  # names in an error
# Of the publishers' pickled files, those whose safetensors file has another name than theirs.
_OF_TENSORS = {
    "pytorch_model.bin": "model.safetensors",
    "open_clip_pytorch_model.bin": "open_clip_model.safetensors",
}
_WEIGHTS = ("model", "state_dict", "teacher", "model_state_dict")  # of a training checkpoint
_SHARD = re.compile(r"pytorch_model-\d+-of-\d+\.bin")  # one of several files, in transformers
# Python that makes a file of tensors: a whole network's parameters, or what a training
# checkpoint has under a name that `read_tensors` knows.
_CONVERTING = (
    "import glob, torch; from functools import reduce; from safetensors.torch import save_file; "
    "named = lambda m: m if isinstance(m, dict) else m.state_dict(); "
    "parts = [reduce(lambda m, k: named(m.get(k, m)), {keys}, "
    'named(torch.load(open(f, "rb"), "cpu", weights_only=False))) '  # by its name it may be refused
    "for f in sorted(glob.glob({files}))]; "
    "save_file({{k: v.detach().clone().contiguous() for p in parts for k, v in p.items() "
    "if torch.is_tensor(v)}}, {target})"
)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read every tensor of a checkpoint, as float32.

    A file that PyTorch wrote is read by its restricted unpickler, which makes tensors and plain
    containers only; of a training checkpoint, the weights are taken: under `model`, `state_dict`,
    `teacher` or `model_state_dict`.

    Args:
        file: Safetensors, or .bin, .pth, .pt or .th.

    Raises:
        InputError: The file is missing, damaged, holds other objects, or values that are not
            finite.
    """
    if _begins_with(file, _POINTER):
        raise InputError(
            f"{file} is Git LFS's pointer to the weights, not the weights. Run `git lfs pull` in "
            "its repository, or download the file itself."
        )
    tensors = _read_pickled(file) if file.suffix in PICKLED else _read_safetensors(file)
    floats = {}
    for name, tensor in tensors.items():
        floats[name] = tensor.float() if tensor.is_floating_point() else tensor
        if tensor.is_floating_point() and not bool(torch.isfinite(floats[name]).all()):
            raise InputError(
                f"{file}: {name} holds values that are not finite: a diverged training or a "
                "damaged copy. Copy the file anew, or take an earlier checkpoint."
            )
    return floats


def weights_in(place: Path, stem: str) -> Path:
    """A publisher's file of weights.

    Args:
        place: The file itself, or a directory with it.
        stem: The file's name without its end; may be a pattern. Of two files that differ in the
            end, the safetensors file is taken.

    Raises:
        InputError: The directory has none, or several.
    """
    if place.is_file():
        return place
    ends = (".safetensors", *PICKLED)
    found = sorted(file for file in place.glob(f"{stem}.*") if file.suffix in ends)
    if len({file.stem for file in found}) > 1:
        raise InputError(
            f"{place} has {', '.join(file.name for file in found)}. Give the file itself."
        )
    if not found:
        raise InputError(f"{place} has no {stem} that ends in {', '.join(ends)}. Put it there.")
    return min(found, key=lambda file: ends.index(file.suffix))


def name_of_tensors(name: str) -> str:
    """The file that is looked for in place of a pickled one; of any other file, its own name."""
    if _SHARD.fullmatch(name):
        return _OF_TENSORS["pytorch_model.bin"]
    own = Path(name).with_suffix(".safetensors").name if Path(name).suffix in PICKLED else name
    return _OF_TENSORS.get(name, own)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def load_exactly(model: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Give a network its parameters and buffers.

    Args:
        model: May be on the meta device; takes over the tensors themselves.
        tensors: By the network's names.
        file: Where they are from, for errors.

    Raises:
        InputError: A tensor is missing, left over or of another shape; the message names it.
    """
    expected = model.state_dict()
    check_names(expected, tensors, file)
    check_shapes(expected, tensors, file)
    model.load_state_dict(dict(tensors), assign=True)


def check_names(expected: Iterable[str], found: Iterable[str], file: Path) -> None:
    """Raise InputError that names what is missing and what is unexpected."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or extra:
        said = [
            f"{len(names)} {what} ({', '.join(names[:_SHOWN])}"
            f"{', …' if len(names) > _SHOWN else ''})"
            for what, names in (("missing", missing), ("unexpected", extra))
            if names
        ]
        raise InputError(
            f"{file}: parameters: {'; '.join(said)}. All must be there and no others: "
            "take weights and config.json from the same model."
        )


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path) -> None:
    """Raise InputError that names the first tensor of another shape, or of other numbers."""
    for name, tensor in found.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise InputError(
                f"{file}: {name} is {str(tensor.dtype).removeprefix('torch.')}, expected "
                f"{str(expected[name].dtype).removeprefix('torch.')}. Weights that were quantised "
                "are not read: take the original ones."
            )
        if tensor.shape != expected[name].shape:
            raise InputError(
                f"{file}: {name} is {list(tensor.shape)}, config.json asks for "
                f"{list(expected[name].shape)}. Take both from the same model."
            )


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as cause:
        if _is_pickled(file):
            raise InputError(
                f"{file} is a file of PyTorch's renamed to safetensors, and is not opened. "
                f"{_conversion(file)}"
            ) from None
        raise InputError(f"{file} cannot be read: {cause}. Copy it anew.") from cause


def _read_pickled(file: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise InputError(
            f"{file} holds more than tensors, which can run any code, and is not opened. "
            f"{_conversion(file)}"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as cause:
        reason = str(cause) or "it ends too early"
        raise InputError(f"{file} cannot be read: {reason}. Copy it anew.") from cause
    for key in _WEIGHTS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise InputError(f"{file} holds no tensors by name. {_conversion(file)}")
    stray = sorted(
        str(name)
        for name, value in content.items()
        if not torch.is_tensor(value) or not isinstance(name, str)
    )
    if stray:
        raise InputError(f"{file}: {stray[0]} is no tensor with a name. {_conversion(file)}")
    return content


def _is_pickled(file: Path) -> bool:
    return _begins_with(file, b"\x80") or (file.is_file() and zipfile.is_zipfile(file))


def _begins_with(file: Path, start: bytes) -> bool:
    try:
        with file.open("rb") as opened:
            return opened.read(len(start)) == start
    except OSError:  # told by whoever reads it
        return False


def _conversion(file: Path) -> str:
    """What to do, and last the command, for a shell in any folder."""
    target = name_of_tensors(file.name)
    shards = "pytorch_model-*-of-*.bin" if _SHARD.fullmatch(file.name) else glob.escape(file.name)
    quoted = (json.dumps(name, ensure_ascii=False) for name in (shards, target))
    code = _CONVERTING.format(**dict(zip(("files", "target"), quoted, strict=True)), keys=_WEIGHTS)
    return (
        f"Where you trust it, convert it to {target}, and give that where you gave the file "
        f"itself: cd {shlex.quote(str(file.parent.absolute()))} && "
        f"{shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    )
