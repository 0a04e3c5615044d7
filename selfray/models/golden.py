"""Two fixed images, the same on every machine, and what an encoder makes of them."""

from __future__ import annotations

import numpy as np

from selfray.models.encoder import Encoder

VALUES = 8
"""How many values of each CLS are kept: those of any two encoders differ in nearly all of them."""
TOLERANCE = 2e-5
"""Largest difference from golden values, in units of the largest value of CLS.

float32 rounds by 6e-8, a network adds up many roundings, and processors and libraries add in
different orders. Measured against float64, encoders of 6 to 12 blocks are off by up to 8e-7."""
_HEIGHT, _WIDTH = 600, 500  # no square, so that resize and crop have work to do


def fixed_images() -> list[np.ndarray]:
    """A frontal chest in ellipses, and a lateral one: uint8 [600, 500], all of 0 to 255 in play.

    Whole numbers only, since libraries round sines and exponentials differently.
    """
    rows, _ = np.mgrid[:_HEIGHT, :_WIDTH]
    ribs = np.abs(rows % 60 - 30) * 4
    lungs = np.maximum(_ellipse(290, 140, 230, 100), _ellipse(290, 360, 230, 100))
    heart = _ellipse(400, 285, 110, 90)
    frontal = _ellipse(330, 250, 420, 290) - lungs + heart + ribs * (lungs > 0)
    spine = _ellipse(300, 430, 600, 40)
    lateral = spine + _ellipse(330, 200, 150, 120) - _ellipse(280, 250, 250, 150) // 2
    return [_stretched(frontal), _stretched(lateral)]


def golden_cls(encoder: Encoder) -> list[list[float]]:
    """The first values of CLS of each fixed image, [2, `VALUES`]."""
    cls, _ = encoder(fixed_images())
    return cls[:, :VALUES].float().tolist()


def _ellipse(row: int, column: int, half_height: int, half_width: int) -> np.ndarray:
    """1000 in the centre, falling with the square of the distance to 0 at the edge."""
    rows, columns = np.mgrid[:_HEIGHT, :_WIDTH]
    down, across = (rows - row) * 1000 // half_height, (columns - column) * 1000 // half_width
    return np.maximum(1000 - (down * down + across * across) // 1000, 0)


def _stretched(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return ((values - low) * 255 // (high - low)).astype(np.uint8)
