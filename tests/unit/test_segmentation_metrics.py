"""Overlap and outline distances against scikit-learn, and against distances of all pairs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from scipy.spatial.distance import cdist
from sklearn.metrics import f1_score, jaccard_score

from selfray.evals.segmentation_metrics import outline_distances, overlap, segmentation_metrics


def blobs(seed: int, shape: tuple[int, int] = (37, 29)) -> tuple[np.ndarray, np.ndarray]:
    """Two masks that touch the image's edge and have holes and islands."""
    noise = np.random.default_rng(seed).normal(size=(2, *shape))
    ramp = np.linspace(-1, 1, shape[1])
    return tuple(noise + 2 * ramp > 0.3)


@pytest.mark.parametrize("seed", range(3))
def test_overlap_is_that_of_scikit_learn(seed):
    truth, prediction = blobs(seed)
    dice, iou = overlap(truth, prediction)
    assert dice == pytest.approx(f1_score(truth.ravel(), prediction.ravel()))
    assert iou == pytest.approx(jaccard_score(truth.ravel(), prediction.ravel()))


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.14, 0.2)])
@pytest.mark.parametrize("seed", range(3))
def test_distances_are_those_of_all_pairs_of_outline_pixels(seed, spacing):
    truth, prediction = blobs(seed)
    outlines = [np.argwhere(m & ~binary_erosion(m)) * spacing for m in (truth, prediction)]
    pairs = cdist(*outlines)
    there, back = pairs.min(axis=1), pairs.min(axis=0)
    hd95, asd = outline_distances(truth, prediction, spacing)
    assert hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert asd == pytest.approx((there.sum() + back.sum()) / (len(there) + len(back)))


def test_a_square_moved_by_three_columns_is_three_pixels_away_at_most():
    truth, prediction = np.zeros((2, 30, 30), bool)
    truth[5:15, 5:15] = prediction[5:15, 8:18] = True
    found = segmentation_metrics(truth, prediction, spacing=(7.0, 0.5))
    assert found["dice"] == pytest.approx(0.7)
    assert found["iou"] == pytest.approx(70 / 130)
    assert found["hd95"] == pytest.approx(3 * 0.5)  # along the columns, 0.5 mm each
    assert 0 < found["asd"] < 3 * 0.5


def test_equal_masks_have_no_distance():
    mask = blobs(0)[0]
    assert segmentation_metrics(mask, mask) == {"dice": 1, "iou": 1, "hd95": 0, "asd": 0}


@pytest.mark.parametrize(("truth", "prediction", "overlaps"), [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_empty_masks_have_a_defined_overlap_and_no_distance(truth, prediction, overlaps):
    masks = [np.full((9, 9), bool(value)) for value in (truth, prediction)]
    found = segmentation_metrics(*masks)
    assert found["dice"] == found["iou"] == overlaps
    assert math.isnan(found["hd95"]) and math.isnan(found["asd"])
