"""The weights of a DINOv2-type vision transformer by the names of other libraries.

transformers, DINOv2's own class and timm bring position embeddings to another grid each in its own
way. Where the input's grid is another than that of the embeddings and the library would differ
from the encoder, the embeddings are written as interpolated for the input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfray.errors import InputError
from selfray.models.encoder import Encoder
from selfray.models.encoder_directory import float_state, write_model, write_tensors
from selfray.models.huggingface import ORIGINAL_WEIGHTS, WEIGHTS, to_huggingface
from selfray.models.preprocessing import Preprocessing
from selfray.models.timm_names import timm_config, to_timm
from selfray.models.vit import VisionTransformer

DINOV2_ARGUMENTS = "dinov2_arguments.json"


def write_huggingface(encoder: Encoder, directory: Path) -> None:
    """`config.json`, `model.safetensors` and, where it can say it, `preprocessor_config.json`."""
    model, state = encoder.vit, float_state(encoder.vit)
    if model.position_interpolation != ("bicubic-antialias" if model.registers else "bicubic"):
        model, state = _at_input_size(encoder)
    write_model(directory, model, to_huggingface(state), _preprocessing(encoder))


def write_dinov2(encoder: Encoder, directory: Path) -> None:
    """DINOv2's own names, its class's arguments, and the configuration that selfray reads."""
    model, state = encoder.vit, float_state(encoder.vit)
    write_model(directory, model, state, _preprocessing(encoder), ORIGINAL_WEIGHTS)
    _write_json(directory / DINOV2_ARGUMENTS, dinov2_arguments(model))


def write_timm(encoder: Encoder, directory: Path) -> None:
    """timm's names and its `config.json`."""
    _, state = _at_input_size(encoder)
    _write_json(directory / "config.json", timm_config(encoder.vit, _preprocessing(encoder)))
    write_tensors(to_timm(state), directory / WEIGHTS)


def dinov2_arguments(model: VisionTransformer) -> dict[str, Any]:
    """Arguments of `DinoVisionTransformer`, dinov2/models/vision_transformer.py.

    `block_chunks=0` gives the parameter names of the published weights, as in its
    dinov2/hub/backbones.py.
    """
    return {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.shape.heads,
        "mlp_ratio": 4,
        "init_values": 1.0,
        "ffn_layer": "swiglufused" if model.shape.ffn == "swiglu" else "mlp",
        "block_chunks": 0,
        "num_register_tokens": model.registers,
        "interpolate_antialias": model.position_interpolation == "bicubic-antialias",
        "interpolate_offset": 0.1 if model.position_interpolation == "bicubic-offset" else 0.0,
    }


def _at_input_size(encoder: Encoder) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """The network without weights, and the weights, as for position embeddings of the input."""
    model = encoder.vit
    state = float_state(model)
    with torch.device("meta"):
        described = VisionTransformer(
            model.shape,
            patch_size=model.patch_size,
            image_size=encoder.image_size,
            registers=model.registers,
        )
    with torch.no_grad():
        state["pos_embed"] = model.positions(*encoder.grid).float().cpu().contiguous()
    return described, state


def _preprocessing(encoder: Encoder) -> Preprocessing:
    if not isinstance(encoder.preprocessing, Preprocessing):
        raise InputError(
            f"{encoder.name} has a preprocessing of its own, for which these libraries have no "
            "place. Take onnx, openvino or torch."
        )
    return encoder.preprocessing


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
