"""timm's names and arguments for a DINOv2-type vision transformer.

timm's names are DINOv2's, but for the following (timm/models/vision_transformer.py, its entry
points `vit_*_patch14_dinov2` and `vit_*_patch14_reg4_dinov2`): SwiGLU's layers are `fc1` and
`fc2`; there is no mask token; and with registers, which are `reg_token`, position embeddings are
of the patches alone, CLS holding its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import ARCHITECTURES, VisionTransformer

_RENAMED = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}
_SIZES = ("small", "base", "large", "giant")  # those of ours that timm has by name
_REGISTERS = 4  # of timm's entry points that have any
_PATCH = 14


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename our parameters to timm's.

    Args:
        state: All parameters of a `VisionTransformer`; not changed.
    """
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in _RENAMED.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    del renamed["mask_token"]
    if "register_tokens" in renamed:
        positions = renamed["pos_embed"]
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + positions[:, :1]
        renamed["pos_embed"] = positions[:, 1:].contiguous()
    return renamed


def timm_arguments(model: VisionTransformer, image_size: int) -> tuple[str, dict[str, Any]]:
    """The name and the arguments by which `timm.create_model` makes this network.

    Args:
        model: The network.
        image_size: Side of the square input, pixels.

    Returns:
        The entry point of the same size where timm has one, else that of the nearest kind, and
        all arguments in which the network differs from it.
    """
    shape, registers = model.shape, model.registers
    same = [size for size in _SIZES if ARCHITECTURES[f"vit_{size}"] == shape]
    size = same[0] if same else {"mlp": "small", "swiglu": "giant"}[shape.ffn]
    kind = f"_reg{_REGISTERS}" if registers else ""
    arguments: dict[str, Any] = {"img_size": image_size, "num_classes": 0}
    if not same:
        arguments |= {"embed_dim": shape.width, "depth": shape.depth, "num_heads": shape.heads}
        if shape.ffn == "swiglu":  # timm takes the whole part of width times ratio: both halves
            arguments["mlp_ratio"] = (2 * shape.hidden + 0.5) / shape.width
    if model.patch_size != _PATCH:
        arguments["patch_size"] = model.patch_size
    if registers not in (0, _REGISTERS):
        arguments["reg_tokens"] = registers
    return f"vit_{size}_patch{_PATCH}{kind}_dinov2", arguments


def timm_config(model: VisionTransformer, preprocessing: Preprocessing) -> dict[str, Any]:
    """`config.json` of a directory that `timm.create_model("local-dir:...")` opens.

    Args:
        model: The network.
        preprocessing: Of its input. Told in timm's words, which do not hold all of it.
    """
    side = preprocessing.size
    name, arguments = timm_arguments(model, side)
    before_crop = preprocessing.shortest_edge or preprocessing.both_sides or side
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.width,
        "global_pool": "token",
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": preprocessing.filter,
            "crop_pct": side / before_crop,
            "crop_mode": "squash" if preprocessing.shortest_edge is None else "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
