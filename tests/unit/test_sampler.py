"""The order of images is a function of the position, and each pass a permutation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfray.data.sampler import Purpose, RowSampler, generator_at


@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 2**40))
def test_each_pass_over_the_rows_is_a_permutation(rows: int, batch: int, seed: int) -> None:
    sampler = RowSampler(np.arange(100, 100 + rows), seed)
    steps = -(-3 * rows // batch)
    stream = np.concatenate([sampler.rows_at(step, batch) for step in range(steps)])
    for start in range(0, 3 * rows, rows):
        assert sorted(stream[start : start + rows]) == list(range(100, 100 + rows))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8))
def test_a_batch_does_not_depend_on_what_was_drawn_before(history: list[int]) -> None:
    used, fresh = RowSampler(np.arange(23), 5), RowSampler(np.arange(23), 5)
    for step in history:
        used.rows_at(step, 7)
    np.testing.assert_array_equal(used.rows_at(11, 7), fresh.rows_at(11, 7))


def test_passes_and_seeds_give_other_orders() -> None:
    samplers = RowSampler(np.arange(50), 0), RowSampler(np.arange(50), 1)
    orders = [sampler.rows_at(step, 50) for sampler in samplers for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_every_row_is_as_likely_at_every_place() -> None:
    firsts = [RowSampler(np.arange(4), seed).rows_at(0, 4)[0] for seed in range(1200)]
    counts = np.bincount(firsts, minlength=4)
    np.testing.assert_allclose(counts, 300, atol=4 * (1200 * 0.25 * 0.75) ** 0.5)  # 4 sigma


PLACES = [(seed, purpose, step, slot) for seed in (0, 7) for purpose in Purpose
          for step in (0, 1, 1000) for slot in (0, 1, 2559)]  # fmt: skip


def test_places_have_streams_of_their_own() -> None:
    draws = np.stack([generator_at(*place).random(2000) for place in PLACES])
    assert len(np.unique(draws)) == draws.size
    correlation = np.corrcoef(draws) - np.eye(len(PLACES))
    # 1/sqrt(n) is the standard deviation of a chance correlation; 5.5 of them for 5,778 pairs.
    assert np.abs(correlation).max() < 5.5 / 2000**0.5


@pytest.mark.parametrize("place", [PLACES[0], PLACES[-1]])
def test_the_same_place_gives_the_same_numbers(place: tuple[int, Purpose, int, int]) -> None:
    assert (generator_at(*place).random(9) == generator_at(*place).random(9)).all()
