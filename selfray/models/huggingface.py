"""An encoder directory in Hugging Face's layout: parameter names, configuration, preprocessing.

`config.json`, `model.safetensors` and `preprocessor_config.json` are those of the published
DINOv2 and RAD-DINO repositories, so that `transformers.AutoModel.from_pretrained` reads what is
written here, and what they published is read here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfray.errors import InputError
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import Shape, VisionTransformer
from selfray.models.weights_file import check_names, load_exactly, read_tensors

WEIGHTS = "model.safetensors"
ORIGINAL_WEIGHTS = "backbone_compatible.safetensors"
"""DINOv2's own parameter names, which are ours; RAD-DINO publishes both files."""
PICKLED_WEIGHTS = "pytorch_model.bin"

BICUBIC = 3  # Pillow's number of the filter, which `resample` holds

# Our name without `.weight` and `.bias`, and Hugging Face's. Where there are several, ours is
# their concatenation along the first dimension.
_OUTSIDE = {
    "cls_token": ("embeddings.cls_token",),
    "mask_token": ("embeddings.mask_token",),
    "register_tokens": ("embeddings.register_tokens",),
    "pos_embed": ("embeddings.position_embeddings",),
    "patch_embed.proj": ("embeddings.patch_embeddings.projection",),
    "norm": ("layernorm",),
}
_IN_BLOCK = {
    "norm1": ("norm1",),
    "attn.qkv": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ),
    "attn.proj": ("attention.output.dense",),
    "ls1.gamma": ("layer_scale1.lambda1",),
    "norm2": ("norm2",),
    "mlp.fc1": ("mlp.fc1",),
    "mlp.fc2": ("mlp.fc2",),
    "mlp.w12": ("mlp.weights_in",),
    "mlp.w3": ("mlp.weights_out",),
    "ls2.gamma": ("layer_scale2.lambda1",),
}
_NAME = re.compile(r"(?:blocks\.(?P<block>\d+)\.)?(?P<stem>.+?)(?P<kind>\.weight|\.bias)?")

# What the published models agree on, and this encoder is built for.
_FIXED_CONFIG = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "mlp_ratio": 4,
    "num_channels": 3,
    "qkv_bias": True,
}
# Fields of a shape and the most that is believed, far above the largest published (giant: width
# 1536, 40 blocks): a damaged file must not ask for a network that fills the memory. [ours]
_LARGEST = {
    "hidden_size": 8192,
    "num_hidden_layers": 256,
    "num_attention_heads": 256,
    "patch_size": 64,
    "image_size": 4096,
}
_MOST_REGISTERS = 64
_MODEL_CLASSES = {
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}


def huggingface_names(name: str) -> tuple[str, ...]:
    """Hugging Face's name of one of our parameters, or the names of its parts in order."""
    match = _NAME.fullmatch(name)
    assert match is not None
    stem, kind = match["stem"], match["kind"] or ""
    if match["block"] is None:
        return tuple(theirs + kind for theirs in _OUTSIDE[stem])
    return tuple(f"encoder.layer.{match['block']}.{theirs}{kind}" for theirs in _IN_BLOCK[stem])


def to_huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our parameters to Hugging Face's; tensors are copied."""
    renamed = {}
    for name, tensor in state.items():
        parts = huggingface_names(name)
        renamed |= {
            theirs: part.clone()
            for theirs, part in zip(parts, tensor.chunk(len(parts)), strict=True)
        }
    return renamed


def from_huggingface(
    tensors: Mapping[str, Tensor], names: Iterable[str], file: Path
) -> dict[str, Tensor]:
    """Rename Hugging Face's parameters to ours.

    Args:
        tensors: By Hugging Face's names.
        names: Ours, all that the encoder has.
        file: Where they are from, for errors.

    Raises:
        InputError: A parameter is missing, one is left over, or those that belong together differ
            in shape; the message names them.
    """
    parts = {name: huggingface_names(name) for name in names}
    check_names({theirs for group in parts.values() for theirs in group}, tensors, file)
    ours = {}
    for name, group in parts.items():
        shapes = {tensors[theirs].shape for theirs in group}
        if len(group) > 1 and (len(shapes) > 1 or not min(shapes)):
            raise InputError(
                f"{file}: {', '.join(group)} have different or no shapes "
                f"({', '.join(str(list(shape)) for shape in sorted(shapes))}). Copy the file anew."
            )
        joined = [tensors[theirs] for theirs in group]
        ours[name] = torch.cat(joined) if len(joined) > 1 else joined[0]
    return ours


