"""Label maps of a few test images over the radiographs, beside the true ones."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.dataset import RadiographDataset
from selfray.errors import BadImage, InputError
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import probe_name
from selfray.summary.markup import escaped, figure, listed
from selfray.summary.pictures import data_uri
from selfray.summary.pictures_section import open_data
from selfray.summary.segmentation_overlay import segmentation_overlay
from selfray.summary.verdict import readable_names

_SHOWN = 3  # a picture with a panel a label takes 200 kB
_SIDE = 320  # pixels of a picture, at most


@dataclass(frozen=True)
class _LabelMaps:
    """What a decoder made of test images.

    Attributes:
        labels: Names of the bits, lowest first.
        files: By row of the dataset.
    """

    labels: tuple[str, ...]
    files: dict[int, Path]


def segmentation_pictures(
    evaluation: Evaluation, ranked: Sequence[tuple[str, str]], note: str
) -> str:
    """Overlays of one encoder and decoder.

    Args:
        evaluation: Read by `read_evaluation`.
        ranked: Encoders and decoders; the first that has label maps is drawn.
        note: What the caption begins with.

    Returns:
        HTML, empty where none has label maps, the reason where they cannot be drawn.
    """
    for encoder, decoder in ranked:
        try:
            made = _label_maps(evaluation.path, encoder, decoder)
            if made is None:
                continue
            dataset = open_data(evaluation.info.get("data"), evaluation.dataset.get("fingerprint"))
            first, *others = _pictures(made, dataset)
        except (InputError, BadImage) as error:
            return f'<p class="note">Label maps are not drawn: {escaped(error)}</p>'
        name = readable_names(evaluation.encoders)[encoder]
        caption = (
            f"{note}<b>Label maps by {escaped(name)}, {escaped(probe_name(decoder))},</b> which "
            "has the highest mean Dice of those whose label maps are kept, on the first images of "
            "the test split. Solid, blue: outline of the truth; dashed, orange: of the prediction."
        )
        folded = "".join(others)
        further = "<details><summary>Further images</summary>" if others else ""
        return figure(f"{first}{further}{folded}{'</details>' if others else ''}", caption)
    return ""


def _label_maps(evaluation: Path, encoder: str, decoder: str) -> _LabelMaps | None:
    """Where `judge_segmentation` left them, of the first seed."""
    for part in sorted(evaluation.glob(f"segmentation/*/{glob.escape(decoder)}-[0-9]*.parquet")):
        made_by, labels = _encoder_and_labels(part)
        maps = sorted((part.parent / "label_maps" / part.stem).glob("row-*.png"))
        if made_by == encoder and maps:
            rows = {int(file.stem.removeprefix("row-")): file for file in maps[:_SHOWN]}
            return _LabelMaps(labels, rows)
    return None


def _encoder_and_labels(part: Path) -> tuple[str, tuple[str, ...]]:
    try:
        identity = json.loads((pq.read_schema(part).metadata or {})[b"selfray"])
        return identity["encoder"], tuple(identity["labels"])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as cause:
        raise InputError(f"{part.name} is damaged. Evaluate again.") from cause


def _pictures(made: _LabelMaps, dataset: RadiographDataset) -> Iterator[str]:
    import matplotlib as mpl

    views = dataset.column("view")
    for place, (row, file) in enumerate(made.files.items(), start=1):
        if row >= len(dataset):
            raise InputError("they are of images that the data no longer has.")
        pixels = dataset.pixels(row)
        bits = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        if bits is None or bits.shape != pixels.shape:
            raise BadImage("one of them does not decode, or is not of its image's size.")
        each = np.arange(len(made.labels), dtype=np.uint16)[:, None, None]
        predicted = ((bits.astype(np.uint16) >> each) & 1).astype(bool)
        truth, small = _truth(dataset, row, made.labels), _reduced(pixels)
        with mpl.rc_context({"text.parse_math": False}):  # a name with a dollar sign is a name
            overlay = segmentation_overlay(
                small, _fitted(truth, small.shape), _fitted(predicted, small.shape), made.labels
            )
        yield _picture(
            overlay, f"test image {place}, {views[row] or 'view not known'}", made.labels
        )


def _truth(dataset: RadiographDataset, row: int, labels: Sequence[str]) -> np.ndarray:
    """The true masks of those labels, bool [K, H, W]."""
    names = {"mask": dataset.mask_labels, "finding_mask": dataset.findings}
    found: dict[str, np.ndarray] = {}
    for column, known in names.items():
        masks = dataset.masks(row, column) if set(labels) & set(known) else None
        if masks is not None:
            found = dict(zip(known, masks, strict=True)) | found
    if not set(labels) <= found.keys():
        raise InputError("the data no longer has their labels.")
    return np.stack([found[label] for label in labels])


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """At most `_SIDE` pixels wide and high."""
    height, width = pixels.shape
    scale = min(1.0, _SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def _fitted(masks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Bool [K, H, W] to bool [K, *shape]."""
    size = shape[1], shape[0]
    return np.stack(
        [
            cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
            for mask in masks
        ]
    )


def _picture(overlay: bytes, what: str, labels: Sequence[str]) -> str:
    """A picture of panels with its caption; JPEG, which takes a third of the bytes."""
    pixels = cv2.imdecode(np.frombuffer(overlay, np.uint8), cv2.IMREAD_COLOR)
    assert pixels is not None
    height, width = pixels.shape[:2]
    told = f"Outlines of the true and of the predicted label maps, {what}: {listed(labels)}"
    image = (
        f'<img src="{data_uri(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))}" alt="{escaped(told)}" '
        f'width="{width}" height="{height}" style="max-width:{width}px">'
    )
    return figure(image, escaped(what), kind="example")
