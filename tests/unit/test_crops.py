"""Crops: where they lie, what is done to them and how often, and that nothing else matters."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import chain
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfray.config import CropsConfig
from selfray.data.crops import MultiCrop, crop_box

DRAWS = 1200
# A crop that is the whole image at its own size, so that only flip, jitter and blur change it.
WHOLE = CropsConfig(
    global_size=28, local_size=28, local_count=1, global_scale=(1, 1), local_scale=(1, 1),
    aspect=(1, 1),
)  # fmt: skip
CHECKERBOARD = (200 * (np.indices((28, 28)).sum(0) % 2)).astype(np.uint8)
RAMP = np.tile(np.arange(50, 190, 5, dtype=np.uint8), (28, 1))


def _draw(pixels: np.ndarray, config: CropsConfig, count: int = DRAWS) -> np.ndarray:
    """[count, kind, 28, 28]: kinds are first global, second global, local crop."""
    multi_crop, generator = MultiCrop(**asdict(config)), np.random.default_rng(0)
    drawn = (multi_crop(pixels, generator) for _ in range(count))
    return np.stack([np.stack([*of_global, *of_local]) for of_global, of_local in drawn])


def _assert_probability(happened: np.ndarray, probability: float) -> None:
    """Within 4 standard deviations of a binomial share; exact at 0 and 1."""
    sigma = (probability * (1 - probability) / len(happened)) ** 0.5
    assert abs(happened.mean() - probability) <= 4 * sigma


@given(
    st.integers(1, 300), st.integers(1, 300), st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
    st.integers(0, 2**32),
)  # fmt: skip
def test_a_box_lies_inside_the_image(
    height: int, width: int, scale: tuple[float, float], seed: int
) -> None:
    generator = np.random.default_rng(seed)
    low, high = sorted(scale)
    top, left, h, w = crop_box((height, width), (low, high), (3 / 4, 4 / 3), generator)
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) >= 1


@given(st.sampled_from([(224, 224), (300, 250), (518, 640)]), st.integers(0, 2**32))
def test_area_and_aspect_of_a_box_are_in_their_ranges(shape: tuple[int, int], seed: int) -> None:
    _, _, h, w = crop_box(shape, (0.2, 0.5), (3 / 4, 4 / 3), np.random.default_rng(seed))
    # Each side is rounded by half a pixel at most, and is longer than 80.
    assert 0.2 * (1 - 1 / 80) <= h * w / (shape[0] * shape[1]) <= 0.5 * (1 + 1 / 80)
    assert 3 / 4 * (1 - 1 / 80) <= w / h <= 4 / 3 * (1 + 1 / 80)


def test_area_is_uniform_and_log_aspect_too() -> None:
    generator = np.random.default_rng(0)
    boxes = np.array(
        [crop_box((512, 512), (0.2, 0.5), (0.75, 4 / 3), generator)[2:] for _ in range(4000)]
    )
    for values, low, high in (
        (boxes.prod(1) / 512**2, 0.2, 0.5),
        (np.log(boxes[:, 1] / boxes[:, 0]), np.log(0.75), np.log(4 / 3)),
    ):
        share = (np.sort(values) - low) / (high - low)
        # Kolmogorov: beyond 1.95 / sqrt(n) with probability 0.001; 0.005 for the rounding.
        assert np.abs(share - np.linspace(0, 1, 4000)).max() < 1.95 / 4000**0.5 + 0.005


@pytest.mark.parametrize("shape", [(20, 400), (400, 20)])
def test_of_a_long_thin_image_the_middle_is_taken(shape: tuple[int, int]) -> None:
    top, left, h, w = crop_box(shape, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert min(h, w) == 20
    assert 0.7 <= w / h <= 1.4
    assert abs(2 * top + h - shape[0]) <= 1
    assert abs(2 * left + w - shape[1]) <= 1


def test_every_kind_of_crop_is_flipped_with_the_stated_probability() -> None:
    crops = _draw(RAMP, replace(WHOLE, jitter=0, blur_global_second=0, blur_local=0))
    flipped = (crops == RAMP[:, ::-1]).all((2, 3))
    assert (flipped | (crops == RAMP).all((2, 3))).all()
    for kind in range(3):
        _assert_probability(flipped[:, kind], CropsConfig().flip)
    # One crop's flip says nothing about another's.
    _assert_probability(flipped[:, 0] ^ flipped[:, 1], 0.5)


def test_every_kind_of_crop_is_blurred_with_its_own_probability() -> None:
    config = replace(WHOLE, flip=0, jitter=0, blur_sigma=(0.5, 2.0))
    changed = (_draw(CHECKERBOARD, config) != CHECKERBOARD).any((2, 3))
    for kind, probability in enumerate((0.0, 0.9, 0.5)):
        _assert_probability(changed[:, kind], probability)


def test_blur_is_that_of_the_stated_widths() -> None:
    config = replace(WHOLE, flip=0, jitter=0, blur_global_second=1, blur_sigma=(1.5, 1.5))
    (crop,) = _draw(RAMP, config, 1)[:, 1]
    x = np.arange(-4, 5)
    kernel = np.exp(-(x**2) / (2 * 1.5**2))
    expected = np.convolve(np.pad(RAMP[0], 4, mode="reflect"), kernel / kernel.sum(), "valid")
    assert np.abs(crop - expected).max() <= 1  # 8-bit rounding, in fixed point


def test_every_kind_of_crop_is_jittered_with_the_stated_probability() -> None:
    config = replace(WHOLE, flip=0, blur_global_second=0, blur_local=0, contrast=0)
    changed = (_draw(RAMP, config) != RAMP).any((2, 3))
    for kind in range(3):
        # A factor within 1/380 of 1 leaves the brightest pixel, 185, as it is: of a width of 0.8.
        _assert_probability(changed[:, kind], CropsConfig().jitter * (1 - 2 / 370 / 0.8))


def test_brightness_is_a_factor_in_its_range() -> None:
    config = replace(WHOLE, flip=0, jitter=1, blur_global_second=0, blur_local=0, contrast=0)
    image = np.full((28, 28), 150, np.uint8)
    factors = _draw(image, config)[:, :, 0, 0] / 150
    assert factors.min() == pytest.approx(0.6, abs=0.01)
    assert factors.max() == pytest.approx(1.4, abs=0.01)
    # A mean of n uniform draws on a width of 0.8, 4 sigma.
    np.testing.assert_allclose(factors.mean(0), 1, atol=4 * 0.8 / (12 * DRAWS) ** 0.5)


def test_contrast_is_a_factor_around_the_mean_in_its_range() -> None:
    config = replace(WHOLE, flip=0, jitter=1, blur_global_second=0, blur_local=0, brightness=0)
    image = np.where(RAMP > 115, 150, 100).astype(np.uint8)
    crops = _draw(image, config).astype(float)
    factors = (crops.max((2, 3)) - crops.min((2, 3))) / 50
    assert factors.min() == pytest.approx(0.6, abs=0.03)
    assert factors.max() == pytest.approx(1.4, abs=0.03)
    np.testing.assert_allclose(factors.mean(0), 1, atol=4 * 0.8 / (12 * DRAWS) ** 0.5 + 0.01)
    np.testing.assert_allclose(crops.mean((2, 3)), image.mean(), atol=1)


def test_brightness_and_contrast_come_in_both_orders() -> None:
    """Clipping tells the order: bright first saturates, contrast first does not."""
    config = replace(WHOLE, flip=0, jitter=1, blur_global_second=0, blur_local=0)
    crops = _draw(np.where(RAMP > 115, 240, 20).astype(np.uint8), config, 400)[:, 0].astype(int)
    low, high = crops.min((1, 2)), crops.max((1, 2))
    brightened = (high == 255).mean()
    assert 0.1 < brightened < 0.9
    assert ((low > 30) & (high < 255)).any()


@given(st.integers(3, 90), st.integers(3, 90), st.sampled_from([14, 28, 56]), st.integers(0, 2**32))
def test_crops_are_8_bit_squares_whatever_the_image(
    height: int, width: int, size: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    config = replace(CropsConfig(), global_size=size, local_size=14, local_count=3)
    before = pixels.copy()
    of_global, of_local = MultiCrop(**asdict(config))(pixels, np.random.default_rng(seed))
    assert [c.shape for c in of_global] == [(size, size)] * 2
    assert [c.shape for c in of_local] == [(14, 14)] * 3
    assert {c.dtype for c in [*of_global, *of_local]} == {np.dtype(np.uint8)}
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize("value", [0, 255])
def test_a_constant_image_stays_constant(value: int) -> None:
    image = np.full((56, 56), value, np.uint8)
    config = replace(CropsConfig(), global_size=28, local_size=14)
    of_global, of_local = MultiCrop(**asdict(config))(image, np.random.default_rng(0))
    assert all(np.ptp(crop) == 0 for crop in [*of_global, *of_local])


def test_the_same_generator_gives_the_same_crops_whatever_opencvs_threads() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 280), dtype=np.uint8)
    multi_crop = MultiCrop(**asdict(replace(CropsConfig(), global_size=112, local_size=56)))
    drawn: list[Any] = []
    threads = cv2.getNumThreads()
    try:
        for count in (1, 2, 1):
            cv2.setNumThreads(count)
            drawn.append(multi_crop(pixels, np.random.default_rng(3)))
    finally:
        cv2.setNumThreads(threads)
    for other in drawn[1:]:
        for one, two in zip(chain(*drawn[0]), chain(*other), strict=True):
            np.testing.assert_array_equal(one, two)