def read_model(directory: Path) -> tuple[VisionTransformer, Path]:
    """Build the encoder that a directory describes and load its weights.

    Returns:
        The encoder, float32, in evaluation mode, and the file that its weights are from.

    Raises:
        InputError: A file is missing or damaged, a setting is not supported, or the parameters
            are not exactly those of the encoder.
    """
    weights = _find_weights(directory)
    with torch.device("meta"):  # no time is spent on random weights that are replaced below
        model = _model_from_config(read_json(directory / "config.json"), directory)
    tensors = read_tensors(weights)
    if weights.name == ORIGINAL_WEIGHTS:
        model.position_interpolation = "bicubic-antialias" if model.registers else "bicubic-offset"
    else:
        tensors = from_huggingface(tensors, model.state_dict(), weights)
    load_exactly(model, tensors, weights)
    return model.eval(), weights


def read_preprocessing(directory: Path) -> Preprocessing:
    """Understand `preprocessor_config.json` of a `BitImageProcessor`.

    Raises:
        InputError: The file is missing or damaged, or asks for something else than a bicubic
            resize of the shorter side, a square central crop, 1/255, and normalisation.
    """
    file = directory / "preprocessor_config.json"
    config = read_json(file)
    for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        _require(file, step, config.get(step), True)
    _require(file, "resample", config.get("resample"), BICUBIC)
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        _require(file, "rescale_factor", factor, 1 / 255)
    crop, size = config.get("crop_size"), config.get("size")
    if not isinstance(crop, dict) or not isinstance(size, dict):
        raise InputError(
            f"{file}: crop_size is {crop} and size is {size}, allowed: {{height, width}} and "
            "{shortest_edge}. Take the file from the encoder's publisher."
        )
    most = _LARGEST["image_size"]
    side = whole_number(file, "crop_size.height", crop.get("height"), most)
    _require(file, "crop_size.width", crop.get("width"), side)
    shortest_edge = whole_number(file, "size.shortest_edge", size.get("shortest_edge"), most)
    mean, std = (_three_shares(file, config, field) for field in ("image_mean", "image_std"))
    try:
        return Preprocessing(side, mean, std, shortest_edge)
    except InputError as cause:
        raise InputError(f"{file}: {cause}") from None


def _three_shares(file: Path, config: dict[str, Any], field: str) -> tuple[float, ...]:
    """Mean or standard deviation of pixels that were divided by 255, one a channel."""
    values = config.get(field)
    numbers = values if isinstance(values, list) else []
    least = 1e-6 if field == "image_std" else 0.0  # is divided by
    fit = [isinstance(v, int | float) and least <= v <= 1 for v in numbers]
    if len(fit) != 3 or not all(fit):
        raise InputError(
            f"{file}: {field} is {values}, allowed: three each of 0 to 1, for pixels that were "
            "divided by 255. Take the file from the encoder's publisher."
        )
    return tuple(float(v) for v in numbers)


def whole_number(file: Path, field: str, value: object, most: int) -> int:
    """A size that a configuration gives.

    Args:
        file: Where it is from, for errors.
        field: Its name.
        value: What was found.
        most: The largest that is believed.

    Raises:
        InputError: It is missing, no whole number, below 1 or above `most`.
    """
    if value is None:
        raise InputError(f"{file}: '{field}' is missing. Copy the file anew.")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InputError(
            f"{file}: {field} is {value!r}, allowed: one whole number, 1 to {most}. "
            "Copy the file anew."
        )
    return value


