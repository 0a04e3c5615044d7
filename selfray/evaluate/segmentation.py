"""Frozen patch tokens x decoders -> label maps, judged image by image at the original resolution.

Below the stage's directory lie `tokens/`, the patch tokens of every image that has a label map,
once; `DECODER-SEED.parquet`, what a trained decoder made of each test image; and below
`label_maps/DECODER-SEED/`, its label maps of the first few, PNG bit fields with the labels in their
order. What is there is not made again.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, UnidentifiedImageError

from selfray.data.dataset import SPLITS, RadiographDataset, encode_bits, write_atomically
from selfray.data.image_source import DatasetImages
from selfray.data.sampler import RowSampler
from selfray.errors import BadImage, InputError, nearest
from selfray.evals.segmentation_decoders import require_decoder
from selfray.evals.segmentation_metrics import segmentation_metrics
from selfray.evals.segmentation_training import (
    BATCH_SIZE,
    LabelledTokens,
    SegmentationDecoder,
    logits_at,
    share_pixels,
    token_levels,
    train_decoder,
)
from selfray.feature_directory import (
    CHUNK_ROWS,
    FeatureWriter,
    is_feature_directory,
    read_manifest,
    require_same,
)
from selfray.feature_directory import FORMAT_NAME as FEATURES_FORMAT
from selfray.models.encoder import Encoder
from selfray.models.preprocessing import Preprocessing
from selfray.progress import progress_bar

Box = tuple[float, float, float, float]
"""Top, left, bottom, right edge of what an encoder sees, in pixels of the image."""

SHOWN = 6
"""Test images whose label maps are kept."""

STEPS = {"linear": 300, "vitdet": 300, "upernet": 300}
"""Of training. With two labels a ViTDet decoder was best there, of 500 on the phantom; with all
labels every decoder was still rising, but a demo has no more time (docs/experiments.md).
"""

_MOST_LABELS = 16  # that fit into a bit field
# Of the label maps that decoders are trained on. As fine as the finest decoder's logits, four
# cells a patch, and 128 at least, so that a small encoder is not taught on steps.
_LEAST_SIDE = 128
_BATCH = 32  # images that are encoded at a time
_SCALED_ON = 1024  # training images, at most, whose tokens give their scaling
_DECODING_THREADS = 2
_SPACING = "pixel_spacing_mm"

_COLUMNS = pa.schema(
    [
        ("image_id", pa.string()),
        ("patient_id", pa.string()),
        ("decoder", pa.string()),
        ("seed", pa.int64()),
        ("label", pa.string()),
        ("dice", pa.float64()),  # 0 to 1
        ("iou", pa.float64()),
        ("hd95", pa.float64()),  # in `unit`, null where a mask is empty
        ("asd", pa.float64()),
        ("unit", pa.string()),  # mm or px
        ("truth_pixels", pa.int64()),
        ("predicted_pixels", pa.int64()),
        ("outside_share", pa.float64()),  # of the truth, null where it is empty
    ]
)


def judge_segmentation(
    encoder: Encoder,
    data: RadiographDataset,
    out: Path,
    *,
    decoders: Sequence[str] = ("linear",),
    labels: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
) -> pa.Table:
    """Train decoders on frozen patch tokens and compare their label maps with the true ones.

    Decoders are trained on the train split, their step is chosen on validate, every number is of
    the test split. The encoder sees a square of the image; what lies outside is predicted as
    background and counts. Interrupted, the same call goes on with the tokens and decoders that
    are done; a decoder that was being trained is trained anew, to the same weights on a CPU.

    Args:
        encoder: Frozen; its device is used.
        data: Its columns `mask` and `finding_mask` hold the label maps. Images where a needed one
            is null take no part. Pixels are measured in mm where `pixel_spacing_mm` is known.
        out: Directory of this encoder's segmentation, made if need be.
        decoders: Of `selfray.evals.segmentation_decoders.DECODERS`.
        labels: Names of mask labels and findings, at most 16; default: all mask labels. Where any
            two share pixels, each is decided by itself (multi-label), else one for each pixel.
        seeds: Of fresh weights and of the order of the images, each >= 0.
        steps: Of training; default: `STEPS`.

    Returns:
        One row a (test image, decoder, seed, label): see `_COLUMNS`, and
        `selfray.evals.segmentation_metrics` for empty masks.

    Raises:
        InputError: Unknown decoder or label, a label that no training image has, a split without
            label maps, a label map of another size than its image, a label map or an image that
            does not decode, `steps` or a seed out of range, or `out` holds something else.
    """
    for decoder in decoders:
        require_decoder(decoder)
    _require_numbers(seeds, steps)
    target = _Target(data, _chosen_labels(data, labels))
    box_of = _box_of(encoder)
    side = max(_LEAST_SIDE, 4 * max(encoder.grid))
    maps = {name: _square_maps(target, target.rows[name], side, box_of) for name in SPLITS[:2]}
    _require_labels(target, maps)
    for row in target.rows["test"]:  # before anything is trained
        target.label_map(int(row))
    out.mkdir(parents=True, exist_ok=True)
    tokens = _patch_tokens(encoder, target, out / "tokens")
    splits = {name: LabelledTokens(tokens, target.places(name), maps[name]) for name in maps}
    made = []
    for decoder in decoders:
        for seed in seeds:
            plan = _Plan(decoder, seed, steps or STEPS[decoder], len(target.labels), box_of)
            made.append(_judged(plan, encoder, target, splits, out))
    return pa.concat_tables(made) if made else _COLUMNS.empty_table()


class _Target:
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

    @cached_property
    def all_rows(self) -> np.ndarray:
        """Of all splits, ascending."""
        return np.sort(np.concatenate(list(self.rows.values())))

    def places(self, split: str) -> np.ndarray:
        """Where the images of a split are in `all_rows`."""
        return np.searchsorted(self.all_rows, self.rows[split])

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


@dataclass(frozen=True)
class _Plan:
    """One decoder to train."""

    decoder: str
    seed: int
    steps: int
    labels: int
    box_of: Callable[[int, int], Box]

    @property
    def name(self) -> str:
        return f"{self.decoder}-{self.seed}"


def _require_numbers(seeds: Sequence[int], steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}. Give 1 or more.")
    for seed in seeds:
        if seed < 0:
            raise InputError(f"seed is {seed}. Give 0 or more.")


def _chosen_labels(data: RadiographDataset, labels: Sequence[str] | None) -> tuple[str, ...]:
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


def _box_of(encoder: Encoder) -> Callable[[int, int], Box]:
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


def _square_maps(
    target: _Target, rows: np.ndarray, side: int, box_of: Callable[[int, int], Box]
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


def _require_labels(target: _Target, maps: dict[str, np.ndarray]) -> None:
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


def _patch_tokens(encoder: Encoder, target: _Target, out: Path) -> np.ndarray:
    """Patch tokens of the target's images, float16 [N, h, w, D], memory-mapped; made once."""
    rows = target.all_rows
    chosen = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    images = DatasetImages(target.data)
    shape = [len(rows), *encoder.grid, encoder.width]
    manifest = {
        "format": FEATURES_FORMAT,
        "version": 1,
        "encoder": encoder.name,
        "weights_sha256": encoder.weights_sha256,
        "preprocessing": encoder.preprocessing.description(),
        "precision": "exact",
        "arrays": {"patch_tokens": {"shape": shape, "dtype": "float16"}},
        "dataset": images.description
        | {"fingerprint": f"{target.data.fingerprint[:12]}, images {chosen[:12]}"},
    }
    if is_feature_directory(out):
        require_same(out, read_manifest(out, "manifest.json"), manifest)
    else:
        with FeatureWriter(out) as writer:
            if writer.begun(manifest) is None:
                writer.begin(manifest)
            writer.open(manifest)
            _encode(encoder, images, rows, writer)
            writer.finish(images.table().select(["image_id"]).take(pa.array(rows)))
    return np.load(out / "patch_tokens.npy", mmap_mode="r", allow_pickle=False)


