"""Writing an encoder directory: all of it or nothing, with a model card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from selfray.errors import InputError
from selfray.models.huggingface import (
    WEIGHTS,
    model_config,
    preprocessor_config,
    to_huggingface,
)
from selfray.models.vit import VisionTransformer

DESCRIPTION = "selfray.json"
"""What Hugging Face's files have no place for: the model card as data, and how positions are
interpolated."""


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
            gave one, and anything else that can be written as JSON.
        heads: Tensors of projection heads by name, each written to NAME.safetensors.

    Raises:
        InputError: `directory` exists and holds something else.
    """
    if directory.exists() and not _is_encoder(directory):
        raise InputError(f"{directory} exists and is no encoder directory. Choose another.")
    new = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    state = {name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()}
    save_file(to_huggingface(state), new / WEIGHTS, metadata={"format": "pt"})
    for name, tensors in (heads or {}).items():
        save_file({key: t.contiguous() for key, t in tensors.items()}, new / f"{name}.safetensors")
    _write_json(new / "config.json", model_config(model))
    for weights in new.glob("*.safetensors"):  # safetensors lets the owner alone read
        shutil.copymode(new / "config.json", weights)
    _write_json(new / "preprocessor_config.json", preprocessor_config(model.image_size, mean, std))
    _write_json(new / DESCRIPTION, {**card, "position_interpolation": model.position_interpolation})
    (new / "README.md").write_text(model_card(model, card), encoding="utf-8")
    _replace(directory, new)


def model_card(model: VisionTransformer, card: Mapping[str, Any]) -> str:
    """README.md: what the encoder was trained on and how, its limits, what it is for."""
    synthetic = bool(card.get("synthetic"))
    licence = card.get("licence")
    subject = "radiographs of a synthetic phantom" if synthetic else "chest radiographs"
    lines = [
        "---",
        f"license: {licence.lower() if licence else 'unknown'}",
        "library_name: transformers",
        "pipeline_tag: image-feature-extraction",
        "tags: [selfray, dinov2, chest-x-ray" + (", synthetic-phantom]" if synthetic else "]"),
        "---",
        "",
        f"# Image encoder of {subject}",
        "",
        f"A vision transformer (width {model.width}, {model.depth} blocks, patch "
        f"{model.patch_size}, input {model.image_size} × {model.image_size}, "
        f"{model.registers} registers), pre-trained with selfray on images alone.",
        "",
        "## Data",
        "",
        *_data_lines(card.get("data", ())),
        "",
        "## Recipe",
        "",
        *_recipe_lines(card),
        "",
        "## Licence",
        "",
        f"{(licence or 'Not given').rstrip('.')}. The terms of the data it was trained on apply as "
        "well.",
        "",
        "## Limits",
        "",
        *_limits(synthetic),
        "",
        "## Intended use",
        "",
        "Research on image features. Not a medical device, and not for diagnosis.",
        "",
    ]
    return "\n".join(lines)


def _data_lines(data: object) -> list[str]:
    if not isinstance(data, list | tuple):
        return [str(data)]
    if not data:
        return ["Not recorded."]
    return [
        "- " + "; ".join(f"{key}: {value}" for key, value in entry.items())
        if isinstance(entry, Mapping)
        else f"- {entry}"
        for entry in data
    ]


def _recipe_lines(card: Mapping[str, Any]) -> list[str]:
    apart = ("synthetic", "data", "licence")
    told = {key: value for key, value in card.items() if key not in apart}
    return [f"- {key}: {json.dumps(value)}" for key, value in told.items()] or ["Not recorded."]


def _limits(synthetic: bool) -> list[str]:
    first = (
        "Trained on a **synthetic phantom**: drawn images, no patient. It has never seen a real "
        "radiograph, and nothing measured on phantoms says how it does on one."
        if synthetic
        else "Features follow the scanners, the people and the findings in the data above; "
        "elsewhere they must be judged anew."
    )
    return [
        first,
        "Features can hold age, sex and other personal attributes. Horizontal flips in "
        "pre-training make left and right alike.",
    ]


def _is_encoder(directory: Path) -> bool:
    try:
        return "model_type" in json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError):
        return False


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(directory: Path, new: Path) -> None:
    for file in new.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
