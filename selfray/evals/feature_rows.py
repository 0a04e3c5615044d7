"""Features as blocks of rows, so that those that do not fit into memory can be fitted too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfray.errors import InputError

# Features that take less than this as float64 and float32 together (12 bytes a value) are read
# once and held; 100,000 images of 768 features take 0.9 GiB.
HELD_BYTES = 2**30
BLOCK_ROWS = 2048  # 6 MiB of float32 at 768 features, so that a block stays in a CPU's cache


@dataclass(frozen=True)
class FeatureRows:
    """Rows of arrays that lie on disk, read block by block.

    Attributes:
        arrays: [N, Di] each, usually memory-mapped; their columns are put side by side.
        rows: int64 [n], positions in 0 to N - 1 in any order; ascending ones are read fastest.
    """

    arrays: Sequence[np.ndarray]
    rows: np.ndarray

    def __post_init__(self) -> None:
        lengths = {len(array) for array in self.arrays}
        if len(lengths) != 1 or any(array.ndim != 2 for array in self.arrays):
            shapes = ", ".join(str(array.shape) for array in self.arrays) or "none"
            raise InputError(f"feature arrays are of shapes {shapes}; give [N, D] with the same N")
        length = lengths.pop()
        if len(self.rows) and not 0 <= int(self.rows.min()) <= int(self.rows.max()) < length:
            raise InputError(
                f"feature rows reach from {self.rows.min()} to {self.rows.max()}; the arrays have "
                f"rows 0 to {length - 1}. Extract the features again."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (n, sum of Di)."""
        return len(self.rows), sum(array.shape[1] for array in self.arrays)

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """The rows in order, [at most `size`, D] at a time."""
        for first in range(0, len(self.rows), size):
            rows = self.rows[first : first + size]
            # A slice is several times faster to read than a list of positions.
            ascending = rows[-1] - rows[0] == len(rows) - 1 and bool((np.diff(rows) == 1).all())
            which = slice(int(rows[0]), int(rows[-1]) + 1) if ascending else rows
            parts = [array[which] for array in self.arrays]
            yield np.concatenate(parts, axis=1) if len(parts) > 1 else np.asarray(parts[0])


class RowBlocks(Protocol):
    """What a solver reads: all rows in order, again and again."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (N, D)."""
        ...

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """[at most BLOCK_ROWS, D] at a time, as float32 or float64."""
        ...


@dataclass(frozen=True)
class HeldRows:
    """Features in memory, as float64 and, once asked for, as float32 too.

    Attributes:
        values: [N, D] float64.
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (N, D)."""
        return self.values.shape[0], self.values.shape[1]

    @cached_property
    def _single(self) -> Tensor:
        return self.values.float()

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """[at most BLOCK_ROWS, D] at a time."""
        values = self.values if dtype == torch.float64 else self._single
        return iter(values.split(BLOCK_ROWS))


@dataclass(frozen=True)
class StreamedRows:
    """Features on disk, shifted and scaled on their way into memory.

    Attributes:
        features: [N, D].
        mean: [D] float64, subtracted.
        scale: [D] float64, divided by.
    """

    features: FeatureRows
    mean: Tensor
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns (N, D)."""
        return self.features.shape

    def blocks(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """[at most BLOCK_ROWS, D] at a time."""
        mean, factor = self.mean.to(dtype), (1 / self.scale).to(dtype)
        for block in self.features.blocks(BLOCK_ROWS):
            yield torch.from_numpy(np.array(block)).to(dtype).sub_(mean).mul_(factor)


def placed_blocks(rows: RowBlocks, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The blocks, each with the places of its rows."""
    first = 0
    for block in rows.blocks(dtype):
        yield slice(first, first + len(block)), block
        first += len(block)


def row_blocks(features: FeatureRows, mean: Tensor, scale: Tensor) -> RowBlocks:
    """Shifted and scaled features, held where they are small and streamed where not.

    Args:
        features: [N, D].
        mean: [D] float64, subtracted.
        scale: [D] float64, divided by.

    Raises:
        InputError: No rows, or a value that is not finite.
    """
    _require_finite(features)
    n, d = features.shape
    streamed = StreamedRows(features, mean, scale)
    if n * d * 12 > HELD_BYTES:
        return streamed
    values = torch.empty(n, d, dtype=torch.float64)
    for place, block in placed_blocks(streamed, torch.float64):
        values[place] = block
    return HeldRows(values)


def _require_finite(features: FeatureRows) -> None:
    """Read all features once.

    Raises:
        InputError: No rows, or a value that is not finite.
    """
    if not len(features):
        raise InputError(f"features are of shape {features.shape}, not [N, D] with N >= 1")
    first = 0
    for block in features.blocks(BLOCK_ROWS):
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = first + int(np.flatnonzero(~finite)[0])
            raise InputError(f"features of row {row} are not finite. Extract them again.")
        first += len(block)