def _encode(
    encoder: Encoder, images: DatasetImages, rows: np.ndarray, writer: FeatureWriter
) -> None:
    """Write the tokens of the chunks that are not done."""
    done = writer.done()
    chunks = [c for c in range(-(-len(rows) // CHUNK_ROWS)) if c not in done]
    missing = [np.arange(len(rows))[c * CHUNK_ROWS : (c + 1) * CHUNK_ROWS] for c in chunks]
    wanted = rows[np.concatenate(missing)].tolist() if missing else []
    squares = images.prepared(wanted, encoder.preprocessing.square, workers=_DECODING_THREADS)
    with progress_bar(
        total=len(rows), initial=len(rows) - len(wanted), unit="image", desc="patch tokens"
    ) as bar:
        for chunk, places in zip(chunks, missing, strict=True):
            for start in range(0, len(places), _BATCH):
                batch = places[start : start + _BATCH]
                prepared = [_usable(next(squares), int(rows[place])) for place in batch]
                inputs = torch.from_numpy(np.stack(prepared)).to(encoder.device)
                _, patches = encoder.features(encoder.preprocessing.normalise(inputs))
                writer.write(batch.tolist(), {"patch_tokens": _half(patches, encoder)})
                bar.update(len(batch))
            writer.finish_chunk(chunk, {})


def _usable(square: np.ndarray | str, row: int) -> np.ndarray:
    if isinstance(square, str):
        raise BadImage(f"image of row {row} {square}. Make the dataset anew.")
    return square


def _half(patches: torch.Tensor, encoder: Encoder) -> np.ndarray:
    """[B, D, h, w] to float16 [B, h, w, D]."""
    values = patches.permute(0, 2, 3, 1).half().cpu().numpy()
    if not np.isfinite(values).all():
        raise InputError(
            f"{encoder.name}: patch tokens are not finite in float16. Check the encoder's weights: "
            "a diverged run gives such values."
        )
    return values


def _judged(
    plan: _Plan,
    encoder: Encoder,
    target: _Target,
    splits: dict[str, LabelledTokens],
    out: Path,
) -> pa.Table:
    """The rows of one decoder, from its part if it is there."""
    identity = {
        "weights_sha256": encoder.weights_sha256,
        "fingerprint": target.data.fingerprint,
        "labels": list(target.labels),
        "steps": plan.steps,
    }
    part = out / f"{plan.name}.parquet"
    if part.exists():
        return _read_part(part, identity)
    decoder = _trained(plan, encoder, splits)
    rows = _scored(plan, decoder, target, splits["train"].tokens, out)
    table = pa.Table.from_pylist(rows, schema=_COLUMNS)
    table = table.replace_schema_metadata({"selfray": json.dumps(identity)})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    write_atomically(part, buffer.getvalue().to_pybytes())
    return table.replace_schema_metadata(None)


def _read_part(part: Path, identity: dict[str, Any]) -> pa.Table:
    try:
        table = pq.read_table(part)
        found = json.loads((table.schema.metadata or {})[b"selfray"])
    except (OSError, ValueError, KeyError, pa.ArrowInvalid) as cause:
        raise InputError(
            f"{part} is damaged, or no result of segmentation. Remove it, and it is made again."
        ) from cause
    for what, wanted in identity.items():
        if found.get(what) != wanted:
            raise InputError(
                f"{part} is of other {what}: {found.get(what)}, asked for {wanted}. Give another "
                "directory, or remove it."
            )
    return table.replace_schema_metadata(None)


def _trained(
    plan: _Plan, encoder: Encoder, splits: dict[str, LabelledTokens]
) -> SegmentationDecoder:
    train, validate = splits["train"], splits["validate"]
    decoder = SegmentationDecoder(
        plan.decoder,
        encoder.width,
        encoder.grid,
        labels=plan.labels,
        multi_label=any(share_pixels(s.label_maps) for s in splits.values()),
        seed=plan.seed,
    ).to(encoder.device)
    count = len(train.rows)
    spread = np.unique(np.linspace(0, count - 1, min(count, _SCALED_ON)).astype(int))
    decoder.scale_by(np.asarray(train.tokens[train.rows[spread]]))
    sampler = RowSampler(np.arange(count), plan.seed)
    with progress_bar(total=plan.steps, unit="step", desc=f"decoder {plan.name}") as bar:
        step, dice = train_decoder(
            decoder,
            train,
            validate,
            lambda step: sampler.rows_at(step, BATCH_SIZE),
            plan.steps,
            bar.update,
        )
    print(
        f"segmentation {encoder.name}: {plan.name}, best step {step} of {plan.steps}, Dice on "
        f"validate {dice:.3f}",
        file=sys.stderr,
    )
    return decoder


@torch.inference_mode()
def _scored(
    plan: _Plan, decoder: SegmentationDecoder, target: _Target, tokens: np.ndarray, out: Path
) -> list[dict[str, Any]]:
    """Compare the label maps of the test images; keep those of the first few."""
    shown = out / "label_maps" / plan.name
    shown.mkdir(parents=True, exist_ok=True)
    data, device = target.data, decoder.mean.device
    patients, images = data.column("patient_id"), data.column("image_id")
    spacings = data.column(_SPACING) if _SPACING in data.table.column_names else None
    rows, places = target.rows["test"], target.places("test")
    found: list[dict[str, Any]] = []
    with progress_bar(total=len(rows), unit="image", desc=f"score {plan.name}") as bar:
        for start in range(0, len(rows), _BATCH):
            batch = slice(start, start + _BATCH)
            logits = decoder(token_levels(tokens[places[batch]], device))
            for row, one in zip(rows[batch].tolist(), logits, strict=True):
                label_map = target.label_map(row)
                truth = _masks(label_map, plan.labels)
                box = plan.box_of(*label_map.shape)
                spread, inside = logits_at(one, box, label_map.shape)
                masks = (decoder.masks(spread[None])[0] & inside).cpu().numpy()
                if len(found) < SHOWN * len(target.labels):
                    write_atomically(shown / f"row-{row:07d}.png", encode_bits(masks))
                spacing = float("nan") if spacings is None else float(spacings[row])
                named = {
                    "image_id": images[row],
                    "patient_id": patients[row],
                    "decoder": plan.decoder,
                    "seed": plan.seed,
                }
                found += [
                    named | {"label": label} | _compared(t, m, inside.cpu().numpy(), spacing)
                    for label, t, m in zip(target.labels, truth, masks, strict=True)
                ]
                bar.update()
    return found


def _masks(label_map: np.ndarray, labels: int) -> np.ndarray:
    """Label map uint16 [H, W] to bool [K, H, W]."""
    return ((label_map >> np.arange(labels, dtype=np.uint16)[:, None, None]) & 1).astype(bool)


def _compared(
    truth: np.ndarray, prediction: np.ndarray, inside: np.ndarray, spacing: float
) -> dict[str, Any]:
    """The numbers of one label in one image; `spacing` mm, NaN where it is not known."""
    known = np.isfinite(spacing) and spacing > 0
    metrics = segmentation_metrics(truth, prediction, (spacing, spacing) if known else (1.0, 1.0))
    pixels = int(truth.sum())
    return {
        **{name: None if np.isnan(value) else value for name, value in metrics.items()},
        "unit": "mm" if known else "px",
        "truth_pixels": pixels,
        "predicted_pixels": int(prediction.sum()),
        "outside_share": int((truth & ~inside).sum()) / pixels if pixels else None,
    }
