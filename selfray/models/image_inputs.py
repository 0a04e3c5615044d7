"""What a caller has as an image, and the 8-bit pixels that it stands for exactly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from PIL import Image
from torch import Tensor

from selfray.data.radiograph import read_eight_bits
from selfray.errors import InputError
from selfray.models.preprocessing import require_eight_bits

ImageInput: TypeAlias = "Image.Image | np.ndarray | Tensor | str | PathLike[str]"
"""A Pillow image; an array or tensor, uint8 [H, W] or [H, W, 3]; the path of a DICOM, PNG, JPEG or
TIFF file."""

# Pillow's modes that become gray or RGB without a loss, and what they become.
_EXACT = {"L": "L", "RGB": "RGB", "1": "L", "P": "RGB"}
_WITH_ALPHA = {"LA": "L", "RGBA": "RGB"}
_SCALE = (
    "Scale it first, for example np.rint((x - x.min()) / (x.max() - x.min()) * "
    "255).astype(np.uint8)."
)


def eight_bit_images(images: ImageInput | Iterable[ImageInput]) -> Iterator[np.ndarray]:
    """Bring images to the form that preprocessing takes, one after the other.

    A file must be one gray image. DICOM and images of more than 8 bits are stretched, so that the
    darkest pixel becomes 0 and the brightest 255; nothing else is.

    Args:
        images: One or several.

    Yields:
        uint8 [H, W] or [H, W, 3] of each.

    Raises:
        InputError: One is no image of 8 bits, or cannot be read. The message names it by its
            position, since a file's name may identify a patient.
    """
    names = isinstance(images, np.ndarray) and images.dtype.kind in "OU" and images.ndim > 0
    one = isinstance(images, Image.Image | np.ndarray | Tensor | str | PathLike) and not names
    if one or not isinstance(images, Iterable):
        yield _eight_bit_pixels(cast(ImageInput, images))
        return
    for position, image in enumerate(cast(Iterable[ImageInput], images)):
        try:
            yield _eight_bit_pixels(image)
        except InputError as cause:
            raise InputError(f"image {position}: {cause}") from None


def _eight_bit_pixels(image: ImageInput) -> np.ndarray:
    if isinstance(image, str | PathLike):
        try:
            return read_eight_bits(Path(image))
        except InputError as cause:
            raise InputError(f"the file {cause}. Give a radiograph's file.") from None
    if isinstance(image, Image.Image):
        return _of_pillow(image)
    if not isinstance(image, np.ndarray | Tensor):
        raise InputError(
            f"a {type(image).__name__} is no image. Give a path, a Pillow image, or uint8 pixels "
            "[H, W] or [H, W, 3]."
        )
    pixels = np.asarray(image.cpu() if isinstance(image, Tensor) else image)
    if pixels.dtype.kind not in "biuf":
        raise InputError(
            f"an array of {pixels.dtype} {list(pixels.shape)} is no image. Give a path, a Pillow "
            "image, uint8 pixels [H, W] or [H, W, 3], or a list of these."
        )
    if pixels.dtype != np.uint8 and pixels.size:
        low, high = float(pixels.min()), float(pixels.max())
        raise InputError(
            f"pixels are {pixels.dtype}, {low:g} to {high:g}, allowed: uint8, 0 to 255. Values "
            "of another range, 0..1 or 16 bits, give features that hardly depend on the image. "
            f"{_SCALE}"
        )
    require_eight_bits(pixels)
    return pixels


def _of_pillow(image: Image.Image) -> np.ndarray:
    if image.mode in _WITH_ALPHA:
        if np.asarray(image)[..., -1].min() < 255:
            raise InputError(
                f"the Pillow image ({image.mode}) has transparent pixels, whose colour depends on "
                "what is behind them. Paste it on black first."
            )
        return np.asarray(image.convert(_WITH_ALPHA[image.mode]))
    if image.mode not in _EXACT or "transparency" in image.info:
        deep = image.mode == "F" or image.mode.startswith("I")
        advice = f"Pillow would clip its values at 255. {_SCALE}" if deep else "Convert it first."
        raise InputError(
            f"the Pillow image has mode {image.mode}"
            f"{' with transparency' if 'transparency' in image.info else ''}, allowed: L or RGB "
            f"of 8 bits, or what becomes such without a loss. {advice}"
        )
    return np.asarray(image.convert(_EXACT[image.mode]))
