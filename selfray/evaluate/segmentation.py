"""Encoder x decoders -> label maps, judged image by image at the original resolution.

Below the stage's directory lie `DECODER-SEED.parquet`, what a trained decoder made of each test
image; and below `label_maps/DECODER-SEED/`, its label maps of the first few, PNG bit fields with
the labels in their order. What is there is not made again. Patch tokens lie elsewhere, since other
labels and steps share them (`PatchTokens`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from selfray.data.dataset import SPLITS, RadiographDataset, encode_bits, write_atomically
from selfray.data.sampler import RowSampler
from selfray.errors import InputError
from selfray.evals.segmentation_decoders import (
    blocks_read,
    is_fine_tuned,
    plain_name,
    require_decoder,
)
from selfray.evals.segmentation_fine_tuning import FineTunedDecoder
from selfray.evals.segmentation_metrics import segmentation_metrics
from selfray.evals.segmentation_training import (
    BATCH_SIZE,
    InputsOf,
    LabelledInputs,
    SegmentationDecoder,
    logits_at,
    share_pixels,
    train_decoder,
)
from selfray.evaluate.kept_parts import read_part, write_part
from selfray.evaluate.label_maps import (
    Box,
    LabelMaps,
    chosen_labels,
    label_masks,
    require_labels,
    require_memory,
    seen_box,
    square_maps,
)
from selfray.evaluate.patch_tokens import PatchTokens, rows_with_label_maps
from selfray.models.encoder import Encoder, vit_encoder
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import VisionTransformer
from selfray.progress import progress_bar

SHOWN = 6
"""Test images whose label maps are kept."""

STEPS = 300
"""Of training. With two labels a ViTDet decoder was best there, of 500 on the phantom; with all
labels every decoder was still rising, but a demo has no more time (docs/experiments.md).
"""

# Of the label maps that decoders are trained on. As fine as the finest decoder's logits, four
# cells a patch, and 128 at least, so that a small encoder is not taught on steps.
_LEAST_SIDE = 128
_LARGEST_SIZE = 4096  # pixels, as of pre-training: beyond it only a slip can lie
_BATCH = 32  # images at a time where no gradient is needed
_SCALED_ON = 1024  # training images, at most, whose tokens give their scaling
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
    tokens: Path,
    decoders: Sequence[str] = ("linear",),
    labels: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    image_size: int | None = None,
) -> pa.Table:
    """Train decoders and compare their label maps with the true ones.

    Decoders are trained on the train split, their step is chosen on validate, every number is of
    the test split. The encoder sees a square of the image; what lies outside is predicted as
    background and counts. Interrupted, the same call goes on with the tokens and decoders that
    are done; a decoder that was being trained is trained anew, to the same weights on a CPU.

    Args:
        encoder: Stays as it is; its device is used.
        data: Its columns `mask` and `finding_mask` hold the label maps. Images where a needed one
            is null take no part. Pixels are measured in mm where `pixel_spacing_mm` is known.
        out: Directory of this encoder, these labels, steps and image size, made if need be.
        tokens: Directory of the patch tokens of this encoder, dataset and image size, made if need
            be; other labels and steps share it.
        decoders: Of `selfray.evals.segmentation_decoders.DECODERS`, on frozen patch tokens; with
            `-fine-tuned` behind the name, together with a copy of the encoder.
        labels: Names of mask labels and findings, at most 16; default: all mask labels. Where any
            two share pixels, each is decided by itself (multi-label), else one for each pixel.
        seeds: Of fresh weights and of the order of the images, each >= 0.
        steps: Of training; default: `STEPS`.
        image_size: Side of the encoder's input, pixels, a multiple of its patch; default: its own.

    Returns:
        One row a (test image, decoder, seed, label): see `_COLUMNS`, and
        `selfray.evals.segmentation_metrics` for empty masks.

    Raises:
        InputError: Unknown decoder or label, a decoder or image size that the encoder is not fit
            for, a label that no training image has, a split without label maps, a label map of
            another size than its image, a label map or an image that does not decode, `steps` or
            a seed out of range, or `out` or `tokens` hold something else.
    """
    _require_numbers(seeds, steps)
    require_segmenting(encoder, decoders, image_size)
    encoder = encoder if image_size is None else encoder_at(encoder, image_size)
    target = LabelMaps(data, chosen_labels(data, labels))
    box_of = seen_box(encoder)
    side = max(_LEAST_SIDE, 4 * max(encoder.grid))
    require_memory(target, side)
    maps = {name: square_maps(target, target.rows[name], side, box_of) for name in SPLITS[:2]}
    require_labels(target, maps)
    for row in target.rows["test"]:  # before anything is trained
        target.label_map(int(row))
    out.mkdir(parents=True, exist_ok=True)
    kept = PatchTokens(encoder, data, rows_with_label_maps(data), tokens)
    made = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as readers:
        for decoder in decoders:
            for seed in seeds:
                plan = _Plan(decoder, seed, steps or STEPS, encoder, target, maps, box_of)
                made.append(_judged(plan, kept, readers, out))
    return pa.concat_tables(made) if made else _COLUMNS.empty_table()


def require_segmenting(encoder: Encoder, decoders: Sequence[str], image_size: int | None) -> None:
    """Refuse what an encoder is not fit for, before anything is computed.

    Args:
        encoder: To be judged.
        decoders: As for `judge_segmentation`.
        image_size: Likewise.

    Raises:
        InputError: An unknown decoder, one that needs more of the encoder than it shows, or an
            image size that it cannot take.
    """
    for decoder in decoders:
        require_decoder(decoder)
        if is_fine_tuned(decoder) and not isinstance(encoder.model, VisionTransformer):
            raise InputError(
                f"{decoder}: {encoder.name} is no vision transformer of the kinds that can be "
                f"trained here. Take {plain_name(decoder)}, which leaves the encoder as it is."
            )
        blocks = blocks_read(decoder, encoder.depth)
        if plain_name(decoder) == "linear-four-blocks" and len(blocks) == 1:
            plain = decoder.replace("-four-blocks", "")
            shown = f"{encoder.depth} blocks" if encoder.depth > 1 else "its last block only"
            raise InputError(f"{decoder}: {encoder.name} shows {shown}. Take {plain}.")
    if image_size is not None:
        encoder_at(encoder, image_size)


def encoder_at(encoder: Encoder, image_size: int) -> Encoder:
    """The same network, shown larger or smaller images; positions are interpolated.

    Args:
        encoder: A vision transformer of this package, with its preprocessing.
        image_size: Side of the input, pixels, a multiple of its patch. The image is resized in
            proportion, so that the same part of it is seen.

    Raises:
        InputError: The encoder is of another kind, or the size is no multiple.
    """
    own = encoder.preprocessing
    if not (isinstance(encoder.model, VisionTransformer) and isinstance(own, Preprocessing)):
        raise InputError(
            f"segmentation size {image_size}: {encoder.name} takes images of {encoder.image_size} "
            "pixels only. Leave the size out."
        )
    patch = encoder.patch_size
    if image_size > _LARGEST_SIZE:
        raise InputError(f"segmentation size is {image_size}. It must be at most {_LARGEST_SIZE}.")
    if image_size < patch or image_size % patch:
        below = max(image_size // patch, 1) * patch
        raise InputError(
            f"segmentation size is {image_size}, not a multiple of the patch of {encoder.name}, "
            f"{patch}. Use {below} or {below + patch}."
        )
    shorter, both = (
        None if pixels is None else max(image_size, round(pixels * image_size / own.size))
        for pixels in (own.shortest_edge, own.both_sides)
    )
    return vit_encoder(
        encoder.name,
        encoder.model,
        replace(own, size=image_size, shortest_edge=shorter, both_sides=both),
        weights_sha256=encoder.weights_sha256,
        synthetic=encoder.synthetic,
        training_data=encoder.training_data,
    )


@dataclass(frozen=True)
class _Plan:
    """One decoder to train."""

    decoder: str
    seed: int
    steps: int
    encoder: Encoder
    target: LabelMaps
    maps: dict[str, np.ndarray]
    box_of: Callable[[int, int], Box]

    @property
    def name(self) -> str:
        return f"{self.decoder}-{self.seed}"

    @property
    def blocks(self) -> tuple[int, ...]:
        return blocks_read(self.decoder, self.encoder.depth)


def _require_numbers(seeds: Sequence[int], steps: int | None) -> None:
    if steps is not None and steps < 1:
        raise InputError(f"steps is {steps}. Give 1 or more.")
    for seed in seeds:
        if seed < 0:
            raise InputError(f"seed is {seed}. Give 0 or more.")


def _judged(plan: _Plan, kept: PatchTokens, readers: ThreadPoolExecutor, out: Path) -> pa.Table:
    """The rows of one decoder, from its part if it is there."""
    identity = {
        "encoder": plan.encoder.name,
        "weights_sha256": plan.encoder.weights_sha256,
        "image_size": plan.encoder.image_size,
        "fingerprint": plan.target.data.fingerprint,
        "labels": list(plan.target.labels),
        "steps": plan.steps,
    }
    part = out / f"{plan.name}.parquet"
    kept_part = read_part(part, identity)
    if kept_part is not None:
        return kept_part
    inputs = {split: _inputs(plan, split, kept, readers) for split in SPLITS}
    decoder = _trained(plan, inputs)
    rows = _scored(plan, decoder, inputs["test"], out)
    table = pa.Table.from_pylist(rows, schema=_COLUMNS)
    write_part(part, table, identity)
    return table


def _inputs(plan: _Plan, split: str, kept: PatchTokens, readers: ThreadPoolExecutor) -> InputsOf:
    """Kept tokens of a split's images; for fine-tuning the preprocessed images themselves."""
    rows, encoder, data = plan.target.rows[split], plan.encoder, plan.target.data
    if is_fine_tuned(plan.decoder):

        def read(row: int) -> torch.Tensor:
            return encoder.preprocess(data.pixels(row))

        return lambda chosen: torch.stack([*readers.map(read, rows[chosen].tolist())])
    tokens, places = kept.of_blocks(plan.blocks), kept.places(rows)
    return lambda chosen: torch.from_numpy(np.asarray(tokens[places[chosen]]))


