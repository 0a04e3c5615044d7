"""Dice, IoU, 95th-percentile Hausdorff and average surface distance against MONAI and SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from selfray.evals.segmentation_metrics import segmentation_metrics


def shapes(seed: int, margin: int) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(seed).normal(size=(2, 60, 48))
    smooth = gaussian_filter(noise[0], 4) * 8
    masks = np.stack([smooth, smooth + gaussian_filter(noise[1], 2)]) > 0.1
    if margin:
        masks[:, :margin] = masks[:, -margin:] = False
        masks[:, :, :margin] = masks[:, :, -margin:] = False
    return masks[0], masks[1]


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (0.143, 0.2)])
@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_monai(seed, margin, spacing):
    metrics = pytest.importorskip("monai.metrics")
    torch = pytest.importorskip("torch")
    masks = shapes(seed, margin)
    truth, prediction = (torch.from_numpy(mask)[None, None] for mask in masks)
    found = segmentation_metrics(*masks, spacing)
    dice = metrics.compute_dice(prediction, truth)
    assert found["dice"] == pytest.approx(dice.item(), abs=1e-6)
    iou = metrics.compute_iou(prediction, truth)
    assert found["iou"] == pytest.approx(iou.item(), abs=1e-6)
    hd95 = metrics.compute_hausdorff_distance(
        prediction, truth, include_background=True, percentile=95, spacing=spacing
    )
    assert found["hd95"] == pytest.approx(hd95.item(), rel=1e-5)
    asd = metrics.compute_average_surface_distance(
        prediction, truth, include_background=True, symmetric=True, spacing=spacing
    )
    assert found["asd"] == pytest.approx(asd.item(), rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_distances_are_those_of_simpleitk(seed):
    sitk = pytest.importorskip("SimpleITK")
    masks = shapes(seed, margin=2)  # ITK has no outline where a mask ends with the image
    spacing = (0.143, 0.2)
    outlines, maps = [], []
    for mask in masks:
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(spacing[::-1])
        outline = sitk.LabelContour(image, fullyConnected=False)
        outlines.append(sitk.GetArrayFromImage(outline).astype(bool))
        distance = sitk.SignedMaurerDistanceMap(
            outline, squaredDistance=False, useImageSpacing=True
        )
        maps.append(np.abs(sitk.GetArrayFromImage(distance)))
    there, back = maps[1][outlines[0]], maps[0][outlines[1]]
    found = segmentation_metrics(*masks, spacing)
    expected = max(np.percentile(there, 95), np.percentile(back, 95))
    assert found["hd95"] == pytest.approx(expected, rel=1e-5)
    assert found["asd"] == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
