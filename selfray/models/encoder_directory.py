"""Writing an encoder directory: all of it or nothing, with a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from selfray.errors import InputError
from selfray.models.encoder import vit_encoder
from selfray.models.golden import golden_cls
from selfray.models.huggingface import (
    WEIGHTS,
    model_config,
    preprocessor_config,
    read_model,
    to_huggingface,
)
from selfray.models.model_card import limits_of_training, model_card
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import VisionTransformer

DESCRIPTION = "selfray.json"
"""What Hugging Face's files have no place for: the model card as data, how positions are
interpolated, and golden values."""
GOLDEN = "golden_cls"
"""Its field with what `golden_cls` gave on the machine that wrote the encoder."""


def save_encoder(
    model: VisionTransformer,
    directory: Path,
    *,
    mean: float,
    std: float,
    card: Mapping[str, Any],
    heads: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write an encoder that `transformers.AutoModel.from_pretrained` and `load_encoder` read.

    The directory appears whole; an encoder that was there stays until then. transformers
    interpolates position embeddings to other image sizes in its own way, whatever the model does.

    Args:
        model: Saved as float32.
        directory: To make, or an encoder directory to replace.
        mean: Of the pixels, scale 0..1, that the model was trained with.
        std: Likewise.
        card: For the model card: `synthetic` (bool: trained on phantoms), `data` (one mapping a
            dataset, with `name`, `origin`, `licence`), `licence` of the weights where somebody
            gave one, `supervision` where there was any but the images, and anything else that can
            be written as JSON.
        heads: Tensors of projection heads by name, each written to NAME.safetensors.

    Raises:
        InputError: `directory` exists and holds something else, or a parameter is not finite.
    """
    if directory.exists() and not _is_encoder(directory):
        raise InputError(f"{directory} exists and is no encoder directory. Choose another.")
    new = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    means, stds = (mean,) * 3, (std,) * 3
    preprocessing = Preprocessing(model.image_size, means, stds, model.image_size)
    write_model(new, model, to_huggingface(float_state(model)), preprocessing)
    for name, tensors in (heads or {}).items():
        file = new / f"{name}.safetensors"
        save_file({key: t.contiguous() for key, t in tensors.items()}, file)
        shutil.copymode(new / "config.json", file)
    interpolation = model.position_interpolation
    written, _ = read_model(new)
    written.position_interpolation = interpolation
    golden = golden_cls(vit_encoder(str(directory), written, preprocessing))
    noted = {"position_interpolation": interpolation, GOLDEN: golden}
    _write_json(new / DESCRIPTION, {**card, **noted})
    (new / "README.md").write_text(_card(model, card), encoding="utf-8")
    replace_directory(directory, new)


def write_model(
    directory: Path,
    model: VisionTransformer,
    tensors: Mapping[str, Tensor],
    preprocessing: Preprocessing,
    weights: str = WEIGHTS,
) -> None:
    """Write weights, `config.json` and, where it can say it, `preprocessor_config.json`.

    Args:
        directory: Exists.
        model: What the configuration describes.
        tensors: Float32 on the CPU, by the names that go into the file.
        preprocessing: For images of `model.image_size` or less, which positions are
            interpolated for.
        weights: Name of their file.

    Raises:
        InputError: There is no room for the weights.
    """
    _write_json(directory / "config.json", model_config(model))
    write_tensors(tensors, directory / weights)
    # Safetensors lets the owner alone read.
    shutil.copymode(directory / "config.json", directory / weights)
    processor = preprocessor_config(preprocessing)
    if processor is not None:
        _write_json(directory / "preprocessor_config.json", processor)


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file that says it is PyTorch's.

    Raises:
        InputError: There is no room for it.
    """
    try:
        save_file(dict(tensors), file, metadata={"format": "pt"})
    except SafetensorError as cause:
        raise InputError(
            f"{file.parent.parent}: {file.name} cannot be written there: {cause}. Make room, or "
            "give another path."
        ) from cause


def _card(model: VisionTransformer, card: Mapping[str, Any]) -> str:
    synthetic = bool(card.get("synthetic"))
    subject = "radiographs of a synthetic phantom" if synthetic else "chest radiographs"
    return model_card(
        card,
        title=f"Image encoder of {subject}",
        about=[
            f"A vision transformer (width {model.width}, {model.depth} blocks, patch "
            f"{model.patch_size}, input {model.image_size} × {model.image_size}, "
            f"{model.registers} registers), pre-trained with selfray on "
            + ("images and their reports." if card.get("supervision") else "images alone.")
        ],
        library="transformers",
        limits=limits_of_training(synthetic),
    )


def _is_encoder(directory: Path) -> bool:
    try:
        return "model_type" in json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def float_state(model: VisionTransformer) -> dict[str, Tensor]:
    """The parameters, float32 on the CPU."""
    return {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}


def replace_directory(directory: Path, new: Path) -> None:
    """Put a directory that is written in the place of another, which may not exist yet.

    Args:
        directory: The name that it gets.
        new: Beside it.
    """
    for file in new.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
