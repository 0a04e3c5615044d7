"""From 8-bit pixels to an encoder's input, as the encoder's publisher does it.

Torch is imported inside functions, so that processes that only decode and resize start fast.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from selfray.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

Filter = Literal["bicubic", "bilinear", "lanczos", "nearest", "box", "hamming"]
_PILLOW_FILTERS: dict[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}

# An image that has so many times the pixels that an encoder sees, on each side, can be averaged
# down: what comes out is off by 0.3 to 0.6 gray values of 255 in the mean; at 1.2 times by 2.
REDUCED = 1.9


@dataclass(frozen=True)
class Preprocessing:
    """Resize, take the central square, scale to 0..1, normalise.

    Attributes:
        size: Side of the square input, pixels.
        mean: Of each channel, taken off the values 0..1.
        std: Of each channel, divided by then.
        shortest_edge: Length of the shorter side after the resize, pixels, >= `size`; None where
            both sides become as long as `both_sides`.
        filter: Of the resize, with antialiasing.
        resized_as: `uint8` rounds to whole gray values after the resize, as Pillow does; `float`
            does not, as torchvision on tensors that were scaled before.
        odd_margin: Which pixel the crop begins with where an odd number is cut off: `floor`, as
            transformers, or `even`, as torchvision (half rounded to the even number).
        both_sides: Length of both sides after the resize, pixels, >= `size`, whatever the image's
            shape; None stands for `size`. Not together with `shortest_edge`.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shortest_edge: int | None = None
    filter: Filter = "bicubic"
    resized_as: Literal["uint8", "float"] = "uint8"
    odd_margin: Literal["floor", "even"] = "floor"
    both_sides: int | None = None

    def __post_init__(self) -> None:
        shorter = self.both_sides if self.shortest_edge is None else self.shortest_edge
        if shorter is not None and shorter < self.size:
            raise InputError(
                f"the shorter side becomes {shorter} pixels, less than the crop of "
                f"{self.size}. Take the preprocessing from the encoder's publisher."
            )

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """Make an image fit.

        Args:
            pixels: uint8, gray [H, W] or colour [H, W, 3], 0 is black.

        Returns:
            Float32 [C, size, size], C being the number of means.

        Raises:
            InputError: Not 8-bit, or of another shape.
        """
        import torch

        return self.normalise(torch.from_numpy(self.square(pixels)))

    def square(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop, which is all that must be done image by image.

        Args:
            pixels: uint8, gray [H, W] or colour [H, W, 3], 0 is black.

        Returns:
            [1, size, size] of gray, [3, size, size] of colour images; uint8, or float32 0..1
            where `resized_as` is `float`.

        Raises:
            InputError: Not 8-bit, or of another shape.
        """
        require_eight_bits(pixels)
        if pixels.ndim == 3 and len(self.mean) != 3:
            raise InputError("pixels are colour, allowed: gray. Convert the image first.")
        planes = np.moveaxis(pixels, 2, 0) if pixels.ndim == 3 else pixels[None]
        return np.stack([self._square(np.ascontiguousarray(plane)) for plane in planes])

    def square_nearly(self, pixels: np.ndarray) -> np.ndarray:
        """As `square`; large gray images by area averages, which takes half of the time or less."""
        require_eight_bits(pixels)
        height, width = self.new_shape(*pixels.shape[:2])
        large = min(pixels.shape[0] / height, pixels.shape[1] / width) >= REDUCED
        if pixels.ndim == 3 or not large or self.resized_as == "float" or self.filter == "nearest":
            return self.square(pixels)
        import cv2

        image = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        return image[None, *self._window(height, width)]

    def normalise(self, squares: Tensor) -> Tensor:
        """From what `square` gives, [..., 1 or 3, size, size], to float32 [..., C, size, size]."""
        import torch

        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=squares.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        scaled = squares.float() / 255 if squares.dtype == torch.uint8 else squares
        return (scaled - mean) / std

    @property
    def shorter_side(self) -> int:
        """Length after the resize, before the crop, pixels: more is not seen."""
        return self.shortest_edge or self.both_sides or self.size

    def new_shape(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before the crop."""
        if self.shortest_edge is None:
            side = self.both_sides or self.size
            return side, side
        short = min(height, width)
        return int(self.shortest_edge * height / short), int(self.shortest_edge * width / short)

    def seen(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Top, left, bottom and right edge of what the encoder sees, in pixels of the image."""
        new_height, new_width = self.new_shape(height, width)
        rows, columns = self._window(new_height, new_width)
        down, across = height / new_height, width / new_width
        return rows.start * down, columns.start * across, rows.stop * down, columns.stop * across

    def description(self) -> dict[str, Any]:
        """What must be equal for inputs to be equal; can be written as JSON."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    def _square(self, plane: np.ndarray) -> np.ndarray:
        """[H, W] uint8 to [size, size], uint8 or float32 0..1."""
        height, width = self.new_shape(*plane.shape)
        window = self._window(height, width)
        if self.resized_as == "float":
            return self._interpolated(plane, height, width)[window]
        image = Image.fromarray(plane)
        if (width, height) != image.size:
            image = image.resize((width, height), _PILLOW_FILTERS[self.filter])
        return np.asarray(image)[window]

    def _interpolated(self, plane: np.ndarray, height: int, width: int) -> np.ndarray:
        """[H, W] uint8 to [height, width] float32 0..1."""
        import torch
        import torch.nn.functional as F

        image = torch.from_numpy(plane.copy()).float()[None, None] / 255
        image = F.interpolate(image, (height, width), mode=self.filter, antialias=True)
        return image[0, 0].numpy()

    def _window(self, height: int, width: int) -> tuple[slice, slice]:
        """The central square of an image of this shape."""
        top, left = self._margin(height), self._margin(width)
        return slice(top, top + self.size), slice(left, left + self.size)

    def _margin(self, side: int) -> int:
        cut = side - self.size
        return cut // 2 if self.odd_margin == "floor" else round(cut / 2)


def require_eight_bits(pixels: np.ndarray) -> None:
    """Refuse what is no image of 8 bits.

    Raises:
        InputError: Not uint8 [H, W] or [H, W, 3], or empty.
    """
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if pixels.dtype == np.uint8 and shaped and pixels.size:
        return
    if not pixels.size:
        advice = "It has no pixels: give an image that has some."
    elif pixels.dtype != np.uint8:
        advice = (
            "Scale the values to 0..255 first: an encoder that is given another range answers the "
            "same for every image."
        )
    else:
        advice = _of_shape(pixels.shape)
    raise InputError(
        f"pixels are {pixels.dtype} {list(pixels.shape)}, allowed: uint8 [H, W] or [H, W, 3], "
        f"0 to 255. {advice}"
    )


def _of_shape(shape: tuple[int, ...]) -> str:
    """What to do with 8-bit pixels of a shape that no image has."""
    if len(shape) == 3 and shape[2] in (1, 2):
        return "Take the gray channel: image[..., 0]."
    if len(shape) == 3 and shape[2] == 4:
        return "Take the channels without transparency: image[..., :3]."
    if len(shape) == 3 and shape[0] == 1:
        return "Take the gray channel, or the only image: image[0]."
    if len(shape) == 3 and shape[0] == 3:
        return (
            "Channels go last: np.moveaxis(image, 0, 2); or give several gray images as a list: "
            "list(images)."
        )
    if len(shape) in (3, 4):
        return "Give several images as a list: list(images)."
    return "Give the pixels in rows and columns."
