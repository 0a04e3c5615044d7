"""What probes share that are trained step by step: targets, loss, batches, choice on validate.

Everything random is a function of (seed, purpose, step, place in the batch).
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.evals.metrics import auroc_by_column, r2_by_column

ImageOf = Callable[[int, np.random.Generator | None], Tensor]
"""From a row of the dataset to its preprocessed image [C, S, S]; with a generator, augmented."""

_AHEAD = 2  # batches that are read while another is computed
_MOST_READERS = 16


class Purpose(IntEnum):
    """What a random number is for; part of the key, so that purposes are independent."""

    ORDER = 101
    AUGMENTATION = 102
    WEIGHTS = 103


def generator_at(seed: int, purpose: Purpose, step: int = 0, slot: int = 0) -> np.random.Generator:
    """A fresh generator for one place in the training.

    Args:
        seed: >= 0.
        purpose: What the numbers are for.
        step: Which step, >= 0 (for `ORDER`: which pass over the images).
        slot: Which image of the batch, >= 0.

    Reference:
        Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Philox).
    """
    # The two low words of the counter are left to the draws themselves.
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[0, 0, step, slot]))


@dataclass(frozen=True)
class Labelled:
    """Images of one split.

    Attributes:
        rows: Rows of the dataset, int [n].
        targets: float64 [n, K], NaN where it is not known; binary ones are 1/0.
    """

    rows: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class LabelledSplits:
    """What a probe is trained on, chosen by, and asked about.

    Attributes:
        train: At least two different known values of every target.
        validate: Likewise.
        test_rows: Rows of the dataset, int [M].
        real: bool [K], true where the target is a number, false where it is 1/0.
    """

    train: Labelled
    validate: Labelled
    test_rows: np.ndarray
    real: np.ndarray


@dataclass(frozen=True)
class TrainedProbe:
    """What came of a training.

    Attributes:
        predictions: Of the test rows, float64 [M, K]: probabilities of binary targets, else in the
            target's unit; NaN where no training ended in finite numbers.
        settings: What was chosen and how it was trained; can be written as JSON.
    """

    predictions: np.ndarray
    settings: dict[str, Any]


@dataclass(frozen=True)
class TargetScale:
    """Real-valued targets with mean 0 and standard deviation 1; binary ones as they are.

    Attributes:
        real: bool [K].
        mean: float64 [K], 0 for binary targets.
        scale: float64 [K], 1 for binary targets.
    """

    real: np.ndarray
    mean: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, targets: np.ndarray, real: np.ndarray) -> TargetScale:
        """Measure the training split: targets [n, K], two different known values of each."""
        mean = np.where(real, np.nanmean(targets, axis=0), 0.0)
        return cls(real, mean, np.where(real, np.nanstd(targets, axis=0), 1.0))

    def standardised(self, targets: np.ndarray) -> Tensor:
        """Targets [n, K] as float32, NaN where they are."""
        return torch.from_numpy(((targets - self.mean) / self.scale).astype(np.float32))

    def predictions(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs [..., K] as probabilities, or in the target's unit; float64."""
        outputs = np.asarray(outputs, np.float64)
        probabilities = 0.5 * (1 + np.tanh(outputs / 2))  # the sigmoid, which overflows nowhere
        return np.where(self.real, outputs * self.scale + self.mean, probabilities)


def known_losses(outputs: Tensor, targets: Tensor, real: Tensor) -> Tensor:
    """The loss of each target: binary cross-entropy or squared error, over what is known.

    Args:
        outputs: [..., B, K], logits of binary targets and standardised values of real ones.
        targets: [B, K], standardised; null labels are NaN and give no gradient.
        real: bool [K].

    Returns:
        [..., K]; 0 where the batch has no label of a target.
    """
    known = ~targets.isnan()
    values = torch.nan_to_num(targets).expand_as(outputs)
    squared = (outputs - values) ** 2
    entropy = F.binary_cross_entropy_with_logits(
        outputs, torch.where(real, 0.5, values), reduction="none"
    )
    losses = torch.where(known, torch.where(real, squared, entropy), 0.0)
    return losses.sum(dim=-2) / known.sum(dim=0).clamp(min=1)


