"""Block masks: exact counts, blocks, an even spread of ratios."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import convolve

from selfray.data.block_masks import block_mask, masked_counts


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32))
def test_a_mask_has_exactly_as_many_patches_as_asked(
    height: int, width: int, share: float, seed: int
) -> None:
    count = round(share * height * width)
    mask = block_mask(height, width, count, np.random.default_rng(seed))
    assert mask.shape == (height, width)
    assert mask.dtype == bool
    assert mask.sum() == count


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_masked_patches_lie_in_blocks(share: float) -> None:
    generator = np.random.default_rng(0)
    cross = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    lone = total = 0
    for _ in range(100):
        mask = block_mask(16, 16, int(share * 256), generator)
        neighbours = convolve(mask.astype(int), cross, mode="constant")
        lone += (mask & (neighbours == 0)).sum()
        total += mask.sum()
    # Patches drawn singly would be alone with (1 - share)^4 or more; in blocks of 4 and more only
    # the remainder of a mask is.
    assert lone / total < 0.2 * (1 - share) ** 4


def test_the_largest_rectangle_takes_a_good_part_of_a_mask() -> None:
    """A block covers 4 patches to all that is missing, so on average a large share of it."""
    generator = np.random.default_rng(1)
    shares = []
    for _ in range(30):
        mask = block_mask(12, 12, 48, generator)
        sums = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        areas = [
            (b - t) * (r - l)
            for t in range(12) for b in range(t + 1, 13)
            for l in range(12) for r in range(l + 1, 13)  # noqa: E741
            if sums[b, r] - sums[t, r] - sums[b, l] + sums[t, l] == (b - t) * (r - l)
        ]  # fmt: skip
        shares.append(max(areas) / 48)
    assert np.mean(shares) > 0.4  # single patches at this ratio: about 0.15


@given(
    st.integers(1, 400), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32)
)
def test_ratios_are_spread_evenly_over_the_masked_share(
    crops: int, probability: float, one: float, other: float, seed: int
) -> None:
    low, high = sorted((one, other))
    counts = masked_counts(crops, 1369, probability, (low, high), np.random.default_rng(seed))
    assert counts.shape == (crops,)
    masked = int(crops * probability)
    ordered = np.sort(counts)
    assert not ordered[: crops - masked].any()
    # The i-th smallest ratio lies in the i-th of equal intervals; a count is a floor.
    edges = low + (high - low) * np.arange(masked + 1) / max(1, masked)
    drawn = ordered[crops - masked :]
    assert (drawn >= np.floor(edges[:-1] * 1369 - 1e-6)).all()
    assert (drawn <= edges[1:] * 1369 + 1e-6).all()


@pytest.mark.parametrize(("grid", "most"), [(37, 684), (16, 128)])
def test_at_the_published_sizes_no_more_than_half_is_masked(grid: int, most: int) -> None:
    counts = masked_counts(200, grid**2, 0.5, (0.1, 0.5), np.random.default_rng(0))
    assert (counts > 0).sum() == 100
    assert 0.98 * most <= counts.max() <= most


def test_which_crops_are_masked_is_random() -> None:
    masked = np.mean(
        [
            masked_counts(8, 64, 0.5, (0.1, 0.5), np.random.default_rng(seed)) > 0
            for seed in range(400)
        ],
        axis=0,
    )
    np.testing.assert_allclose(masked, 0.5, atol=4 * 0.5 / 400**0.5)  # 4 sigma
