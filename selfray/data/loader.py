"""From positions in the run to batches of crops and masks, made ahead by threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from selfray.data.block_masks import block_mask, masked_counts
from selfray.data.crops import MultiCrop
from selfray.data.dataset import RadiographDataset
from selfray.data.sampler import Purpose, RowSampler, generator_at
from selfray.errors import BadImage, InputError

Place = tuple[RadiographDataset, int]
"""A dataset, and the row of an image in it."""

Made = TypeVar("Made")

BATCHES_HELD = 3
"""Batches in memory at a time: one being used, one ready, one in the making."""


@dataclass(frozen=True)
class CropBatch:
    """The crops of one step on one rank.

    Attributes:
        global_crops: uint8 [2, B, S, S].
        local_crops: uint8 [L, B, s, s].
        masks: bool [2, B, patches of a global crop]; True where a patch is masked.
        image_ids: The B images, for the record when something goes wrong.
        bad_images: How many images could not be decoded and were replaced by the row after.
    """

    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    image_ids: tuple[str, ...]
    bad_images: int

    def parts(self, count: int) -> list[CropBatch]:
        """Cut into `count` equal parts along the images."""
        each = self.masks.shape[1] // count
        return [
            CropBatch(
                self.global_crops[:, i : i + each],
                self.local_crops[:, i : i + each],
                self.masks[:, i : i + each],
                self.image_ids[i : i + each],
                0,
            )
            for i in range(0, each * count, each)
        ]


class CropLoader:
    """Makes batches by position; the same position always gives the same batch.

    Args:
        datasets: Where images come from; their rows follow each other.
        split: Which rows are used, e.g. `train`.
        multi_crop: Augmentation.
        grid: Side of a global crop in patches.
        mask_probability: Share of global crops that are masked.
        mask_ratio: Range of the masked share of patches.
        batch_size: Images a step over all ranks.
        slots: The slots of the global batch that this rank makes.
        seed: Seed of the run.
        threads: Threads that decode and crop (OpenCV releases the interpreter lock).

    Raises:
        InputError: There are no rows in the split.
    """

    def __init__(
        self,
        datasets: Sequence[RadiographDataset],
        split: str,
        *,
        multi_crop: MultiCrop,
        grid: int,
        mask_probability: float,
        mask_ratio: tuple[float, float],
        batch_size: int,
        slots: slice,
        seed: int,
        threads: int,
    ) -> None:
        self.places = [(d, int(row)) for d in datasets for row in d.rows(split)]
        if not self.places:
            raise InputError(f"the data has no image in split {split!r}. Give data that has.")
        self._sampler = RowSampler(np.arange(len(self.places)), seed)
        self._multi_crop, self._grid, self._seed = multi_crop, grid, seed
        self._mask_probability, self._mask_ratio = mask_probability, mask_ratio
        self._batch_size, self._slots, self._threads = batch_size, slots, threads

    def batches(self, first_step: int, last_step: int) -> Iterator[CropBatch]:
        """Batches of steps first_step .. last_step - 1, in order."""
        return map(_collate, made_ahead(self._submit, self._threads, first_step, last_step))

    def batch(self, step: int) -> CropBatch:
        """The batch of one step."""
        return next(iter(self.batches(step, step + 1)))

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future[_Slot]]:
        rows = self._sampler.rows_at(step, self._batch_size)
        counts = masked_counts(
            2 * self._batch_size,
            self._grid**2,
            self._mask_probability,
            self._mask_ratio,
            generator_at(self._seed, Purpose.MASK_COUNTS, step),
        ).reshape(2, self._batch_size)
        slots = range(self._batch_size)[self._slots]
        return [pool.submit(self._slot, step, s, int(rows[s]), counts[:, s]) for s in slots]

    def _slot(self, step: int, slot: int, place: int, counts: np.ndarray) -> _Slot:
        pixels, (dataset, row), bad = first_that_decodes(self.places, place)
        crops = self._multi_crop(pixels, generator_at(self._seed, Purpose.CROPS, step, slot))
        generator = generator_at(self._seed, Purpose.MASKS, step, slot)
        masks = [block_mask(self._grid, self._grid, int(count), generator) for count in counts]
        return _Slot(crops[0], crops[1], masks, dataset.table["image_id"][row].as_py(), bad)


def made_ahead(
    submit: Callable[[ThreadPoolExecutor, int], list[Future[Made]]],
    threads: int,
    first_step: int,
    last_step: int,
) -> Iterator[list[Made]]:
    """What threads make for each step, while the steps before it are being used.

    Args:
        submit: Hands the work of a step to the pool.
        threads: Of the pool.
        first_step: Of the first batch.
        last_step: Behind the last batch.

    Yields:
        What was made for first_step .. last_step - 1, in order.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="crops") as pool:
        waiting: deque[list[Future[Made]]] = deque()
        try:
            for step in range(first_step, last_step):
                for coming in range(step + len(waiting), min(step + BATCHES_HELD, last_step)):
                    waiting.append(submit(pool, coming))
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)


def first_that_decodes(places: Sequence[Place], place: int) -> tuple[np.ndarray, Place, int]:
    """The image at a place; when it does not decode, the first after it that does.

    Args:
        places: Images, in the order in which one takes another's part.
        place: Which.

    Returns:
        Pixels, uint8 [H, W]; where they are from; how many images did not decode.

    Raises:
        InputError: No image decodes.
    """
    for bad in range(len(places)):
        dataset, row = found = places[(place + bad) % len(places)]
        try:
            return dataset.pixels(row), found, bad
        except BadImage:
            continue
    raise InputError("no image of the data decodes. Make the dataset anew with `ingest`.")


@dataclass(frozen=True)
class _Slot:
    global_crops: list[np.ndarray]
    local_crops: list[np.ndarray]
    masks: list[np.ndarray]
    image_id: str
    bad: int


def _collate(slots: list[_Slot]) -> CropBatch:
    def stack(images: list[list[np.ndarray]]) -> Tensor:
        if not images[0]:
            return torch.empty((0, len(images), 1, 1), dtype=torch.uint8)
        return torch.from_numpy(np.stack([np.stack(i) for i in images], axis=1))

    masks = np.stack([np.stack(slot.masks) for slot in slots], axis=1)  # [2, B, h, w]
    return CropBatch(
        stack([slot.global_crops for slot in slots]),
        stack([slot.local_crops for slot in slots]),
        torch.from_numpy(masks).flatten(2),
        tuple(slot.image_id for slot in slots),
        sum(slot.bad for slot in slots),
    )
