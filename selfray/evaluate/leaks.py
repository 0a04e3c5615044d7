"""What makes a result too good: images in two splits, and encoders that saw the test images."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.evals.near_duplicates import (
    MAX_HASH_DISTANCE,
    MIN_COSINE,
    ImagePrints,
    copies_among,
    image_prints,
    nearest_cosine,
    nearest_hash,
)
from selfray.models.training_data import mentioned

Kind = Literal[
    "same patient", "same study", "same image", "near duplicate", "training list",
    "training data", "pre-training",
]  # fmt: skip

# The split that is judged comes first, the one that it was learned from second.
_PAIRS = (("test", "train"), ("test", "validate"), ("validate", "train"))


@dataclass(frozen=True)
class Leak:
    """One way in which results of a dataset are too good.

    Attributes:
        kind: `pre-training` is the mild one: no test image was seen.
        splits: The split that is judged, and the one in which it was seen; the first alone where
            an encoder's training saw it.
        count: Images of the first split that are concerned.
        image_ids: Theirs, where it is known which; as many as `count`, or none.
        encoder: Whose results are concerned; None for those of all.
        sentence: For a reader.
    """

    kind: Kind
    splits: tuple[str, ...]
    count: int
    image_ids: tuple[str, ...]
    encoder: str | None
    sentence: str


@dataclass(frozen=True)
class KnownTraining:
    """What is known of an encoder's training images.

    Attributes:
        datasets: Common names, such as `NIH ChestX-ray14`.
        listed: See `read_training_list`.
        fingerprints: Of the datasets whose train split it was pre-trained on.
    """

    datasets: tuple[str, ...] = ()
    listed: frozenset[str] = field(default_factory=frozenset)
    fingerprints: tuple[str, ...] = ()


def find_leaks(
    dataset: RadiographDataset,
    features: Mapping[str, np.ndarray],
    training: Mapping[str, KnownTraining],
    *,
    threads: int = 1,
) -> list[Leak]:
    """Look for what a test split must not share.

    Args:
        dataset: Opened; every image is read once.
        features: By encoder, CLS tokens [N, D] of the dataset's images in its order. They propose
            pairs that the images' hashes miss.
        training: By encoder.
        threads: That read images.

    Returns:
        Leaks, the gravest kind first; empty where nothing was found.

    Raises:
        InputError: Features of another number of images.
    """
    for encoder, array in features.items():
        if len(array) != len(dataset):
            raise InputError(
                f"{encoder}: features of {len(array)} images, and {dataset.directory} has "
                f"{len(dataset)}. Extract them again from this dataset."
            )
    prints = image_prints(dataset.pixels, len(dataset), threads)
    leaks = [
        *_shared(dataset, "patient_id", "same patient"),
        *_shared(dataset, "study_id", "same study"),
        *_copies(dataset, prints, features),
    ]
    for encoder, known in training.items():
        leaks.extend(_training_leaks(dataset, prints, encoder, known))
    return leaks


def read_training_list(path: Path) -> frozenset[str]:
    """Read which images an encoder was trained on.

    Args:
        path: Text, one image a line: its `image_id` or `source_file` in the dataset, or the
            SHA-256 of its pixels (`near_duplicates.pixel_sha256`).

    Raises:
        InputError: It cannot be read, or is empty.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else "is no text in UTF-8"
        raise InputError(
            f"training list {path}: cannot be read ({reason}). Give a text file with one image a "
            "line."
        ) from None
    # A column that was exported from a table may be quoted.
    listed = frozenset(line.strip().strip("\"'") for line in lines) - {""}
    if not listed:
        raise InputError(
            f"training list {path} is empty. Give one image_id, source_file or SHA-256 a line."
        )
    return listed


def pretraining_fingerprints(encoder: str) -> tuple[str, ...]:
    """Fingerprints of the datasets that a run was pre-trained on, and those that it began from.

    Args:
        encoder: As it was named; what is no run directory has none.
    """
    found: list[str] = []
    seen: set[Path] = set()
    run = Path(encoder)
    while (run / "environment.json").is_file() and run.resolve() not in seen:
        seen.add(run.resolve())
        try:
            environment = json.loads((run / "environment.json").read_text())
            config = json.loads((run / "config.json").read_text())
            found.extend(environment["data_fingerprints"])
            run = Path(config["init"] or run)
        except (OSError, ValueError, KeyError, TypeError):
            break  # not a run's, or of another version: nothing is known
    return tuple(dict.fromkeys(found))


