"""The label maps of a dataset that were asked for, and what an encoder sees of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import cv2
import numpy as np
import psutil
import pyarrow as pa
from PIL import Image, UnidentifiedImageError

from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.errors import BadImage, InputError, nearest
from selfray.models.encoder import Encoder
from selfray.models.preprocessing import Preprocessing

Box = tuple[float, float, float, float]
"""Top, left, bottom, right edge of what an encoder sees, in pixels of the image."""

_MOST_LABELS = 16  # that fit into a bit field


class LabelMaps:
    """The label maps that were asked for, and the images that have them.

    Args:
        data: The dataset.
        labels: K names.

    Attributes:
        rows: By split, int [n], rows of the dataset.
    """

    def __init__(self, data: RadiographDataset, labels: tuple[str, ...]) -> None:
        self.data, self.labels = data, labels
        names = {"mask": data.mask_labels, "finding_mask": data.findings}
        self._bits = [
            (column, known.index(label))
            for label in labels
            for column, known in names.items()
            if label in known
        ]
        columns = sorted({column for column, _ in self._bits})
        known = np.logical_and.reduce(
            [data.table[column].is_valid().to_numpy(zero_copy_only=False) for column in columns]
        )
        self._encoded = {
            name: pa.chunked_array([chunk.field("bytes") for chunk in data.table[name].chunks])
            for name in columns
        }
        self.rows = {name: rows[known[rows]] for name in SPLITS for rows in [data.rows(name)]}
        for name, rows in self.rows.items():
            if not len(rows):
                raise InputError(
                    f"{data.directory} has no {' and '.join(columns)} in its {name} split; "
                    "decoders are trained on train, chosen on validate and scored on test. Leave "
                    "segmentation out, or make the dataset with masks in all three."
                )

    def label_map(self, row: int) -> np.ndarray:
        """Of one image, uint16 [H, W], bit k where label k is.

        Raises:
            BadImage: It does not decode, or is of another size than the image.
        """
        fields = {column: self._decoded(column, row) for column in self._encoded}
        found = np.zeros(next(iter(fields.values())).shape, np.uint16)
        for k, (column, bit) in enumerate(self._bits):
            found |= ((fields[column] >> bit) & 1) << k
        return found

    def _decoded(self, column: str, row: int) -> np.ndarray:
        encoded = self._encoded[column][row].as_py()
        bits = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
        if bits is None or bits.ndim != 2:
            raise BadImage(
                f"{self.data.directory}: {column} of row {row} does not decode. Make the "
                "dataset anew."
            )
        image = _size(self.data, row)
        if bits.shape != image:
            raise BadImage(
                f"{self.data.directory}: {column} of row {row} is {bits.shape[0]} x "
                f"{bits.shape[1]} pixels, its image {image[0]} x {image[1]}. Make the dataset with "
                "masks of the images' size."
            )
        bits = bits.astype(np.uint16)
        names = self.data.mask_labels if column == "mask" else self.data.findings
        if unknown := int(np.bitwise_or.reduce(bits, axis=None)) >> len(names):
            raise BadImage(
                f"{self.data.directory}: {column} of row {row} has bit "
                f"{len(names) + unknown.bit_length() - 1} set, and the dataset names "
                f"{len(names)} labels. Masks are bit fields: bit k for the k-th label."
            )
        return bits


def chosen_labels(data: RadiographDataset, labels: Sequence[str] | None) -> tuple[str, ...]:
    allowed = (*data.mask_labels, *data.findings)
    chosen = tuple(dict.fromkeys(data.mask_labels if labels is None else labels))
    for label in chosen:
        if label not in allowed:
            raise InputError(
                f"{data.directory} has no label {label!r} to segment. {nearest(label, allowed)}"
            )
    if not chosen:
        raise InputError(
            f"{data.directory} has no label to segment. Make the dataset with masks, or name "
            "findings that have some."
        )
    if len(chosen) > _MOST_LABELS:
        raise InputError(
            f"{len(chosen)} labels are to be segmented, at most {_MOST_LABELS} at once. Name fewer."
        )
    return chosen


def _size(data: RadiographDataset, row: int) -> tuple[int, int]:
    """Height and width of an image, from the head of its file."""
    try:
        with Image.open(io.BytesIO(data.encoded(row))) as image:
            return image.height, image.width
    except UnidentifiedImageError:
        raise BadImage(f"{data.directory}: row {row} does not decode") from None


def seen_box(encoder: Encoder) -> Callable[[int, int], Box]:
    """Where the square that the encoder sees lies in an image of a height and a width."""
    preprocessing = encoder.preprocessing
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.seen
    return lambda height, width: measured_box(preprocessing.square, height, width)


def measured_box(square: Callable[[np.ndarray], np.ndarray], height: int, width: int) -> Box:
    """Find out what a preprocessing sees by ramps of gray, where its code is a publisher's.

    Args:
        square: uint8 [H, W] to [C, S, S]: resizing, cropping in the middle, and linear scaling of
            the values.
        height: H.
        width: W.

    Returns:
        Edges, within about a thousandth of the sides.
    """
    black, white = (
        float(square(np.full((height, width), value, np.uint8))[0].mean()) for value in (0, 255)
    )
    edges = []
    for axis, side in enumerate((height, width)):
        # Each line of the ramp is a little brighter than the one before, by one gray value in all,
        # so that the mean over them is not rounded to whole ones. In the middle it is a half.
        other = width if axis == 0 else height
        ramp = np.add.outer(np.linspace(0, 1, other), np.linspace(0, 254, side))
        image = np.round(ramp.T if axis == 0 else ramp).astype(np.uint8)
        found = square(np.ascontiguousarray(image))[0].astype(np.float64).mean(axis=1 - axis)
        at = 0.5 + ((found - black) / (white - black) * 255 - 0.5) / 254 * (side - 1)
        # Filters see less than their width at the edges, and ramps end there.
        inner = slice(len(at) // 10, len(at) - len(at) // 10)
        slope, start = np.polyfit((np.arange(len(at)) + 0.5)[inner], at[inner], 1)
        edges.append((max(0.0, float(start)), min(side, float(start + slope * len(at)))))
    (top, bottom), (left, right) = edges
    return top, left, bottom, right


def square_maps(
    target: LabelMaps, rows: np.ndarray, side: int, box_of: Callable[[int, int], Box]
) -> np.ndarray:
    """Label maps of what the encoder sees, uint16 [n, side, side]: the pixel at each centre."""
    maps = np.empty((len(rows), side, side), np.uint16)
    for k, row in enumerate(rows.tolist()):
        label_map = target.label_map(row)
        top, left, bottom, right = box_of(*label_map.shape)
        along = [
            np.clip(start + (np.arange(side) + 0.5) * (end - start) / side, 0, most - 1).astype(int)
            for start, end, most in zip((top, left), (bottom, right), label_map.shape, strict=True)
        ]
        maps[k] = label_map[np.ix_(*along)]
    return maps


def require_memory(target: LabelMaps, side: int) -> None:
    """Refuse label maps of training that cannot be held.

    Args:
        target: Whose.
        side: Of the squares that decoders are trained on, pixels.

    Raises:
        InputError: Says what they need, and what there is.
    """
    images = sum(len(target.rows[split]) for split in SPLITS[:2])
    needed, free = images * side**2 * 2, psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"label maps of {images:,} images of {side} x {side} pixels need "
            f"{needed / 2**30:,.0f} GiB of memory, and {free / 2**30:,.0f} are free. Give a "
            "smaller --segmentation-size."
        )


def require_labels(target: LabelMaps, maps: dict[str, np.ndarray]) -> None:
    """Refuse labels that nothing can be learned of."""
    present = {name: np.bitwise_or.reduce(found, axis=None) for name, found in maps.items()}
    for k, label in enumerate(target.labels):
        if not (int(present["train"]) >> k) & 1:
            raise InputError(
                f"{target.data.directory}: no image of the train split has any pixel of label "
                f"{label!r} within what the encoder sees. Leave it out."
            )
    if not present["validate"]:
        raise InputError(
            f"{target.data.directory}: no image of the validate split has any pixel of "
            f"{', '.join(target.labels)}, so that no step can be chosen. Name other labels, or "
            "make the dataset anew."
        )


def label_masks(label_map: np.ndarray, labels: int) -> np.ndarray:
    """Label map uint16 [H, W] to bool [K, H, W]."""
    return ((label_map >> np.arange(labels, dtype=np.uint16)[:, None, None]) & 1).astype(bool)
