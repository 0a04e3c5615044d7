"""Encoders that others publish in Hugging Face's layout, built by the transformers library.

A directory holds `config.json`, `preprocessor_config.json` and the weights: one file, or shards and
their index. The library builds the network and knows the names that its versions gave to
parameters; files are read, and held to the network, as everywhere in this package.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfray.errors import InputError, nearest, one_line
from selfray.models.encoder import Encoder, Tokens
from selfray.models.huggingface import PICKLED_WEIGHTS, WEIGHTS, read_json
from selfray.models.image_processor import read_image_processor
from selfray.models.language_model_files import quiet, transformers_library
from selfray.models.weights_file import check_names, read_tensors, sha256_of

Pooled = Literal["pooler", "first", "mean"]

_POSITION_IDS = r"(.*\.)?position_ids"  # counts 0, 1, 2, …, which older versions saved


@dataclass(frozen=True)
class _Kind:
    """What is to be known of one `model_type` beyond its two JSON files.

    Attributes:
        network: Class of transformers that is the vision tower alone.
        processor: Image processor where `preprocessor_config.json` names none, without
            `ImageProcessor`: what transformers takes then.
        pooled: What stands for the image: the tower's `pooler_output`, its first token, or the
            mean of its patch tokens.
        prefix: Tokens before the patches, without registers.
        whole: Class of the configuration that holds the tower's under `vision_config`.
        left_out: Regular expression of names in published files that are no part of the tower's
            features.
        arguments: Of the class.
        masks: Whether the network leaves patches out and shuffles them, which is switched off.
        any_size: Whether an input of another size than the configuration's is encoded as well.
    """

    network: str
    processor: str
    pooled: Pooled
    prefix: int = 1
    whole: str | None = None
    left_out: str = _POSITION_IDS
    arguments: dict[str, Any] = field(default_factory=dict)
    masks: bool = False
    any_size: bool = False


# CLIP: CLS after the last LayerNorm and before the projection to the space of texts, which is the
# feature that its authors' linear probes take; patches are not normalised (Radford et al. 2021,
# arXiv 2103.00020, section 3.2).
_CLIP = _Kind(
    "CLIPVisionModel", "CLIP", "pooler",
    left_out=rf"text_model\..*|text_projection\..*|visual_projection\..*|logit_scale|{_POSITION_IDS}",
)  # fmt: skip
# SigLIP has no CLS: an attention head pools the patches (Zhai et al. 2023, arXiv 2303.15343).
# SigLIP 2 of a fixed resolution is published as `siglip` too.
_SIGLIP = _Kind(
    "SiglipVisionModel", "Siglip", "pooler", prefix=0,
    left_out=rf"text_model\..*|logit_scale|logit_bias|{_POSITION_IDS}",
)  # fmt: skip

_KINDS = {
    "clip": _Kind(**{**vars(_CLIP), "whole": "CLIPConfig"}),
    "clip_vision_model": _CLIP,
    "siglip": _Kind(**{**vars(_SIGLIP), "whole": "SiglipConfig"}),
    "siglip_vision_model": _SIGLIP,
    # Positions are rotations by the patch's place, so that any size goes.
    "dinov3_vit": _Kind("DINOv3ViTModel", "DINOv3ViT", "pooler", any_size=True),
    "vit": _Kind(
        "ViTModel", "ViT", "first", arguments={"add_pooling_layer": False},
        left_out=r"(vit\.)?pooler\..*|classifier\..*",
    ),
    # CLS and the distillation token come before the patches.
    "deit": _Kind(
        "DeiTModel", "DeiT", "first", prefix=2, arguments={"add_pooling_layer": False},
        left_out=r"(deit\.)?pooler\..*|(cls_|distillation_)?classifier\..*",
    ),
    # The pooler is a mean of patches and a LayerNorm, or CLS, as the configuration says.
    "beit": _Kind(
        "BeitModel", "Beit", "pooler", left_out=r".*\.relative_position_index|classifier\..*"
    ),
    "vit_mae": _Kind(
        "ViTMAEModel", "ViT", "first", masks=True, left_out=r"decoder\..*"
    ),
    "vit_msn": _Kind("ViTMSNModel", "ViT", "first", left_out=r"classifier\..*"),
    # Without CLS; its authors average the patches (Assran et al. 2023, arXiv 2301.08243).
    "ijepa": _Kind("IJepaModel", "ViT", "mean", prefix=0, left_out=r"classifier\..*"),
}  # fmt: skip


def read_transformers(name: str, directory: Path) -> Encoder:
    """Read the vision tower of a directory in Hugging Face's layout.

    Args:
        name: Where it came from.
        directory: With `config.json`, `preprocessor_config.json`, and `model.safetensors`,
            `pytorch_model.bin` or the shards and index of either.

    Returns:
        The encoder on the CPU, float32. `cls` is CLIP's CLS after the last LayerNorm, SigLIP's
        attention pooling, and else CLS or what the publisher pools; registers are no patches.

    Raises:
        InputError: transformers is not installed, a file is missing or damaged, the
            architecture is not supported, or the parameters are not exactly the network's.
    """
    transformers = transformers_library(str(directory), extra="encoders")
    file = directory / "config.json"
    settings = read_json(file)
    kind = _kind_of(settings, file)
    config = _configuration(transformers, kind, settings, file)
    preprocessing = read_image_processor(directory / "preprocessor_config.json", kind.processor)
    side, patch = preprocessing.size, config.patch_size
    if not kind.any_size and side != config.image_size:
        raise InputError(
            f"{directory}: preprocessor_config.json makes images of {side} pixels, config.json "
            f"asks for {config.image_size}. Take both from the same model."
        )
    if kind.any_size and side % patch:
        raise InputError(
            f"{directory}: preprocessor_config.json makes images of {side} pixels, no multiple of "
            f"the patch of {patch}. Use {side // patch * patch or patch}."
        )
    files = _weight_files(directory)
    tower = _loaded(getattr(transformers, kind.network), kind, config, files)
    grid = (side // patch, side // patch)
    prefix = kind.prefix + getattr(config, "num_register_tokens", 0)
    return Encoder(
        name,
        _Tower(tower, kind.pooled, prefix, grid[0] * grid[1] if kind.masks else None),
        preprocessing,
        width=config.hidden_size,
        grid=grid,
        weights_sha256=_sha256_of_all(files),
    )


class _Tower(nn.Module):
    """A vision tower of transformers that answers with `Tokens`.

    Args:
        tower: It.
        pooled: As for `_Kind`.
        prefix: Tokens before the patches, registers among them.
        shuffled: Number of patches where the tower sorts them by a noise, as MAE's does also
            when it leaves none out.
    """

    rising: Tensor | None

    def __init__(self, tower: nn.Module, pooled: Pooled, prefix: int, shuffled: int | None) -> None:
        super().__init__()
        self.tower, self.pooled, self.prefix = tower, pooled, prefix
        rising = None if shuffled is None else torch.arange(shuffled)
        self.register_buffer("rising", rising, persistent=False)

    def forward(self, images: Tensor) -> Tokens:
        """Images [B, 3, S, S] to pooled [B, D] and patches [B, h*w, D]."""
        order = {} if self.rising is None else {"noise": self.rising.expand(len(images), -1)}
        found = self.tower(pixel_values=images, **order)
        tokens = found.last_hidden_state
        patches = tokens[:, self.prefix :]
        if self.pooled == "mean":
            return Tokens(patches.mean(dim=1), patches)
        return Tokens(tokens[:, 0] if self.pooled == "first" else found.pooler_output, patches)


def _kind_of(settings: Mapping[str, Any], file: Path) -> _Kind:
    model_type = settings.get("model_type")
    if not isinstance(model_type, str) or model_type not in _KINDS:
        known = ["dinov2", "dinov2_with_registers", *_KINDS]
        raise InputError(
            f"{file}: model_type is {model_type!r}, which is not supported. "
            f"{nearest(str(model_type), known)}"
        )
    if settings.get("quantization_config"):
        raise InputError(f"{file}: the weights are quantised, allowed: float. Take those.")
    return _KINDS[model_type]


def _configuration(
    transformers: ModuleType, kind: _Kind, settings: dict[str, Any], file: Path
) -> Any:
    """The tower's configuration, an object of transformers."""
    from huggingface_hub.errors import StrictDataclassError

    if kind.whole and not (settings.get("vision_config") or settings.get("vision_config_dict")):
        raise InputError(f"{file}: vision_config is missing. Take the file of the whole model.")
    network = getattr(transformers, kind.network)
    try:
        with quiet(transformers):
            if kind.whole:
                config = getattr(transformers, kind.whole).from_dict(settings).vision_config
            else:
                config = network.config_class.from_dict(settings)
            if kind.masks:
                config.mask_ratio = 0.0
    except (StrictDataclassError, TypeError, ValueError, AttributeError) as cause:
        raise InputError(f"{file}: {one_line(cause)}. Copy the file anew.") from cause
    for setting, value in (("patch_size", config.patch_size), ("image_size", config.image_size)):
        if not isinstance(value, int) or value < 1:
            raise InputError(f"{file}: {setting} is {value}, allowed: one whole number (a square).")
    if config.hidden_size % config.num_attention_heads:
        raise InputError(
            f"{file}: hidden_size is {config.hidden_size}, no multiple of num_attention_heads "
            f"{config.num_attention_heads}. Copy the file anew."
        )
    if config.num_channels != 3:
        raise InputError(f"{file}: num_channels is {config.num_channels}, allowed: 3.")
    if not getattr(config, "vision_use_head", True):
        raise InputError(f"{file}: vision_use_head is false, allowed: true. It pools the patches.")
    return config


