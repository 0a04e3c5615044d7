"""The image tower of a CLIP in open_clip's Hugging Face layout, such as BiomedCLIP's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from selfray.errors import InputError
from selfray.models.encoder import Encoder, vit_encoder
from selfray.models.huggingface import read_json
from selfray.models.plain_vit import kept, read_plain_vit
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import ARCHITECTURES
from selfray.models.weights_file import read_tensors, sha256_of

CONFIG = "open_clip_config.json"
# open_clip's names (its constants.py), in the order in which it prefers them.
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_TOWER = re.compile(r"vit_(?P<size>tiny|small|base|large)_patch(?P<patch>\d+)_(?P<pixels>\d+)")
# The text tower, the temperature, and what maps the 768 values of CLS to the 512 that are compared
# with text: no part of an image encoder that is probed.
_DROPPED = ("text.", "logit_scale", "logit_bias", "visual.head.")
# open_clip's PreprocessCfg (its transform.py) where the file is silent: OpenAI CLIP's numbers.
_DEFAULTS = {
    "mean": (0.48145466, 0.4578275, 0.40821073),
    "std": (0.26862954, 0.26130258, 0.27577711),
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
_FILTERS = ("bicubic", "bilinear")


def read_open_clip(name: str, directory: Path) -> Encoder:
    """Read a directory of open_clip's whose image tower is a plain ViT of timm.

    `cls` is the tower's CLS token after the last LayerNorm, 768 values in BiomedCLIP, and the
    patch tokens are after it too: before the projection to the 512 values that are compared with
    text, as linear probes of CLIP have it (Radford et al., Learning transferable visual models
    from natural language supervision, ICML 2021, appendix A.3).

    Args:
        name: What was asked for.
        directory: With `open_clip_config.json` and the weights of the whole CLIP.

    Raises:
        InputError: A file is missing or damaged, the tower is of another kind, or its parameters
            are not exactly those of its kind.
    """
    file = directory / CONFIG
    config = read_json(file)
    tower = _tower(config, file)
    weights = _weights(directory)
    model = read_plain_vit(kept(read_tensors(weights), "visual.trunk.", _DROPPED), weights)
    promised = (ARCHITECTURES[f"vit_{tower['size']}"], int(tower["patch"]), int(tower["pixels"]))
    if (model.shape, model.patch_size, model.image_size) != promised:
        raise InputError(
            f"{weights} is no {tower[0]}, which {CONFIG} names. Take both from the same model."
        )
    preprocessing = _preprocessing(config.get("preprocess_cfg", {}), model.image_size, file)
    return vit_encoder(name, model, preprocessing, weights_sha256=sha256_of(weights))


def _tower(config: dict[str, Any], file: Path) -> re.Match[str]:
    """The name of timm's that the image tower has, in parts."""
    vision = config.get("model_cfg", {}).get("vision_cfg", {})
    found = vision.get("timm_model_name")
    match = _TOWER.fullmatch(str(found))
    if match is None:
        raise InputError(
            f"{file}: timm_model_name is {found!r}, allowed: vit_SIZE_patchN_PIXELS, such as "
            "BiomedCLIP's vit_base_patch16_224. Other image towers are not supported."
        )
    if vision.get("timm_pool", "") not in ("", "token"):
        raise InputError(
            f"{file}: timm_pool is {vision['timm_pool']!r}, allowed: '' or 'token', where CLS "
            "speaks for the image. Other image towers are not supported."
        )
    if vision.get("image_size", int(match["pixels"])) != int(match["pixels"]):
        raise InputError(
            f"{file}: image_size is {vision['image_size']}, {found} asks for {match['pixels']}. "
            "Copy the file anew."
        )
    return match


def _weights(directory: Path) -> Path:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise InputError(
        f"{directory} has neither {' nor '.join(WEIGHTS)}. Put the model's file there."
    )


def _preprocessing(config: dict[str, Any], size: int, file: Path) -> Preprocessing:
    """`preprocess_cfg` as open_clip's `image_transform` for inference understands it.

    It resizes by Pillow, crops by torchvision's `CenterCrop`, and takes 0..1 by 255.
    """
    settings = {**_DEFAULTS, **config}
    if settings["interpolation"] not in _FILTERS:
        raise InputError(
            f"{file}: interpolation is {settings['interpolation']!r}, allowed: "
            f"{' or '.join(_FILTERS)}. Other image towers are not supported."
        )
    if settings["resize_mode"] not in ("shortest", "squash"):
        raise InputError(
            f"{file}: resize_mode is {settings['resize_mode']!r}, allowed: shortest or squash. "
            "Other image towers are not supported."
        )
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    if len(mean) != 3 or len(std) != 3:
        raise InputError(
            f"{file}: {len(mean)} means and {len(std)} standard deviations, allowed: three each. "
            "Copy the file anew."
        )
    return Preprocessing(
        size,
        mean,
        std,
        shortest_edge=size if settings["resize_mode"] == "shortest" else None,
        filter=settings["interpolation"],
        odd_margin="even",
    )
