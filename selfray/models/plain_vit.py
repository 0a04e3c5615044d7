"""Vision transformers by their tensors alone: of DINOv2's own files, and plain ones of others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from selfray.errors import InputError
from selfray.models.vit import ARCHITECTURES, Shape, VisionTransformer
from selfray.models.weights_file import check_names, load_exactly

_HEAD_WIDTH = 64  # of each attention head, in every ViT of Dosovitskiy et al. and of DINOv2
# What the size is read off, and its number of dimensions.
_SIZES = {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}
_ONLY_OURS = re.compile(r"mask_token|blocks\.\d+\.ls[12]\.gamma")


def kept(tensors: Mapping[str, Tensor], prefix: str, dropped: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of a part of a checkpoint.

    Args:
        tensors: All of a checkpoint.
        prefix: Taken off the names of those that are wanted.
        dropped: How names of the parts begin that the encoder does without.

    Returns:
        Those wanted, and under their own name those that are neither wanted nor known, so that a
        check of the names tells them.
    """
    wanted = {name: tensor for name, tensor in tensors.items() if not name.startswith(dropped)}
    return {name.removeprefix(prefix): tensor for name, tensor in wanted.items()}


def vit_of(tensors: Mapping[str, Tensor], file: Path) -> VisionTransformer:
    """The vision transformer that has such tensors, on the meta device.

    Args:
        tensors: By DINOv2's names, which timm and MAE share; LayerScale and mask token may lack.
        file: Where they are from, for errors.

    Raises:
        InputError: What sets the size is missing or of an impossible shape, or blocks are missing.
    """
    check_names(_SIZES, [name for name in _SIZES if name in tensors], file)
    for name, dimensions in _SIZES.items():
        if tensors[name].ndim != dimensions:
            raise InputError(
                f"{file}: {name} is {list(tensors[name].shape)}, allowed: {dimensions} dimensions. "
                "Copy the file anew."
            )
    width, patch_size = tensors["cls_token"].shape[-1], tensors["patch_embed.proj.weight"].shape[-1]
    if width % _HEAD_WIDTH:
        raise InputError(
            f"{file}: tokens have {width} values, allowed: a multiple of {_HEAD_WIDTH}. "
            "Other vision transformers are not supported."
        )
    grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    blocks = {int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name)}
    depth = max(blocks, default=0) + 1
    published = {a.depth for a in ARCHITECTURES.values() if a.width == width}
    if published and depth not in published:
        raise InputError(
            f"{file} has {depth} blocks of width {width}, allowed: "
            f"{' or '.join(map(str, sorted(published)))}. Copy the file anew."
        )
    ffn = "swiglu" if "blocks.0.mlp.w12.weight" in tensors else "mlp"
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    shape = Shape(width, depth, width // _HEAD_WIDTH, ffn)
    with torch.device("meta"):  # no time is spent on random weights that are replaced
        return VisionTransformer(
            shape, patch_size=patch_size, image_size=grid * patch_size, registers=registers
        )


def read_plain_vit(tensors: Mapping[str, Tensor], file: Path) -> VisionTransformer:
    """A vision transformer of timm or MAE, which has no LayerScale and no mask token.

    A LayerScale of 1 changes no value, and the mask token stands for no patch of an unmasked
    image. So it becomes one of ours, and training can continue it.

    Args:
        tensors: By the names of timm's `VisionTransformer`, without a head.
        file: Where they are from, for errors.

    Raises:
        InputError: A tensor is missing, left over or of another shape; the message names it.
    """
    model = vit_of(tensors, file)
    state = model.state_dict()
    check_names([name for name in state if not _ONLY_OURS.fullmatch(name)], tensors, file)
    added = {
        name: torch.ones(value.shape) if name.endswith("gamma") else torch.zeros(value.shape)
        for name, value in state.items()
        if _ONLY_OURS.fullmatch(name)
    }
    load_exactly(model, {**tensors, **added}, file)
    model.position_interpolation = "bicubic-antialias"  # timm's
    return model.eval()
