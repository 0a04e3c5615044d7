"""Randomness as a function of position: nothing depends on what was drawn before.

Every random choice of a run comes from a counter-based generator keyed by
(seed, purpose, step, slot). A resumed run, another number of loader threads or of ranks
therefore sees the same crops and masks.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a random number is for; part of the key, so that purposes are independent."""

    ORDER = 1
    CROPS = 2
    MASK_COUNTS = 3
    MASKS = 4
    TORCH = 5
    PROBE = 6
    SENTENCES = 7


def generator_at(seed: int, purpose: Purpose, step: int, slot: int = 0) -> np.random.Generator:
    """A fresh generator for one place in the run.

    Args:
        seed: Seed of the run, >= 0.
        purpose: What the numbers are for.
        step: Which step, >= 0 (for `ORDER`: which pass over the rows).
        slot: Which image of the global batch, >= 0.

    Reference:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Philox).
    """
    # The two low words of the counter are left to the draws themselves.
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, slot]))


class RowSampler:
    """Maps a position in the endless stream of images to a row; each pass is a permutation.

    Args:
        rows: Row numbers to draw from, int [n], n >= 1.
        seed: Seed of the run.
    """

    def __init__(self, rows: np.ndarray, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self._pass = -1
        self._order = rows

    def rows_at(self, step: int, batch_size: int) -> np.ndarray:
        """Rows of one global batch, int [batch_size]."""
        positions = np.arange(step * batch_size, (step + 1) * batch_size)
        passes, places = np.divmod(positions, len(self.rows))
        return np.array([self._row(p, i) for p, i in zip(passes, places, strict=True)])

    def _row(self, which_pass: int, place: int) -> int:
        if which_pass != self._pass:
            generator = generator_at(self.seed, Purpose.ORDER, which_pass)
            self._order = self.rows[generator.permutation(len(self.rows))]
            self._pass = which_pass
        return self._order[place]
