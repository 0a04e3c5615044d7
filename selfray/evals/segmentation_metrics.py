"""How well a predicted mask agrees with the true one: overlap, and distance of the outlines.

Empty masks. Neither has a pixel: Dice and IoU are 1, for there is nothing to disagree about, and
the distances are not defined (NaN). One has pixels and the other none: Dice and IoU are 0, and the
distances are not defined, for there is no outline to measure to. Whoever averages distances must
therefore say how many images have none, and whoever averages Dice of what most images lack should
do so over the images that have it: an encoder that finds nothing gets 1 on all others.
"""

from __future__ import annotations

import numpy as np

SEGMENTATION_METRICS = ("dice", "iou", "hd95", "asd")


def segmentation_metrics(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
) -> dict[str, float]:
    """Compare two masks of one image.

    Args:
        truth: Bool [H, W].
        prediction: Bool [H, W].
        spacing: Height and width of a pixel, mm; the default gives distances in pixels.

    Returns:
        `dice` and `iou`, 0 to 1; `hd95` and `asd`, in the unit of `spacing`, 0 at best. Of empty
        masks, see the top of this module.
    """
    hd95, asd = outline_distances(truth, prediction, spacing)
    dice, iou = overlap(truth, prediction)
    return {"dice": dice, "iou": iou, "hd95": hd95, "asd": asd}


def overlap(truth: np.ndarray, prediction: np.ndarray) -> tuple[float, float]:
    """Dice's coefficient and intersection over union of two masks, bool [H, W].

    Reference:
        Dice, Ecology 26 (1945); Jaccard, New Phytologist 11 (1912).
    """
    sizes = int(truth.sum()) + int(prediction.sum())
    if not sizes:
        return 1.0, 1.0
    common = int((truth & prediction).sum())
    return 2 * common / sizes, common / (sizes - common)


def outline_distances(
    truth: np.ndarray, prediction: np.ndarray, spacing: tuple[float, float] = (1.0, 1.0)
) -> tuple[float, float]:
    """95th-percentile Hausdorff distance and average symmetric surface distance.

    The outline is the pixels of a mask that have a neighbour outside of it, above, below, left or
    right; what lies beyond the image is outside. From each pixel of one outline the distance to the
    nearest of the other is taken, between centres. The Hausdorff distance is the larger of the two
    95th percentiles, one each way; the average is over the pixels of both outlines.

    Args:
        truth: Bool [H, W].
        prediction: Bool [H, W].
        spacing: Height and width of a pixel, mm.

    Returns:
        Both in the unit of `spacing`; NaN both where a mask is empty.

    Reference:
        Heimann et al., Comparison and evaluation of methods for liver segmentation from CT
        datasets, IEEE Transactions on Medical Imaging 28 (2009); Huttenlocher et al., Comparing
        images using the Hausdorff distance, IEEE PAMI 15 (1993). Definitions as in MONAI.
    """
    from scipy.spatial import KDTree

    outlines = [np.argwhere(_outline(mask)) * np.asarray(spacing) for mask in (truth, prediction)]
    if any(not len(outline) for outline in outlines):
        return float("nan"), float("nan")
    # A tree of outline pixels: a distance map of all pixels takes ten times as long.
    there = KDTree(outlines[1]).query(outlines[0])[0]
    back = KDTree(outlines[0]).query(outlines[1])[0]
    hausdorff = max(np.percentile(there, 95), np.percentile(back, 95))
    return float(hausdorff), float(np.concatenate([there, back]).mean())


def _outline(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside
