"""`text_encoder/` beside an encoder that learned from reports: texts to where its images are."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfray.errors import InputError
from selfray.models.encoder_directory import replace_directory
from selfray.models.huggingface import WEIGHTS
from selfray.models.published import find_directory
from selfray.models.text_encoder import TextEncoder, open_text_encoder

FOLDER = "text_encoder"
SHARED_SPACE = "shared_space.safetensors"
"""Both projections `image_projection` and `text_projection` [E, D], `logit_scale` and, of siglip,
`logit_bias`."""
DESCRIPTION = "selfray.json"


class TextTower:
    """What tells how well a text fits an image.

    Args:
        text_encoder: Of texts.
        tensors: Of `SHARED_SPACE`.
    """

    def __init__(self, text_encoder: TextEncoder, tensors: dict[str, Tensor]) -> None:
        self._text_encoder = text_encoder.eval()
        self._image_projection = tensors["image_projection"]
        self._text_projection = tensors["text_projection"]
        self.logit_scale = float(tensors["logit_scale"])

    def images(self, cls: Tensor) -> Tensor:
        """CLS tokens [n, D] to unit vectors [n, E] of the shared space."""
        return F.normalize(cls @ self._image_projection.T, dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """n texts to unit vectors [n, E] of the shared space."""
        tokens = self._text_encoder.tokens(texts)
        return F.normalize(self._text_encoder(tokens) @ self._text_projection.T, dim=-1)


def save_text_tower(
    directory: Path,
    text_encoder: TextEncoder,
    *,
    encoder: Path,
    image_projection: Tensor,
    text_projection: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
) -> None:
    """Write the text side of an encoder; what was there stays until all is written.

    Args:
        directory: To make, or to replace.
        text_encoder: With its tokenizer.
        encoder: Directory of the image encoder that it belongs to.
        image_projection: [E, D].
        text_projection: [E, D of texts].
        logit_scale: Factor of the similarities, scalar.
        logit_bias: Of siglip, scalar.
    """
    new = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    text_encoder.save(new)
    tensors = {
        "image_projection": image_projection,
        "text_projection": text_projection,
        "logit_scale": logit_scale,
    }
    tensors |= {} if logit_bias is None else {"logit_bias": logit_bias}
    save_file(
        {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()},
        new / SHARED_SPACE,
    )
    description = {
        "encoder_sha256": _sha256(encoder / WEIGHTS),
        "max_tokens": text_encoder.max_tokens,
    }
    (new / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    for file in new.glob("*.safetensors"):  # safetensors lets the owner alone read
        shutil.copymode(new / DESCRIPTION, file)
    replace_directory(directory, new)


def open_text_tower(encoder: str) -> TextTower | None:
    """The text side of an encoder, or None where it has none.

    Args:
        encoder: As for `load_encoder`.

    Raises:
        InputError: It is damaged, or belongs to other weights than the encoder's.
    """
    directory = _folder(encoder)
    if directory is None:
        return None
    found = find_directory(encoder)
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        belongs, max_tokens = description["encoder_sha256"], int(description["max_tokens"])
        tensors = load_file(directory / SHARED_SPACE)
        scale = float(tensors["logit_scale"])
        if not math.isfinite(scale):
            raise ValueError(f"logit_scale is {scale}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as cause:
        raise InputError(f"{directory} is damaged ({cause}). Restore it from a copy.") from cause
    if belongs != _sha256(found / WEIGHTS):
        raise InputError(
            f"{directory} belongs to other weights than those in {found}. Take both from one run."
        )
    return TextTower(open_text_encoder(directory, max_tokens), tensors)


def text_tower_sha256(encoder: str) -> str:
    """SHA-256 of all that the text side of an encoder is made of; empty where it has none.

    The weights of the image encoder do not tell it: the text side may be another beside them.

    Args:
        encoder: As for `load_encoder`.
    """
    directory = _folder(encoder)
    if directory is None:
        return ""
    files = sorted(file for file in directory.iterdir() if file.is_file())
    lines = (f"{file.name} {_sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _folder(encoder: str) -> Path | None:
    """Where the text side of an encoder is, if it has one."""
    if ":" in encoder and not Path(encoder).is_dir():
        return None
    directory = find_directory(encoder).with_name(FOLDER)
    return directory if (directory / SHARED_SPACE).is_file() else None


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
