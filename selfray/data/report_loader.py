"""From positions in the run to batches of images with sentences of their reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfray.data.crops import OneCrop
from selfray.data.dataset import RadiographDataset
from selfray.data.loader import Place, first_that_decodes, made_ahead
from selfray.data.report_text import cut_at_sentence, parse_report, says_something, sentences
from selfray.data.sampler import Purpose, RowSampler, generator_at
from selfray.errors import InputError


@dataclass(frozen=True)
class PairBatch:
    """The images and texts of one step on one rank.

    Attributes:
        images: uint8 [B, S, S].
        texts: B, one an image.
        image_ids: The B images, for the record when something goes wrong.
        bad_images: How many images could not be decoded and were replaced by the row after.
        texts_cut: How many texts were longer than the text encoder takes.
    """

    images: Tensor
    texts: tuple[str, ...]
    image_ids: tuple[str, ...]
    bad_images: int
    texts_cut: int


@dataclass(frozen=True)
class Supervised:
    """The images of a split that have a report to learn from.

    Attributes:
        places: Those images.
        left_out: How many images of the split have none.
    """

    places: list[Place]
    left_out: int

    def reports(self) -> Iterator[str]:
        """The report of each image, as it is stored."""
        return (report_at(place) for place in self.places)


def with_reports(datasets: Sequence[RadiographDataset], split: str) -> Supervised:
    """Find the images whose report has a sentence in its findings or impression.

    Args:
        datasets: Where images come from; their rows follow each other.
        split: Which rows are used.

    Raises:
        InputError: There are none.
    """
    places: list[Place] = [(d, int(row)) for d in datasets for row in d.rows(split)]
    found = [place for place in places if supervising_sentences(report_at(place))]
    if not found:
        raise InputError(
            f"none of the {len(places)} images in split {split!r} has a report with findings or "
            "impression. Give data with reports (`selfray ingest --reports`), or a recipe for "
            "images alone."
        )
    return Supervised(found, len(places) - len(found))


def report_at(place: Place) -> str:
    """The report of an image, empty where it has none."""
    dataset, row = place
    return dataset.table["report"][row].as_py() or ""


def supervising_sentences(report: str) -> list[str]:
    """The sentences of findings and impression that say something, in their order."""
    sections = parse_report(report)
    return [
        sentence
        for section in (sections.findings, sections.impression)
        for sentence in sentences(section)
        if says_something(sentence)
    ]


def drawn_text(report: str, count: int, generator: np.random.Generator) -> str:
    """Some sentences of a report's findings and impression.

    Args:
        report: With at least one such sentence.
        count: How many, at most; 0: all.
        generator: Consumed.

    Returns:
        Sentences in the report's order.
    """
    found = supervising_sentences(report)
    if count and len(found) > count:
        found = [found[i] for i in np.sort(generator.permutation(len(found))[:count])]
    return " ".join(found)


class ReportLoader:
    """Makes batches by position; the same position always gives the same batch.

    Args:
        places: Images with reports.
        crop: Augmentation.
        sentences: Sentences a text, at most; 0: all.
        fits: Whether a text is short enough; it is cut at a sentence otherwise.
        batch_size: Images a step over all ranks.
        slots: The slots of the global batch that this rank makes.
        seed: Seed of the run.
        threads: Threads that decode, crop and draw sentences.
    """

    def __init__(
        self,
        places: Sequence[Place],
        *,
        crop: OneCrop,
        sentences: int,
        fits: Callable[[str], bool],
        batch_size: int,
        slots: slice,
        seed: int,
        threads: int,
    ) -> None:
        self.places = places
        self._sampler = RowSampler(np.arange(len(places)), seed)
        self._crop, self._sentences, self._fits = crop, sentences, fits
        self._batch_size, self._slots = batch_size, slots
        self._seed, self._threads = seed, threads

    def batches(self, first_step: int, last_step: int) -> Iterator[PairBatch]:
        """Batches of steps first_step .. last_step - 1, in order."""
        return map(_collate, made_ahead(self._submit, self._threads, first_step, last_step))

    def batch(self, step: int) -> PairBatch:
        """The batch of one step."""
        return next(iter(self.batches(step, step + 1)))

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[Future[_Slot]]:
        rows = self._sampler.rows_at(step, self._batch_size)
        slots = range(self._batch_size)[self._slots]
        return [pool.submit(self._slot, step, slot, int(rows[slot])) for slot in slots]

    def _slot(self, step: int, slot: int, place: int) -> _Slot:
        pixels, found, bad = first_that_decodes(self.places, place)
        crop = self._crop(pixels, generator_at(self._seed, Purpose.CROPS, step, slot))
        generator = generator_at(self._seed, Purpose.SENTENCES, step, slot)
        text = drawn_text(report_at(found), self._sentences, generator)
        text, cut = cut_at_sentence(text, self._fits)
        return _Slot(crop, text, found[0].table["image_id"][found[1]].as_py(), bad, cut)


@dataclass(frozen=True)
class _Slot:
    image: np.ndarray
    text: str
    image_id: str
    bad: int
    cut: bool


def _collate(slots: list[_Slot]) -> PairBatch:
    return PairBatch(
        torch.from_numpy(np.stack([slot.image for slot in slots])),
        tuple(slot.text for slot in slots),
        tuple(slot.image_id for slot in slots),
        sum(slot.bad for slot in slots),
        sum(slot.cut for slot in slots),
    )
