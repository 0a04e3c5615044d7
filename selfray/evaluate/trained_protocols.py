"""Protocols that train step by step on an encoder: SGD, attentive pooling, fine-tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from torch import Tensor

from selfray.data.crops import crop_box
from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.errors import InputError, nearest
from selfray.evals import attentive_probe, fine_tuning, sgd_probe
from selfray.evals.stepwise import ImageOf, Labelled, LabelledSplits, TrainedProbe
from selfray.feature_directory import Features
from selfray.models.encoder import Encoder

TRAINED_PROTOCOLS = ("sgd", "sgd-crops", "attentive", "fine-tune")
"""And `fine-tune-last-N`, which trains the last N blocks only."""

# Area of a crop and its width over height. DINOv2's classifiers see crops of 8 % of the image and
# more (torchvision's `RandomResizedCrop`); a finding would often be outside. RAD-DINO's large
# crops begin at half of the radiograph; the shapes are torchvision's.
CROP_SCALE = (0.5, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)

_LAST_BLOCKS = re.compile(r"fine-tune-last-([1-9][0-9]*)")


@dataclass(frozen=True)
class TrainedPredictions:
    """Predictions of one protocol for the images of the test split.

    Attributes:
        values: By target, float64 [n]: probabilities of binary targets, else in their unit.
        undefined: By target without predictions, why.
        settings: What was chosen on the validate split, and how it was trained; fit for JSON.
    """

    values: dict[str, np.ndarray]
    undefined: dict[str, str]
    settings: dict[str, Any]


def is_trained_protocol(name: str) -> bool:
    """Whether it is one of `TRAINED_PROTOCOLS`, or `fine-tune-last-N`."""
    return name in TRAINED_PROTOCOLS or _LAST_BLOCKS.fullmatch(name) is not None


def require_trainable(protocol: str, encoder: Encoder) -> None:
    """Raise InputError where there is no such protocol, or none for this encoder.

    Args:
        protocol: One of `TRAINED_PROTOCOLS`, or `fine-tune-last-N`.
        encoder: To be judged.
    """
    if protocol in ("sgd", "sgd-crops", "attentive"):
        return
    if not is_trained_protocol(protocol):
        allowed = (*TRAINED_PROTOCOLS, "fine-tune-last-N")
        raise InputError(f"protocol {protocol!r} is unknown. {nearest(protocol, allowed)}")
    fine_tuning.require_fine_tunable(encoder, _last_blocks(protocol))


def judge_trained(
    protocol: str,
    encoder: Encoder,
    data: RadiographDataset,
    targets: Mapping[str, np.ndarray],
    names: Sequence[str],
    real: AbstractSet[str],
    rows: Mapping[str, np.ndarray],
    *,
    features: Features | None,
    seed: int,
    steps: int | None = None,
) -> TrainedPredictions:
    """Train a protocol on the train split, choose on validate, predict test.

    Args:
        protocol: One of `TRAINED_PROTOCOLS`, or `fine-tune-last-N`.
        encoder: To be judged; stays as it is.
        data: Whose images.
        targets: By split, float64 [n, K], NaN where it is not known.
        names: K names.
        real: Names of the targets that are numbers; all others are 1/0.
        rows: By split, rows of the dataset, int [n].
        features: The encoder's for every image of `data`, with patch tokens; for `attentive` only.
        seed: Of initial weights, order and augmentation, >= 0.
        steps: Of training, >= 1; None for the protocol's own number.

    Raises:
        InputError: An unknown protocol, one that the encoder is not fit for, `attentive` without
            patch tokens, or an image that does not decode.
    """
    require_trainable(protocol, encoder)
    undefined = _undefined(targets, names, real)
    kept = [k for k, name in enumerate(names) if name not in undefined]
    if not kept:
        return TrainedPredictions({}, undefined, {})
    splits = LabelledSplits(
        train=Labelled(rows["train"], targets["train"][:, kept]),
        validate=Labelled(rows["validate"], targets["validate"][:, kept]),
        test_rows=rows["test"],
        real=np.array([names[k] in real for k in kept]),
    )
    trained = _train(protocol, encoder, data, splits, features, seed, steps)
    values = {}
    for k, predictions in zip(kept, trained.predictions.T, strict=True):
        if np.isfinite(predictions).all():
            values[names[k]] = predictions
        else:
            undefined[names[k]] = "the training diverged at every learning rate"
    return TrainedPredictions(values, undefined, {"seed": seed, **trained.settings})


def _train(
    protocol: str,
    encoder: Encoder,
    data: RadiographDataset,
    splits: LabelledSplits,
    features: Features | None,
    seed: int,
    steps: int | None,
) -> TrainedProbe:
    images = len(splits.train.rows)
    if protocol == "attentive":
        if features is None or features.patch_tokens is None:
            raise InputError(
                f"attentive: the features of {encoder.name} hold no patch tokens. Extract them "
                "with --patch-tokens."
            )
        return attentive_probe.attentive_probe(
            features.cls,
            features.patch_tokens,
            splits,
            steps=steps or attentive_probe.default_steps(images),
            seed=seed,
            device=encoder.device,
        )
    image_of = _reader(encoder, data)
    if protocol in ("sgd", "sgd-crops"):
        return sgd_probe.sgd_probe(
            encoder,
            image_of,
            splits,
            augmented=protocol == "sgd-crops",
            steps=steps or sgd_probe.STEPS,
            seed=seed,
        )
    return fine_tuning.fine_tune(
        encoder,
        image_of,
        splits,
        last_blocks=_last_blocks(protocol),
        steps=steps or fine_tuning.default_steps(images),
        seed=seed,
    )


def _last_blocks(protocol: str) -> int | None:
    found = _LAST_BLOCKS.fullmatch(protocol)
    return int(found[1]) if found else None


def _reader(encoder: Encoder, data: RadiographDataset) -> ImageOf:
    def image_of(row: int, generator: np.random.Generator | None) -> Tensor:
        pixels = data.pixels(row)
        if generator is not None:
            pixels = random_crop(pixels, encoder.image_size, generator)
        return encoder.preprocess(pixels)

    return image_of


def random_crop(pixels: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """A random part of a radiograph, as a square; never flipped, since the heart is on the left.

    Args:
        pixels: uint8 [H, W].
        size: Side of the result, pixels.
        generator: Consumed; the crop depends on nothing else.
    """
    top, left, height, width = crop_box(pixels.shape, CROP_SCALE, CROP_ASPECT, generator)
    crop = pixels[top : top + height, left : left + width]
    shrinks = min(height, width) >= size
    return cv2.resize(
        crop, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    )


def _undefined(
    targets: Mapping[str, np.ndarray], names: Sequence[str], real: AbstractSet[str]
) -> dict[str, str]:
    """Why a target cannot be trained, chosen or scored, by target."""
    undefined: dict[str, str] = {}
    for k, name in enumerate(names):
        lacking = "a second value" if name in real else "both classes"
        for split in SPLITS:
            known = targets[split][:, k]
            if len(np.unique(known[~np.isnan(known)])) < 2:
                undefined[name] = f"the {split} split lacks {lacking}"
                break
    return undefined
