"""Random crops and multi-crop augmentation on one channel, from the 8-bit image, in OpenCV."""

from __future__ import annotations

import math

import cv2
import numpy as np

# A blur of 9 × 9 pixels whatever the sigma, as DINOv2 has it.
_BLUR_KERNEL = (9, 9)


class _RandomCrop:
    def __init__(
        self,
        *,
        aspect: tuple[float, float],
        flip: float,
        jitter: float,
        brightness: float,
        contrast: float,
        blur_sigma: tuple[float, float],
    ) -> None:
        self.aspect, self.flip = aspect, flip
        self.jitter, self.brightness, self.contrast = jitter, brightness, contrast
        self.blur_sigma = blur_sigma

    def _crop(
        self,
        pixels: np.ndarray,
        size: int,
        scale: tuple[float, float],
        blur: float,
        generator: np.random.Generator,
    ) -> np.ndarray:
        top, left, height, width = crop_box(pixels.shape, scale, self.aspect, generator)
        crop = pixels[top : top + height, left : left + width]
        # Area averaging is the antialiased choice when shrinking; it cannot enlarge.
        shrinks = min(height, width) >= size
        crop = cv2.resize(
            crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
        )
        if generator.random() < self.flip:
            crop = cv2.flip(crop, 1)
        if generator.random() < self.jitter:
            crop = self._jitter(crop, generator)
        if generator.random() < blur:
            crop = cv2.GaussianBlur(crop, _BLUR_KERNEL, generator.uniform(*self.blur_sigma))
        return crop

    def _jitter(self, crop: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        brightness = generator.uniform(max(0.0, 1 - self.brightness), 1 + self.brightness)
        contrast = generator.uniform(max(0.0, 1 - self.contrast), 1 + self.contrast)
        if generator.random() < 0.5:
            return _scale_contrast(_scale_brightness(crop, brightness), contrast)
        return _scale_brightness(_scale_contrast(crop, contrast), brightness)


class MultiCrop(_RandomCrop):
    """Draws the crops of one radiograph.

    Args:
        global_size: Side of the two global crops, pixels.
        global_scale: Range of a global crop's area, share of the image's.
        local_size: Side of a local crop, pixels.
        local_scale: Range of a local crop's area.
        local_count: Number of local crops.
        aspect: Range of width over height before resizing, drawn log-uniformly.
        flip: Probability of a horizontal flip, 0 to 1, like all probabilities below.
        jitter: Probability of a change of brightness and contrast (in random order).
        brightness: The factor is drawn from 1 ± this.
        contrast: The factor is drawn from 1 ± this.
        blur_global_first: Probability of Gaussian blur of the first global crop.
        blur_global_second: The same of the second.
        blur_local: The same of each local crop.
        blur_sigma: Range of the blur's standard deviation, pixels of the crop.

    Reference:
        Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021,
        appendix; the numbers' origins stand in `config.py`.
    """

    def __init__(
        self,
        *,
        global_size: int,
        global_scale: tuple[float, float],
        local_size: int,
        local_scale: tuple[float, float],
        local_count: int,
        aspect: tuple[float, float],
        flip: float,
        jitter: float,
        brightness: float,
        contrast: float,
        blur_global_first: float,
        blur_global_second: float,
        blur_local: float,
        blur_sigma: tuple[float, float],
    ) -> None:
        super().__init__(
            aspect=aspect, flip=flip, jitter=jitter, brightness=brightness, contrast=contrast,
            blur_sigma=blur_sigma,
        )  # fmt: skip
        self._global = (
            (global_size, global_scale, blur_global_first),
            (global_size, global_scale, blur_global_second),
        )
        self._local = ((local_size, local_scale, blur_local),) * local_count

    def __call__(
        self, pixels: np.ndarray, generator: np.random.Generator
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Draw all crops of one image.

        Args:
            pixels: uint8 [H, W].
            generator: Consumed; the crops depend on nothing else.

        Returns:
            The two global crops and the local crops, each uint8 [size, size].
        """
        return (
            [self._crop(pixels, *spec, generator) for spec in self._global],
            [self._crop(pixels, *spec, generator) for spec in self._local],
        )


class OneCrop(_RandomCrop):
    """Draws one crop of a radiograph: from the same generator, the first one of `MultiCrop`.

    Args:
        global_size: Side of the crop, pixels.
        global_scale: Range of its area, share of the image's.
        aspect: As for `MultiCrop`, like all below.
        flip: A flip moves no other draw: only what is mirrored differs.
        jitter: As there.
        brightness: As there.
        contrast: As there.
        blur: Probability of Gaussian blur.
        blur_sigma: As there.
    """

    def __init__(
        self,
        *,
        global_size: int,
        global_scale: tuple[float, float],
        aspect: tuple[float, float],
        flip: float,
        jitter: float,
        brightness: float,
        contrast: float,
        blur: float,
        blur_sigma: tuple[float, float],
    ) -> None:
        super().__init__(
            aspect=aspect, flip=flip, jitter=jitter, brightness=brightness, contrast=contrast,
            blur_sigma=blur_sigma,
        )  # fmt: skip
        self._spec = (global_size, global_scale, blur)

    def __call__(self, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Draw the crop of one image.

        Args:
            pixels: uint8 [H, W].
            generator: Consumed; the crop depends on nothing else.

        Returns:
            uint8 [size, size].
        """
        return self._crop(pixels, *self._spec, generator)


def crop_box(
    shape: tuple[int, ...],
    scale: tuple[float, float],
    aspect: tuple[float, float],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw the box of a random resized crop.

    Args:
        shape: (H, W) of the image.
        scale: Range of the box's area, share of H · W.
        aspect: Range of width over height, drawn log-uniformly.
        generator: Consumed.

    Returns:
        (top, left, height, width), inside the image. When ten draws do not fit (a long, thin
        image), the largest centred box within the aspect range.

    Reference:
        Szegedy et al., Going deeper with convolutions, CVPR 2015, section 6; the ten draws and
        the fall-back are torchvision's.
    """
    image_height, image_width = shape[:2]
    area = image_height * image_width
    for _ in range(10):
        target = area * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1])))
        width, height = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < width <= image_width and 0 < height <= image_height:
            top = int(generator.integers(0, image_height - height + 1))
            left = int(generator.integers(0, image_width - width + 1))
            return top, left, height, width
    width = min(image_width, max(1, round(image_height * aspect[1])))
    height = min(image_height, max(1, round(width / aspect[0])))
    return (image_height - height) // 2, (image_width - width) // 2, height, width


def _scale_brightness(crop: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(crop, _table(np.arange(256) * factor))


def _scale_contrast(crop: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.mean(crop)[0]
    return cv2.LUT(crop, _table(np.arange(256) * factor + (1 - factor) * mean))


def _table(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
