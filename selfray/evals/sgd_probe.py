"""DINOv2's linear evaluation: many linear classifiers trained at once by SGD, the best chosen.

Oquab et al., DINOv2, TMLR 2024; numbers from the published `dinov2/eval/linear.py`. What departs:
each target has an output of its own instead of one softmax; crops are not flipped, because a
radiograph has a left and a right side; the best classifier is chosen for binary and for
real-valued targets by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selfray.evals.stepwise import (
    ImageOf,
    LabelledSplits,
    Purpose,
    TargetScale,
    TrainedProbe,
    augmented_batches,
    batch_places,
    choose,
    chosen_outputs,
    cosine_factor,
    generator_at,
    plain_batches,
    validation_scores,
)
from selfray.models.encoder import Encoder
from selfray.progress import progress_bar

# All from `get_args_parser` and `run_eval_linear` there.
LEARNING_RATES = (
    1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1
)  # fmt: skip
BLOCKS = (1, 4)
BATCH_SIZE = 128
STEPS = 12_500  # 10 times 1,250
MOMENTUM = 0.9
WEIGHT_STD = 0.01
_RATE_IS_FOR = 256  # images a batch: the learning rate is scaled by batch size / 256

_ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class ClassifierInput:
    """What a classifier sees: CLS of the last blocks, and perhaps the last mean patch token.

    Attributes:
        blocks: Number of last blocks.
        patch_mean: Whether with the mean patch token.
        columns: Where that is in what `block_features` gives.
    """

    blocks: int
    patch_mean: bool
    columns: slice


def classifier_inputs(depth: int, width: int) -> list[ClassifierInput]:
    """All four; two where the encoder shows its last block only.

    Args:
        depth: Blocks that the encoder shows.
        width: D.
    """
    counts = sorted({min(n, depth) for n in BLOCKS})
    most = counts[-1]
    return [
        ClassifierInput(n, patch_mean, slice((most - n) * width, (most + patch_mean) * width))
        for n in counts
        for patch_mean in (False, True)
    ]


def block_features(encoder: Encoder, images: Tensor) -> Tensor:
    """CLS of the last blocks, the last block last, then the last one's mean patch token.

    Args:
        encoder: Of depth d.
        images: [B, C, S, S], preprocessed, anywhere.

    Returns:
        float32 [B, (n + 1) * D] on the encoder's device, n = min(4, d).
    """
    device = encoder.device
    # As there: half precision where the hardware has it.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        blocks = encoder.blocks(images.to(device), min(max(BLOCKS), encoder.depth))
    mean = blocks[-1][1].float().mean(dim=(2, 3))
    return torch.cat([*(cls.float() for cls, _ in blocks), mean], dim=1)


class SgdClassifiers:
    """Linear classifiers for every input and learning rate, trained on the same batches.

    Every target's weights have a gradient of their own, so targets train as if alone.

    Args:
        inputs: From `classifier_inputs`; their columns' widths are taken from them.
        real: bool [K], on the device to train on.
        steps: Length of the cosine schedule.
        batch_size: By which learning rates are scaled.
        seed: Of the initial weights.
    """

    def __init__(
        self,
        inputs: list[ClassifierInput],
        real: Tensor,
        *,
        steps: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.inputs, self._real, self._steps = inputs, real, steps
        rates = torch.tensor(LEARNING_RATES) * batch_size / _RATE_IS_FOR
        self._rates = rates.repeat_interleave(len(real)).to(real.device)  # [R * K]
        generator = generator_at(seed, Purpose.WEIGHTS)
        self._weights = []  # of each input [d, R * K]
        for one in inputs:
            shape = (one.columns.stop - one.columns.start, len(self._rates))
            drawn = generator.normal(0, WEIGHT_STD, shape)
            self._weights.append(torch.from_numpy(drawn).float().to(real.device))
        self._biases = [torch.zeros_like(self._rates) for _ in inputs]
        self._velocity = [
            (torch.zeros_like(w), torch.zeros_like(b))
            for w, b in zip(self._weights, self._biases, strict=True)
        ]

    def step(self, step: int, features: Tensor, targets: Tensor) -> None:
        """One step of SGD with momentum, as `torch.optim.SGD` does it.

        The loss is the sum of `stepwise.known_losses`; its gradient is written down here.

        Args:
            step: 0 to steps - 1.
            features: [B, F] from `block_features`.
            targets: [B, K] standardised, NaN where it is not known.
        """
        known = ~targets.isnan()
        values = torch.nan_to_num(targets)[:, None]  # [B, 1, K]
        share = (known / known.sum(dim=0).clamp(min=1))[:, None]
        rates = self._rates * cosine_factor(step, self._steps)
        for i, one in enumerate(self.inputs):
            x = features[:, one.columns]
            outputs = (x @ self._weights[i] + self._biases[i]).unflatten(1, (-1, len(self._real)))
            slope = torch.where(self._real, 2 * (outputs - values), outputs.sigmoid() - values)
            slope = (slope * share).flatten(1)  # [B, R * K]
            for parameter, velocity, gradient in (
                (self._weights[i], self._velocity[i][0], x.T @ slope),
                (self._biases[i], self._velocity[i][1], slope.sum(dim=0)),
            ):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(rates * velocity)

    def outputs(self, features: Tensor) -> np.ndarray:
        """Of features [M, F], the outputs of every candidate: [inputs * R, M, K]."""
        parts = []
        for one, weights, bias in zip(self.inputs, self._weights, self._biases, strict=True):
            outputs = features[:, one.columns] @ weights + bias
            parts.append(outputs.unflatten(1, (-1, len(self._real))).transpose(0, 1))
        return torch.cat(parts).cpu().numpy()

    def described(self, candidate: int) -> dict[str, Any]:
        """Which input and learning rate a candidate has."""
        one = self.inputs[candidate // len(LEARNING_RATES)]
        rate = LEARNING_RATES[candidate % len(LEARNING_RATES)]
        return {"blocks": one.blocks, "patch_mean": one.patch_mean, "learning_rate": rate}


def sgd_probe(
    encoder: Encoder,
    image_of: ImageOf,
    splits: LabelledSplits,
    *,
    augmented: bool,
    steps: int,
    seed: int,
) -> TrainedProbe:
    """Train the classifiers on a frozen encoder, choose on validate, predict test.

    Args:
        encoder: Frozen.
        image_of: Reads images, and augments them.
        splits: Images and targets.
        augmented: Whether each step encodes its images anew, augmented, as published. Without,
            every image is encoded once, and a step takes milliseconds.
        steps: Of training.
        seed: Of order, augmentation and initial weights.
    """
    train, scale = splits.train, TargetScale.of(splits.train.targets, splits.real)
    device = encoder.device
    targets = scale.standardised(train.targets).to(device)
    batch_size = min(BATCH_SIZE, len(train.rows))
    classifiers = SgdClassifiers(
        classifier_inputs(encoder.depth, encoder.width),
        torch.from_numpy(splits.real).to(device),
        steps=steps,
        batch_size=batch_size,
        seed=seed,
    )
    if augmented:
        batches = _augmented(encoder, image_of, train.rows, batch_size, steps, seed)
    else:
        batches = _cached(_encoded(encoder, image_of, train.rows), batch_size, steps, seed)
    with progress_bar(total=steps, unit="step", desc="sgd") as bar:
        for step, (features, places) in enumerate(batches):
            classifiers.step(step, features, targets[places])
            bar.update()
    judged = classifiers.outputs(_encoded(encoder, image_of, splits.validate.rows))
    known = scale.standardised(splits.validate.targets).numpy()
    scores = np.stack([validation_scores(known, outputs, splits.real) for outputs in judged])
    chosen = choose(scores, splits.real)
    tested = classifiers.outputs(_encoded(encoder, image_of, splits.test_rows))
    settings = {
        "chosen": {kind: classifiers.described(c) for kind, c in chosen.items()},
        "steps": steps,
        "batch_size": batch_size,
        "augmented": augmented,
    }
    return TrainedProbe(scale.predictions(chosen_outputs(tested, chosen, splits.real)), settings)


def _augmented(
    encoder: Encoder, image_of: ImageOf, rows: np.ndarray, batch_size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for images, places in augmented_batches(image_of, rows, batch_size, steps, seed):
        yield block_features(encoder, images), torch.from_numpy(places)


def _cached(
    features: Tensor, batch_size: int, steps: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    for step in range(steps):
        places = torch.from_numpy(batch_places(step, batch_size, len(features), seed))
        yield features[places], places


def _encoded(encoder: Encoder, image_of: ImageOf, rows: np.ndarray) -> Tensor:
    """`block_features` of images as they are, [n, F]."""
    parts = []
    with progress_bar(total=len(rows), unit="image", desc="encode") as bar:
        for images in plain_batches(image_of, rows, _ENCODED_AT_ONCE):
            parts.append(block_features(encoder, images))
            bar.update(len(images))
    return torch.cat(parts)