def model_config(model: VisionTransformer) -> dict[str, Any]:
    """`config.json`, with the fields that the published RAD-DINO file has."""
    model_type = "dinov2_with_registers" if model.registers else "dinov2"
    registers = {"num_register_tokens": model.registers} if model.registers else {}
    stages = [f"stage{block}" for block in range(1, model.depth + 1)]
    return {
        **_FIXED_CONFIG,
        **registers,
        "apply_layernorm": True,
        "architectures": [_MODEL_CLASSES[model_type]],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_dropout_prob": 0.0,
        "hidden_size": model.width,
        "image_size": model.image_size,
        "initializer_range": 0.02,
        "layerscale_value": 1.0,
        "model_type": model_type,
        "num_attention_heads": model.shape.heads,
        "num_hidden_layers": model.depth,
        "out_features": stages[-1:],
        "out_indices": [model.depth],
        "patch_size": model.patch_size,
        "reshape_hidden_states": True,
        "stage_names": ["stem", *stages],
        "torch_dtype": "float32",
        "use_swiglu_ffn": model.shape.ffn == "swiglu",
    }


def preprocessor_config(preprocessing: Preprocessing) -> dict[str, Any] | None:
    """`preprocessor_config.json`, with the fields that the published RAD-DINO file has.

    Returns:
        The fields, or None where a `BitImageProcessor` does something else (`read_preprocessing`).
    """
    size, shortest_edge = preprocessing.size, preprocessing.shortest_edge
    fits = Preprocessing(size, preprocessing.mean, preprocessing.std, shortest_edge)
    if shortest_edge is None or len(preprocessing.mean) != 3 or preprocessing != fits:
        return None
    return {
        "crop_size": {"height": size, "width": size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(preprocessing.mean),
        "image_processor_type": "BitImageProcessor",
        "image_std": list(preprocessing.std),
        "resample": BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": shortest_edge},
    }


def is_dinov2(config: dict[str, Any]) -> bool:
    """Whether `config.json` is of an encoder that `read_model` reads."""
    return str(config.get("model_type")) in _MODEL_CLASSES


def _model_from_config(config: dict[str, Any], directory: Path) -> VisionTransformer:
    file = directory / "config.json"
    if not is_dinov2(config):
        raise InputError(
            f"{file}: model_type is {config.get('model_type')!r}, allowed: "
            f"{', '.join(_MODEL_CLASSES)}. Give the directory of such an encoder."
        )
    for field, value in _FIXED_CONFIG.items():
        _require(file, field, config.get(field, value), value)
    width, depth, heads, patch_size, image_size = (
        whole_number(file, field, config.get(field), most) for field, most in _LARGEST.items()
    )
    if width % heads:
        raise InputError(
            f"{file}: hidden_size is {width}, no multiple of num_attention_heads {heads}. "
            "Copy the file anew."
        )
    shape = Shape(width, depth, heads, "swiglu" if config.get("use_swiglu_ffn") else "mlp")
    registers = 0
    if config["model_type"] == "dinov2_with_registers":
        registers = whole_number(
            file, "num_register_tokens", config.get("num_register_tokens", 4), _MOST_REGISTERS
        )
    try:
        return VisionTransformer(
            shape, patch_size=patch_size, image_size=image_size, registers=registers
        )
    except InputError as cause:
        raise InputError(f"{file}: {cause}") from None


def _find_weights(directory: Path) -> Path:
    for name in (WEIGHTS, ORIGINAL_WEIGHTS, PICKLED_WEIGHTS):
        if (directory / name).is_file():
            return directory / name
    raise InputError(f"{directory} has no {WEIGHTS}. Put the encoder's {WEIGHTS} there.")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in one of an encoder directory's files.

    Raises:
        InputError: The file is missing or damaged.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as cause:
        raise InputError(
            f"{file} is missing or cannot be read. An encoder directory holds config.json, "
            f"preprocessor_config.json and {WEIGHTS}; copy it there."
        ) from cause
    except (ValueError, RecursionError) as cause:
        raise InputError(f"{file} is no JSON: {cause}. Copy it anew.") from cause
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object. Copy it anew.")
    return content


def _require(file: Path, field: str, found: object, allowed: object) -> None:
    if found != allowed:
        raise InputError(
            f"{file}: {field} is {found!r}, allowed: {allowed!r}. "
            "Encoders of another kind are not supported."
        )
