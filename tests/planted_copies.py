"""A phantom in which some test images are copies of training images, each edited in its own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import cv2
import numpy as np

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.data.phantom.patients import patient_rows


def _jpeg(pixels: np.ndarray) -> np.ndarray:
    _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])
    return cv2.imdecode(encoded, cv2.IMREAD_GRAYSCALE)


def _turned(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 2, 1)
    return cv2.warpAffine(pixels, turn, (width, height), borderMode=cv2.BORDER_REPLICATE)


def _stamped(pixels: np.ndarray) -> np.ndarray:
    return cv2.putText(pixels.copy(), "PORTABLE", (2, 12), 0, 0.4, 255, 1)


def _resized(pixels: np.ndarray) -> np.ndarray:
    return cv2.resize(pixels, None, fx=0.9, fy=0.9, interpolation=cv2.INTER_AREA)


EDITS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "exact": lambda pixels: pixels,
    "jpeg of quality 80": _jpeg,
    "resized by 10 %": _resized,
    "brighter": lambda pixels: np.clip(0.8 * pixels + 30, 0, 255).astype(np.uint8),
    "gamma 0.8": lambda pixels: np.rint(255 * (pixels / 255.0) ** 0.8).astype(np.uint8),
    "histogram equalised": lambda pixels: cv2.equalizeHist(pixels),
    "stamped": _stamped,
    "turned by 2 degrees": _turned,
}
"""What copies go through, and are found after, in the images alone."""


@cache
def phantom_rows(patients: int, size: int = 128) -> list[dict]:
    """Images of the phantom as rows of a dataset, patients of all splits."""
    return [r for number in range(patients) for r in patient_rows(5, number, ("A", "B"), size)]


def write_rows(out: Path, rows: list[dict], name: str = "planted") -> RadiographDataset:
    """A dataset of these rows; findings and masks are left out."""
    info = DatasetInfo(name, "synthetic phantom", "none", True, (), (), "drawn")
    writer = DatasetWriter(out, info)
    for row in rows:
        kept = ("image", "image_id", "patient_id", "study_id", "split", "view", "site")
        writer.add({key: row[key] for key in kept} | {"source_file": f"file of {row['image_id']}"})
    return writer.finish()


def copies(rows: list[dict], edits: dict[str, Callable[[np.ndarray], np.ndarray]]) -> list[dict]:
    """For each edit, the copy of another training image as one of a new test patient."""
    train = [row for row in rows if row["split"] == "train"]
    made = []
    for row, (name, edit) in zip(train, edits.items(), strict=False):
        pixels = cv2.imdecode(np.frombuffer(row["image"], np.uint8), cv2.IMREAD_GRAYSCALE)
        new = {"image_id": name, "patient_id": f"of {name}", "study_id": f"in {name}"}
        made.append(row | new | {"split": "test", "image": encode_png(edit(pixels))})
    return made
