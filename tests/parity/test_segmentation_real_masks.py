"""Real lungs: the masks that come inside torchxrayvision."""

from __future__ import annotations

import io
import zipfile
from importlib import resources

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from selfray.evals.segmentation_metrics import overlap, segmentation_metrics
from selfray.evals.segmentation_training import logits_at

ARCHIVE = "semantic_masks_v7labs_lungs.zip"


@pytest.fixture(scope="module")
def lungs() -> list[np.ndarray]:
    """Twelve people's lungs, bool [H, W] of sizes from their radiographs."""
    package = pytest.importorskip("torchxrayvision")
    masks = []
    with zipfile.ZipFile(
        io.BytesIO((resources.files(package) / "data" / ARCHIVE).read_bytes())
    ) as z:
        for name in sorted(n for n in z.namelist() if n.lower().endswith(".png"))[:12]:
            with Image.open(io.BytesIO(z.read(name))) as image:
                masks.append(np.asarray(image.convert("L")) > 127)
    assert len(masks) == 12 and all(mask.any() for mask in masks)
    return masks


def test_metrics_of_one_person_s_lungs_on_another_s_are_those_of_monai(lungs):
    metrics = pytest.importorskip("monai.metrics")
    spacing = (0.3, 0.35)
    for truth, other in zip(lungs[:4], lungs[4:8], strict=True):
        truth, other = (
            cv2.resize(m.astype(np.uint8), (200, 240), interpolation=cv2.INTER_NEAREST) > 0
            for m in (truth, other)
        )
        a, b = (torch.from_numpy(m)[None, None] for m in (other, truth))
        found = segmentation_metrics(truth, other, spacing)
        assert found["dice"] == pytest.approx(metrics.compute_dice(a, b).item(), abs=1e-6)
        options = {"include_background": True, "spacing": spacing}
        hd95 = metrics.compute_hausdorff_distance(a, b, percentile=95, **options)
        assert found["hd95"] == pytest.approx(hd95.item(), rel=1e-5)
        asd = metrics.compute_average_surface_distance(a, b, symmetric=True, **options)
        assert found["asd"] == pytest.approx(asd.item(), rel=1e-5)


def test_logits_on_rad_dino_s_grid_can_outline_real_lungs(lungs):
    """The paper reports a Dice of 98.0 of the lungs: 37 x 37 logits must allow for it."""
    reached = []
    for mask in lungs:
        coverage = cv2.resize(mask.astype(np.float32), (37, 37), interpolation=cv2.INTER_AREA)
        logits = torch.from_numpy(coverage)[None] - 0.5
        found, inside = logits_at(logits, (0.0, 0.0, *map(float, mask.shape)), mask.shape)
        assert inside.all()
        reached.append(overlap(mask, found[0].numpy() > 0)[0])
    assert np.mean(reached) > 0.98