def cosine_factor(step: int, steps: int, warmup: int = 0) -> float:
    """A factor of the learning rate: a line up to 1, then a half cosine towards 0.

    Args:
        step: 0 to steps - 1.
        steps: Length of the training.
        warmup: Steps of the line, of which the last has the factor 1.

    Reference:
        PyTorch's `CosineAnnealingLR(eta_min=0)` after the warm-up.
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def batch_places(step: int, batch_size: int, count: int, seed: int) -> np.ndarray:
    """Which training images a step sees; each pass over them is a permutation of its own.

    Args:
        step: >= 0.
        batch_size: 1 to `count`.
        count: Training images.
        seed: Of the training.

    Returns:
        Positions 0 to count - 1, int [batch_size].
    """
    passes, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    orders = {which: _order(which, count, seed) for which in np.unique(passes).tolist()}
    return np.array([orders[p][i] for p, i in zip(passes.tolist(), places.tolist(), strict=True)])


@lru_cache(maxsize=2)
def _order(which_pass: int, count: int, seed: int) -> np.ndarray:
    return generator_at(seed, Purpose.ORDER, which_pass).permutation(count)


def augmented_batches(
    image_of: ImageOf, rows: np.ndarray, batch_size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """The augmented images of each step, read ahead.

    Args:
        image_of: Reads and augments one.
        rows: Training images, rows of the dataset, int [n].
        batch_size: 1 to n.
        steps: How many batches.
        seed: Of the training.

    Yields:
        Images [batch_size, C, S, S], and which of `rows` they are, int [batch_size].
    """
    places = [batch_places(step, batch_size, len(rows), seed) for step in range(steps)]
    wanted = (
        [
            (int(rows[place]), generator_at(seed, Purpose.AUGMENTATION, step, slot))
            for slot, place in enumerate(batch)
        ]
        for step, batch in enumerate(places)
    )
    yield from zip(_read_ahead(image_of, wanted), places, strict=True)


def plain_batches(image_of: ImageOf, rows: np.ndarray, batch_size: int) -> Iterator[Tensor]:
    """Images of `rows` in their order as they are, [<= batch_size, C, S, S] at a time."""
    starts = range(0, len(rows), batch_size)
    wanted = ([(int(row), None) for row in rows[s : s + batch_size]] for s in starts)
    return _read_ahead(image_of, wanted)


def _read_ahead(
    image_of: ImageOf, batches: Iterable[Sequence[tuple[int, np.random.Generator | None]]]
) -> Iterator[Tensor]:
    readers = min(_MOST_READERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(readers) as pool:
        waiting: deque[list[Future[Tensor]]] = deque()
        try:
            for batch in batches:
                waiting.append([pool.submit(image_of, row, g) for row, g in batch])
                if len(waiting) > _AHEAD:
                    yield torch.stack([image.result() for image in waiting.popleft()])
            while waiting:
                yield torch.stack([image.result() for image in waiting.popleft()])
        finally:
            pool.shutdown(cancel_futures=True)


def validation_scores(targets: np.ndarray, outputs: np.ndarray, real: np.ndarray) -> np.ndarray:
    """AUROC of binary targets, R² of real ones.

    Args:
        targets: [M, K] standardised, NaN where it is not known.
        outputs: [M, K].
        real: bool [K].

    Returns:
        float64 [K]; NaN where outputs are not finite: the training diverged.
    """
    scores = np.full(len(real), np.nan)
    finite = np.isfinite(outputs).all(axis=0)
    for columns, score in ((finite & ~real, auroc_by_column), (finite & real, r2_by_column)):
        outputs_there = np.asarray(outputs[:, columns], np.float64)
        scores[columns] = score(targets[:, columns], outputs_there)
    return scores


def choose(scores: np.ndarray, real: np.ndarray) -> dict[str, int]:
    """The best candidate for the binary targets, and the best for the real ones.

    A candidate in which any of them diverged is not chosen.

    Args:
        scores: [C, K] on the validate split; NaN where a training diverged.
        real: bool [K].

    Returns:
        By `binary` and `real`, as far as there are such targets, the position of the highest
        mean; of equals the first. Left out where every candidate diverged.
    """
    chosen = {}
    for kind, columns in (("binary", ~real), ("real", real)):
        means = scores[:, columns].mean(axis=1) if columns.any() else np.array([np.nan])
        if not np.isnan(means).all():
            chosen[kind] = int(np.nanargmax(means))
    return chosen


def chosen_outputs(outputs: np.ndarray, chosen: dict[str, int], real: np.ndarray) -> np.ndarray:
    """Of outputs [C, M, K], each target's from the candidate chosen for its kind: [M, K]."""
    picked = np.full(outputs.shape[1:], np.nan)
    for kind, candidate in chosen.items():
        columns = real if kind == "real" else ~real
        picked[:, columns] = outputs[candidate][:, columns]
    return picked
