"""Baselines without a network: a thumbnail's pixels, and principal components of pixels."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from selfray.data.image_source import DatasetImages
from selfray.errors import InputError, nearest

PIXEL_ENCODERS = ("pixels:pca", "pixels:16x16")

_PCA_SIZE = 56  # pixels a side
_PCA_COMPONENTS = 256
_PCA_ROWS = 20_000  # at most so many training images fit the components
# Of the largest singular value. Below is float32's rounding, when training images repeat; a probe
# that scales it to standard deviation 1 would make it the largest feature of any other image.
_PCA_FLOOR = 1e-6
_THUMBNAIL_SIZE = 16


class Thumbnail:
    """The pixels of a small square image, 0 to 1, as features.

    Args:
        size: Side, pixels.

    Attributes:
        identity: What must be equal for features to be the same.
        widths: Shape of one row of each array.
    """

    def __init__(self, size: int = _THUMBNAIL_SIZE) -> None:
        self.size = size
        self.widths: dict[str, tuple[int, ...]] = {"cls": (size * size,)}
        self.identity: dict[str, Any] = {
            "weights_sha256": None,
            "synthetic": False,
            "preprocessing": {"image_size": size, "resize": "centre crop, area"},
        }

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        """One image, uint8 [H, W], to float32 [size * size]."""
        height, width = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side]
        small = cv2.resize(square, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return small.astype(np.float32).ravel() / 255

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays by name for a batch of prepared images [B, size * size]."""
        return {"cls": images}


class PixelComponents(Thumbnail):
    """The principal components of the pixels, fitted on the training split.

    Args:
        images: A dataset with a training split.
        workers: Threads that decode.
    """

    def __init__(self, images: DatasetImages, workers: int) -> None:
        from sklearn.decomposition import PCA

        super().__init__(_PCA_SIZE)
        rows = images.rows("train")
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _PCA_ROWS)).astype(int)]
        found = images.prepared(chosen.tolist(), self.prepare, workers=workers)
        pixels = np.stack([image for image in found if not isinstance(image, str)])
        components = min(_PCA_COMPONENTS, len(pixels) - 1)
        # PCA's own float32 mean of many rows is rounded by enough to pass for a component.
        self.mean = pixels.mean(axis=0, dtype=np.float64).astype(np.float32)
        pixels -= self.mean
        self.pca = PCA(components, svd_solver="randomized", random_state=0).fit(pixels)
        singular = self.pca.singular_values_  # largest first
        self.kept = int((singular >= _PCA_FLOOR * singular[0]).sum())
        self.widths = {"cls": (self.kept,)}
        self.identity["preprocessing"]["pca_components"] = self.kept

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays by name for a batch of prepared images."""
        components = self.pca.transform(images - self.mean)[:, : self.kept]
        return {"cls": components.astype(np.float32)}


def require_pixel_encoder(encoder: str, images: object) -> None:
    """Check that a baseline can be made.

    Args:
        encoder: One of `PIXEL_ENCODERS`.
        images: What `selfray.data.image_source.open_images` gives.

    Raises:
        InputError: Unknown, or there are no training images to fit components on.
    """
    if encoder not in PIXEL_ENCODERS:
        raise InputError(f"encoder {encoder!r} is unknown. {nearest(encoder, PIXEL_ENCODERS)}")
    if encoder != "pixels:pca":
        return
    count = len(images.rows("train")) if isinstance(images, DatasetImages) else 0
    if count < 2:
        raise InputError(
            f"the train split has {count} images; pixels:pca needs 2 or more. Leave pixels:pca "
            "out, or make the dataset with a train split."
        )


def open_pixel_encoder(encoder: str, images: object, workers: int) -> Thumbnail:
    """The baseline of that name; arguments as for `require_pixel_encoder`.

    Raises:
        InputError: It cannot be made.
    """
    require_pixel_encoder(encoder, images)
    if isinstance(images, DatasetImages) and encoder == "pixels:pca":
        return PixelComponents(images, workers)
    return Thumbnail()
