"""The overlay shows each outline in its colour, and where it is."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from selfray.summary.segmentation_overlay import (
    PREDICTION_COLOUR,
    TRUTH_COLOUR,
    segmentation_overlay,
)


def drawn(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    pixels = np.full(truth.shape[1:], 40, np.uint8)
    labels = [f"label_{k}" for k in range(len(truth))]
    png = segmentation_overlay(pixels, truth, prediction, labels)
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None
    return image


def places(image: np.ndarray, colour: str) -> np.ndarray:
    """Rows and columns of the panels, not of the legend, that have a colour."""
    wanted = np.round(np.array(to_rgb(colour)) * 255)
    near = np.abs(image.astype(float) - wanted).max(axis=2) < 12
    near[-40:] = False
    return np.argwhere(near)


def squares(count: int = 1) -> tuple[np.ndarray, np.ndarray]:
    truth, prediction = np.zeros((2, count, 64, 64), bool)
    truth[:, 8:24, 8:24] = True
    prediction[:, 40:56, 40:56] = True
    return truth, prediction


def test_truth_is_drawn_upper_left_and_prediction_lower_right_where_they_are():
    image = drawn(*squares())
    gray = np.abs(image.astype(int) - 40).max(axis=2) < 3
    # Letters have a few pixels of that gray as well.
    rows, columns = (np.flatnonzero(gray.sum(axis=1 - axis) > 50) for axis in (0, 1))
    (top, bottom), (left, right) = rows[[0, -1]], columns[[0, -1]]
    middle = np.array([(top + bottom) / 2, (left + right) / 2])
    truth, prediction = (places(image, c) for c in (TRUTH_COLOUR, PREDICTION_COLOUR))
    assert len(truth) > 20 and (truth < middle).all()
    assert len(prediction) > 20 and (prediction > middle).all()
    side = (bottom - top) / 64
    assert np.ptp(truth[:, 0]) == pytest.approx(16 * side, abs=2 * side)


def test_an_empty_mask_has_no_outline():
    truth, prediction = squares()
    image = drawn(truth, prediction & False)
    assert len(places(image, TRUTH_COLOUR)) and not len(places(image, PREDICTION_COLOUR))


def test_a_mask_that_fills_the_image_is_outlined_along_its_edge():
    truth, prediction = squares()
    assert len(places(drawn(truth | True, prediction & False), TRUTH_COLOUR)) > 100


def test_many_labels_take_several_rows():
    assert drawn(*squares(5)).shape[0] > 1.5 * drawn(*squares(4)).shape[0]
