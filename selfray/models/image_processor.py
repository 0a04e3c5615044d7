"""`preprocessor_config.json` of transformers' image processors, as a `Preprocessing`.

Those of Pillow are followed, which published encoders came with. transformers takes its torchvision
ones where torchvision is installed: they differ by a gray level where an image is made smaller, and
by up to four were seen where noise is enlarged. DINOv3's exists for torchvision alone: it scales to
0..1 first and resizes after, without rounding to whole gray levels.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from selfray.errors import InputError, nearest
from selfray.models.huggingface import read_json
from selfray.models.preprocessing import Filter, Preprocessing

# Pillow's numbers, which `resample` holds.
_FILTERS: dict[int, Filter] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
    4: "box",
    5: "hamming",
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _defaults(
    size: int | dict[str, int], resample: int, mean: tuple[float, ...], std: tuple[float, ...],
    crop: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "size": size,
        "resample": resample,
        "image_mean": mean,
        "image_std": std,
        "do_center_crop": crop is not None,
        "crop_size": crop,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "rescale_factor": 1 / 255,
    }


# Class attributes of transformers' processors: what a file that leaves a field out means.
_HALF = (0.5, 0.5, 0.5)
_SHORTER_224 = {"shortest_edge": 224}
_DEFAULTS = {
    "CLIP": _defaults(_SHORTER_224, 3, _CLIP_MEAN, _CLIP_STD, crop=224),
    "Bit": _defaults(_SHORTER_224, 3, _CLIP_MEAN, _CLIP_STD, crop=224),
    "Siglip": _defaults({"height": 224, "width": 224}, 3, _HALF, _HALF),
    "ViT": _defaults({"height": 224, "width": 224}, 2, _HALF, _HALF),
    "DeiT": _defaults({"height": 256, "width": 256}, 3, _HALF, _HALF, crop=224),
    "Beit": _defaults({"height": 224, "width": 224}, 3, _HALF, _HALF),
    "DINOv3ViT": _defaults({"height": 224, "width": 224}, 2, _IMAGENET_MEAN, _IMAGENET_STD),
}
# Where `size` is one number: these mean the shorter side by it, others both sides.
_NUMBER_IS_SHORTER_SIDE = ("CLIP", "Bit", "Siglip")
_NAME = re.compile(r"(?P<stem>\w+?)(ImageProcessor|FeatureExtractor)(Fast|Pil)?")


def read_image_processor(file: Path, otherwise: str) -> Preprocessing:
    """Understand `preprocessor_config.json`.

    Args:
        file: It.
        otherwise: The processor where the file names none: `CLIP` stands for
            `CLIPImageProcessor`, and so on.

    Raises:
        InputError: The file is missing or damaged, of another processor, or asks for something
            else than a resize, a square, 1/255, and normalisation.
    """
    given = read_json(file)
    stem = _stem(given, file, otherwise)
    config = {**_DEFAULTS[stem], **given}
    for step in ("do_resize", "do_rescale", "do_normalize"):
        _require(file, step, config[step], True)
    _require(file, "do_pad", config.get("do_pad") or False, False)
    factor = config["rescale_factor"]
    if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        _require(file, "rescale_factor", factor, 1 / 255)
    float_path = stem == "DINOv3ViT"
    allowed = (2, 3) if float_path else tuple(_FILTERS)
    if config["resample"] not in allowed:
        raise InputError(
            f"{file}: resample is {config['resample']!r}, allowed: "
            f"{', '.join(f'{number} ({_FILTERS[number]})' for number in allowed)}."
        )
    mean, std = (_three(file, name, config[name]) for name in ("image_mean", "image_std"))
    shortest_edge, both_sides = _resize(file, stem, config["size"])
    if config["do_center_crop"]:
        size = _square(file, "crop_size", config["crop_size"])
    elif both_sides is not None:
        size = both_sides
    else:
        raise InputError(
            f"{file}: size is {config['size']} without a crop, so that images are no squares, "
            "allowed: do_center_crop true. Encoders of another kind are not supported."
        )
    try:
        return Preprocessing(
            size,
            mean,
            std,
            shortest_edge,
            _FILTERS[config["resample"]],
            "float" if float_path else "uint8",
            both_sides=both_sides,
        )
    except InputError as cause:
        raise InputError(f"{file}: {cause}") from None


def _stem(given: dict[str, Any], file: Path, otherwise: str) -> str:
    name = given.get("image_processor_type") or given.get("feature_extractor_type")
    if name is None:
        return otherwise
    match = _NAME.fullmatch(str(name))
    if match is None or match["stem"] not in _DEFAULTS:
        known = [f"{stem}ImageProcessor" for stem in _DEFAULTS]
        raise InputError(
            f"{file}: image_processor_type is {name!r}, which is not supported. "
            f"{nearest(str(name), known)}"
        )
    return match["stem"]


def _resize(file: Path, stem: str, size: Any) -> tuple[int | None, int | None]:
    """Length of the shorter side after the resize, or of both sides; the other is None."""
    if isinstance(size, int) and stem in _NUMBER_IS_SHORTER_SIDE:
        size = {"shortest_edge": size}
    if isinstance(size, dict) and set(size) == {"shortest_edge"}:
        return _positive(file, "size.shortest_edge", size["shortest_edge"]), None
    return None, _square(file, "size", size)


def _square(file: Path, name: str, size: Any) -> int:
    if isinstance(size, dict) and set(size) == {"height", "width"}:
        _require(file, f"{name}.width", size["width"], size["height"])
        size = size["height"]
    return _positive(file, name, size)


def _three(file: Path, name: str, values: Any) -> tuple[float, ...]:
    numbers = isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values)
    if not numbers or len(values) != 3:
        raise InputError(
            f"{file}: {name} is {values!r}, allowed: three numbers. "
            "Take the file from the encoder's publisher."
        )
    return tuple(map(float, values))


def _positive(file: Path, name: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise InputError(
            f"{file}: {name} is {value!r}, allowed: a whole number of pixels. "
            "Encoders of another kind are not supported."
        )
    return value


def _require(file: Path, field: str, found: object, allowed: object) -> None:
    if found != allowed:
        raise InputError(
            f"{file}: {field} is {found!r}, allowed: {allowed!r}. "
            "Encoders of another kind are not supported."
        )