def _fresh(plan: _Plan) -> SegmentationDecoder:
    name, encoder, blocks = plain_name(plan.decoder), plan.encoder, plan.blocks
    labels = len(plan.target.labels)
    multi_label = any(share_pixels(found) for found in plan.maps.values())
    if is_fine_tuned(plan.decoder):
        return FineTunedDecoder(
            name,
            encoder.vit,
            blocks,
            encoder.grid,
            labels=labels,
            multi_label=multi_label,
            seed=plan.seed,
        )
    return SegmentationDecoder(
        name,
        encoder.width,
        encoder.grid,
        levels=len(blocks),
        labels=labels,
        multi_label=multi_label,
        seed=plan.seed,
    )


def _trained(plan: _Plan, inputs: dict[str, InputsOf]) -> SegmentationDecoder:
    train, validate = (LabelledInputs(inputs[name], plan.maps[name]) for name in SPLITS[:2])
    decoder = _fresh(plan).to(plan.encoder.device)
    count = len(train.label_maps)
    spread = np.unique(np.linspace(0, count - 1, min(count, _SCALED_ON)).astype(int))
    decoder.scale_by(train.inputs(places) for places in _batches(spread))
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
        f"segmentation {plan.encoder.name}: {plan.name}, best step {step} of {plan.steps}, Dice on "
        f"validate {dice:.3f}",
        file=sys.stderr,
    )
    return decoder


def _batches(places: np.ndarray) -> Iterator[np.ndarray]:
    return (places[start : start + _BATCH] for start in range(0, len(places), _BATCH))


@torch.inference_mode()
def _scored(
    plan: _Plan, decoder: SegmentationDecoder, inputs: InputsOf, out: Path
) -> list[dict[str, Any]]:
    """Compare the label maps of the test images; keep those of the first few."""
    shown = out / "label_maps" / plan.name
    shown.mkdir(parents=True, exist_ok=True)
    target, data = plan.target, plan.target.data
    patients, images = data.column("patient_id"), data.column("image_id")
    spacings = data.column(_SPACING) if _SPACING in data.table.column_names else None
    rows = target.rows["test"]
    found: list[dict[str, Any]] = []
    with progress_bar(total=len(rows), unit="image", desc=f"score {plan.name}") as bar:
        for batch in _batches(np.arange(len(rows))):
            logits = decoder(inputs(batch).to(decoder.mean.device))
            for row, one in zip(rows[batch].tolist(), logits, strict=True):
                label_map = target.label_map(row)
                truth = label_masks(label_map, len(target.labels))
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
