"""Block-wise masks for masked image modelling (iBOT)."""

from __future__ import annotations

import math

import numpy as np

# BEiT's and DINOv2's numbers: a block has at least four patches and an aspect of 0.3 to 1/0.3.
_SMALLEST_BLOCK = 4
_LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))


def masked_counts(
    crops: int,
    patches: int,
    probability: float,
    ratio: tuple[float, float],
    generator: np.random.Generator,
) -> np.ndarray:
    """How many patches are masked in each global crop of a batch.

    A share `probability` of the crops is masked; their ratios are spread evenly: the range is
    cut into as many equal intervals as there are masked crops, and one ratio drawn from each.

    Args:
        crops: Global crops in the batch, over all ranks.
        patches: Patches of a crop.
        probability: Share of crops that are masked, 0 to 1.
        ratio: Least and greatest masked share of a masked crop's patches.
        generator: Consumed.

    Returns:
        int64 [crops], 0 for a crop that is left whole.

    Reference:
        DINOv2's `collate_data_and_cast`.
    """
    masked = int(crops * probability)
    edges = np.linspace(*ratio, masked + 1)
    ratios = generator.uniform(edges[:-1], edges[1:])
    counts = np.zeros(crops, np.int64)
    counts[:masked] = (ratios * patches).astype(np.int64)
    return generator.permutation(counts)


def block_mask(height: int, width: int, count: int, generator: np.random.Generator) -> np.ndarray:
    """Draw a mask of exactly `count` patches, out of blocks.

    Rectangles are thrown until none that fits can be found; patches still missing are then
    drawn singly, so that the work of a step does not depend on luck.

    Args:
        height: Rows of patches.
        width: Columns of patches.
        count: Patches to mask, 0 to height · width.
        generator: Consumed.

    Returns:
        bool [height, width].

    Reference:
        Bao et al., BEiT, ICLR 2022, algorithm 1; the filling up is DINOv3's.
    """
    mask = np.zeros((height, width), bool)
    missing = count
    while missing > 0:
        added = _add_block(mask, missing, generator)
        if added == 0:
            break
        missing -= added
    if missing > 0:
        free = np.flatnonzero(~mask)
        mask.flat[generator.choice(free, missing, replace=False)] = True
    return mask


def _add_block(mask: np.ndarray, most: int, generator: np.random.Generator) -> int:
    """Mask one more rectangle with 1 to `most` new patches; how many it added."""
    height, width = mask.shape
    for _ in range(10):
        area = generator.uniform(min(_SMALLEST_BLOCK, most), most)
        aspect = math.exp(generator.uniform(*_LOG_ASPECT))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < height and 0 < w < width):
            continue
        top = generator.integers(0, height - h + 1)
        left = generator.integers(0, width - w + 1)
        block = mask[top : top + h, left : left + w]
        added = h * w - int(block.sum())
        if 0 < added <= most:
            block[:] = True
            return added
    return 0
