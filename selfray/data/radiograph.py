"""One file (DICOM, PNG, JPEG, TIFF) → gray image and acquisition record; and its 8-bit form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from selfray.errors import BadImage, InputError

if TYPE_CHECKING:
    from PIL import Image

    from selfray.data.dicom import AcquisitionRecord

MIN_SIDE = 64
"""Shortest side read, in pixels: below it a chest radiograph is a thumbnail or an icon."""

MAX_ASPECT = 5
"""Largest length of the longer side in lengths of the shorter: that of the whole spine has 3."""

INTENSITIES = ("minmax", "percentile")

# A gray image stored in colour comes back from JPEG's YCbCr within 3 levels of gray (rounding).
# A radiograph may carry a small coloured mark; of a colour photograph far over 1 % is coloured.
COLOURED_SPREAD = 16 / 255
COLOURED_SHARE = 0.01

_BLOCK_ROWS = 32  # that stay in the cache while they are scaled

_RASTER_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",  # BigTIFF
    b"MM\0+": "TIFF",
}
# Pillow's modes of 8 bits a channel.
_EIGHT_BIT_MODES = frozenset({"L", "P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "YCbCr", "CMYK"})
_DICOM_SUFFIXES = frozenset({".dcm", ".dicom", ".dic", ".ima"})


@dataclass(frozen=True)
class Radiograph:
    """One radiograph as a reader would see it.

    Attributes:
        pixels: float32 [H, W], any range, higher is brighter, pixels square.
        record: What the file says of the acquisition.
    """

    pixels: np.ndarray
    record: AcquisitionRecord


def image_format(path: Path) -> str | None:
    """DICOM, PNG, JPEG, TIFF, or None for a file that is none of them.

    Judged by content. DICOM without a preamble has none to judge by, and is known by its suffix.
    """
    with path.open("rb") as file:
        head = file.read(132)
    if head[128:] == b"DICM":
        return "DICOM"
    for magic, name in _RASTER_MAGIC.items():
        if head.startswith(magic):
            return name
    return "DICOM" if path.suffix.lower() in _DICOM_SUFFIXES else None


def read_radiograph(path: Path) -> Radiograph:
    """Read one file.

    Args:
        path: DICOM, or PNG, JPEG or TIFF of 8 or 16 bits, gray or in colours that are all gray.

    Returns:
        Pixels and record.

    Raises:
        BadImage: The file holds no single gray image with something on it. The message is a
            reason alone, without path or header value, since both may identify a patient.
    """
    try:
        format_ = image_format(path)
    except OSError as cause:
        raise BadImage(
            f"cannot be read from disk ({cause.strerror or type(cause).__name__})"
        ) from None
    if format_ == "DICOM":
        from selfray.data.dicom import read_dicom

        pixels, record = read_dicom(path)
    elif format_ is not None:
        pixels, record = _read_raster(path, format_)
    else:
        raise BadImage("is no DICOM, PNG, JPEG or TIFF")
    if pixels.ndim == 3:
        pixels = _gray_of_colour(pixels)
    _require_radiograph(pixels)
    if not np.isfinite(pixels).all():
        raise BadImage("holds values that are not finite")
    return Radiograph(pixels.astype(np.float32, copy=False), record)


def read_eight_bits(path: Path, at_least: int | None = None) -> np.ndarray:
    """Read one file as encoders take it.

    Images of 8 bits are left as they are, as in every publisher's own code; DICOM and deeper
    images are stretched so that the darkest pixel becomes 0 and the brightest 255, as RAD-DINO
    does. (`selfray ingest` stretches all.)

    Args:
        path: As for `read_radiograph`.
        at_least: A gray JPEG may be decoded at a half, a quarter or an eighth of its size as long
            as its shorter side keeps so many pixels; None: whole.

    Returns:
        uint8 [H, W].

    Raises:
        BadImage: As for `read_radiograph`.
    """
    pixels = _gray_jpeg(path, at_least)
    if pixels is not None:
        return pixels
    radiograph = read_radiograph(path)
    eight_bits = radiograph.record.bits == 8 and radiograph.record.photometric in _EIGHT_BIT_MODES
    if eight_bits and image_format(path) != "DICOM":
        return np.rint(radiograph.pixels).astype(np.uint8)
    return to_eight_bits(radiograph.pixels)


def _gray_jpeg(path: Path, at_least: int | None) -> np.ndarray | None:
    """A JPEG without colours by the shortest way, or None for any other file."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=["JPEG"]) as image:
            if image.mode != "L":
                return None
            _require_size(image)
            if at_least is not None:
                share = max(at_least, MIN_SIDE) / min(image.size)
                image.draft("L", (math.ceil(image.width * share), math.ceil(image.height * share)))
            ImageOps.exif_transpose(image, in_place=True)
            pixels = np.asarray(image)
    except BadImage:
        raise
    except Exception:  # Pillow refuses in many ways; read_radiograph names each
        return None
    _require_radiograph(pixels)
    return pixels


def _require_radiograph(pixels: np.ndarray) -> None:
    height, width = pixels.shape
    if min(pixels.shape) < MIN_SIDE:
        raise BadImage(f"is {width} × {height} pixels; the shorter side must have {MIN_SIDE}")
    if max(pixels.shape) > MAX_ASPECT * min(pixels.shape):
        # Its shorter side at the size asked for, the longer one would fill the memory.
        raise BadImage(f"is over {MAX_ASPECT} times as long as wide: no radiograph")
    if pixels.min() == pixels.max():
        raise BadImage("is constant: all pixels have one value")


def resize_shorter_side(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resample so that the shorter side has `size` pixels; smaller images are enlarged.

    RAD-DINO resamples with SimpleITK's B-spline. That interpolates without antialiasing, which
    folds noise and grid lines into what is left when a detector's 3000 pixels become 518. This
    is the cubic kernel widened by the scale (Pillow on float32), the same way by which the
    encoder's own preprocessing resizes.

    Args:
        pixels: float32 [H, W].
        size: Pixels of the shorter side.
    """
    from PIL import Image

    height, width = pixels.shape
    scale = size / min(height, width)
    to = (max(size, round(width * scale)), max(size, round(height * scale)))
    return np.asarray(Image.fromarray(pixels).resize(to, Image.Resampling.BICUBIC))


def to_eight_bits(pixels: np.ndarray, intensity: str = "minmax") -> np.ndarray:
    """Map gray values to 0..255.

    Args:
        pixels: float32 [H, W].
        intensity: `minmax` makes the darkest pixel 0 and the brightest 255, as RAD-DINO does;
            `percentile` the 0.5th and 99.5th percentile, so that a lead marker or a dead pixel
            does not decide the contrast of the lungs.

    Returns:
        uint8 [H, W].

    Raises:
        BadImage: Black and white would be the same value.
        InputError: Unknown `intensity`.
    """
    if intensity not in INTENSITIES:
        raise InputError(f"intensity is {intensity!r}. Allowed: {', '.join(INTENSITIES)}.")
    if intensity == "minmax":
        black, white = float(pixels.min()), float(pixels.max())
    else:
        black, white = (float(v) for v in np.percentile(pixels, (0.5, 99.5)))
    if not white > black:
        raise BadImage("is all but constant: nothing is left between black and white")
    eight_bits = np.empty(pixels.shape, np.uint8)
    for first in range(0, len(pixels), _BLOCK_ROWS):
        block = pixels[first : first + _BLOCK_ROWS].astype(np.float64)
        block -= black
        block *= 255 / (white - black)
        np.clip(block, 0, 255, out=block)
        eight_bits[first : first + _BLOCK_ROWS] = np.rint(block, out=block)
    return eight_bits


def _read_raster(path: Path, format_: str) -> tuple[np.ndarray, AcquisitionRecord]:
    """Read PNG, JPEG or TIFF: pixels [H, W] or [H, W, 3], of the file's own range."""
    import struct
    import warnings
    import zlib

    from PIL import Image, UnidentifiedImageError

    # What Pillow's fuzzers list as its ways to refuse a file (Tests/test_fuzzers.py), and what
    # its plugins let slip on damaged directories and tags.
    damaged = (
        OSError,
        SyntaxError,
        ValueError,
        NotImplementedError,
        OverflowError,
        LookupError,
        TypeError,
        AttributeError,
        EOFError,
        RuntimeError,
        ArithmeticError,
        AssertionError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[format_]) as image:
                return _raster_pixels(image, path)
    except BadImage:
        raise
    except MemoryError:
        raise BadImage("needs more memory than there is") from None
    except UnidentifiedImageError:
        raise BadImage(f"is {format_} of a kind that is not read, or damaged") from None
    except Image.DecompressionBombError:
        raise BadImage("declares more pixels than are read") from None
    except damaged as cause:
        raise BadImage(f"{format_} is damaged or cut off ({type(cause).__name__})") from None


def _require_size(image: Image.Image) -> None:
    from selfray.data.dicom import MAX_PIXELS

    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"declares {height} × {width} pixels; at most {MAX_PIXELS:,} are read")