def _weight_files(directory: Path) -> list[Path]:
    """The file with the weights, or its shards in the order of their names."""
    for single in (WEIGHTS, PICKLED_WEIGHTS):
        if (directory / single).is_file():
            return [directory / single]
        index = directory / f"{single}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise InputError(f"{index}: weight_map is missing. Copy the file anew.")
            files = [directory / shard for shard in sorted(set(map(str, shards.values())))]
            for file in files:
                if file.parent != directory or not file.is_file():
                    raise InputError(
                        f"{index} names {file.name}, which is not beside it. Copy all shards there."
                    )
            return files
    raise InputError(f"{directory} has no {WEIGHTS}. Put the encoder's {WEIGHTS} there.")


def _sha256_of_all(files: list[Path]) -> str:
    """SHA-256 of one file; of several, that of their hexadecimal SHA-256, a line each."""
    digests = [sha256_of(file) for file in files]
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _loaded(network: Any, kind: _Kind, config: Any, files: list[Path]) -> nn.Module:
    """The network with its weights: all of them or an error.

    transformers' own loader is given the tensors, because it knows which name its installed
    version has for a published parameter, and computes the buffers that no file holds. What it
    says of missing, unexpected and misshapen parameters is an error here, where it only warns.
    """
    file = files[0] if len(files) == 1 else files[0].parent
    tensors: dict[str, Tensor] = {}
    for part in files:
        tensors |= read_tensors(part)
    left_out = re.compile(kind.left_out)
    tensors = {name: t for name, t in tensors.items() if not left_out.fullmatch(name)}
    import transformers

    try:
        with quiet(transformers):
            model, info = network.from_pretrained(
                None,
                **kind.arguments,
                config=config,
                state_dict=dict(tensors),
                attn_implementation="sdpa",
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, TypeError, KeyError, RuntimeError) as cause:
        raise InputError(
            f"{file}: {one_line(cause)}. Take weights and config.json from the same model."
        ) from cause
    for name, found, asked in sorted(info["mismatched_keys"]):
        raise InputError(
            f"{file}: {name} is {list(found)}, config.json asks for {list(asked)}. "
            "Take both from the same model."
        )
    check_names(info["missing_keys"], info["unexpected_keys"], file)
    if len(tensors) != len(model.state_dict()):
        raise InputError(
            f"{file}: {len(tensors)} tensors for {len(model.state_dict())} parameters: some are "
            "there twice, under two names. Take the publisher's file."
        )
    return model