def _shared(
    dataset: RadiographDataset, column: str, kind: Literal["same patient", "same study"]
) -> Iterator[Leak]:
    """Patients or studies that are in two splits; ingest makes none, other tools may."""
    values = dataset.column(column)
    for judged, seen in _PAIRS:
        others = set(values[dataset.rows(seen)]) - {None}
        rows = np.array([row for row in dataset.rows(judged) if values[row] in others], np.int64)
        if len(rows):
            what = kind.removeprefix("same ")
            yield _leak(dataset, kind, (judged, seen), rows, None, f"are of a {what} in {seen}")


def _copies(
    dataset: RadiographDataset, prints: ImagePrints, features: Mapping[str, np.ndarray]
) -> Iterator[Leak]:
    """Images that are in two splits, as they are or edited."""
    rows_of = {split: dataset.rows(split) for split in {s for pair in _PAIRS for s in pair}}
    for judged, seen in _PAIRS:
        queries, others = rows_of[judged], rows_of[seen]
        if not len(queries) or not len(others):
            continue
        same = np.isin(prints.sha256[queries], prints.sha256[others])
        if same.any():
            yield _leak(
                dataset, "same image", (judged, seen), queries[same], None,
                f"are pixel by pixel an image in {seen}",
            )  # fmt: skip
        left = queries[~same]
        for rows, candidates, by in _candidates(prints, features, left, others):
            still = np.isin(rows, left)
            found = copies_among(dataset.pixels, rows[still], candidates[still])
            if len(found):
                yield _leak(
                    dataset, "near duplicate", (judged, seen), found, None,
                    f"are an edited copy of an image in {seen}{by}",
                )  # fmt: skip
            left = np.setdiff1d(left, found)


def _candidates(
    prints: ImagePrints, features: Mapping[str, np.ndarray], rows: np.ndarray, others: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    """Pairs of a row and the one most like it: by hash, then by each encoder's features."""
    where, distance = nearest_hash(prints.hashes[rows], prints.hashes[others])
    near = distance <= MAX_HASH_DISTANCE
    yield rows[near], others[where[near]], ""
    for encoder, array in features.items():
        where, cosine = nearest_cosine(array[rows], array[others])
        near = cosine >= MIN_COSINE
        yield rows[near], others[where[near]], f", found by features of {encoder}"


def _training_leaks(
    dataset: RadiographDataset, prints: ImagePrints, encoder: str, known: KnownTraining
) -> Iterator[Leak]:
    test = dataset.rows("test")
    listed = np.isin(prints.sha256, list(known.listed))
    for column in ("image_id", "source_file"):
        listed |= np.isin(dataset.column(column).astype(str), list(known.listed))
    rows = test[listed[test]]
    if len(rows):
        what = f"are in the list of what {encoder} was trained on"
        yield _leak(dataset, "training list", ("test",), rows, encoder, what)
    if names := mentioned(known.datasets, dataset.info["name"], dataset.info["origin"]):
        sentence = (
            f"{encoder} was trained on {' and '.join(names)}, which the dataset's name or origin "
            "mentions: it may have seen the test images."
        )
        yield Leak("training data", ("test",), len(test), (), encoder, sentence)
    if dataset.fingerprint in known.fingerprints:
        sentence = (
            f"{encoder} was pre-trained on the train split of this dataset, and its checkpoint may "
            "have been chosen on validate: it saw no test image, but it knows the hospital and the "
            "scanners, which encoders from elsewhere do not."
        )
        count = len(dataset.rows("train"))
        yield Leak("pre-training", ("train",), count, (), encoder, sentence)


def _leak(
    dataset: RadiographDataset,
    kind: Kind,
    splits: tuple[str, ...],
    rows: np.ndarray,
    encoder: str | None,
    what: str,
) -> Leak:
    """A leak of known images."""
    ids = tuple(str(dataset.table["image_id"][int(row)].as_py()) for row in rows)
    total = len(dataset.rows(splits[0]))
    sentence = f"{len(rows)} of {total} images of {splits[0]} {what}."
    return Leak(kind, splits, len(rows), ids, encoder, sentence)