def _raster_pixels(image: Image.Image, path: Path) -> tuple[np.ndarray, AcquisitionRecord]:
    from PIL import ImageOps

    from selfray.data.dicom import AcquisitionRecord

    _require_size(image)
    if getattr(image, "n_frames", 1) != 1:
        raise BadImage("has several pages; a radiograph has one")
    if image.mode == "1":
        raise BadImage("has one bit a pixel")
    if _is_deep_colour_png(path):
        return _deep_colour_pixels(path), AcquisitionRecord(bits=16, photometric=image.mode)
    image = ImageOps.exif_transpose(image)
    record = AcquisitionRecord(bits=16 if image.mode.startswith("I") else 8, photometric=image.mode)
    if image.mode in ("L", "I", "F") or image.mode.startswith("I;16"):
        # White-is-zero TIFF: Pillow inverts 8 bits by itself, and refuses 16.
        return np.asarray(image).astype(np.float32), record
    if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa"):
        return _without_alpha(np.asarray(image.convert("RGBA"))), record
    return np.asarray(image.convert("RGB")), record


def _is_deep_colour_png(path: Path) -> bool:
    """Whether a file is a PNG of 16 bits a channel with colours or transparency."""
    with path.open("rb") as file:
        head = file.read(26)  # signature, length and name of IHDR, sizes, bits, colour type
    return _RASTER_MAGIC.get(head[:8]) == "PNG" and head[24] == 16 and head[25] != 0


def _deep_colour_pixels(path: Path) -> np.ndarray:
    """Such a PNG by OpenCV, since Pillow keeps the upper 8 bits only: uint16 [H, W, 3]."""
    import cv2

    pixels = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.ndim != 3:
        raise BadImage("PNG is damaged or cut off")
    return _without_alpha(pixels) if pixels.shape[2] == 4 else pixels


def _without_alpha(rgba: np.ndarray) -> np.ndarray:
    """Put an image with transparency [H, W, 4] on black: [H, W, 3] of the same type."""
    alpha = rgba[..., 3:].astype(np.float32) / np.iinfo(rgba.dtype).max
    return np.rint(rgba[..., :3] * alpha).astype(rgba.dtype)


def _gray_of_colour(pixels: np.ndarray) -> np.ndarray:
    """A gray image that was stored in colour: uint8 or uint16 [H, W, 3] → float32 [H, W].

    Raises:
        BadImage: It is in colour.
    """
    # Of 16 bits often 12 are in use.
    white = 255.0 if pixels.dtype == np.uint8 else max(1.0, float(pixels.max()))
    spread = (pixels.max(axis=2) - pixels.min(axis=2)) / white
    if (spread > COLOURED_SPREAD).mean() > COLOURED_SHARE:
        raise BadImage("is in colour: no radiograph")
    return pixels.astype(np.float32).mean(axis=2)
