"""Fine-tuning: the encoder itself, or its last blocks, is trained on the targets.

The numbers are those by which MAE fine-tunes a ViT-B (He et al., Masked autoencoders are scalable
vision learners, CVPR 2022, and its published FINETUNE.md), after BEiT (Bao et al., ICLR 2022). The
head begins as a solved linear probe (Kumar et al., Fine-tuning can distort pretrained features and
underperform out-of-distribution, ICLR 2022): from a random head, the few steps that a small dataset
allows end below the probe.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.evals.linear_probe import ProbeData, fit_probes
from selfray.evals.stepwise import (
    ImageOf,
    LabelledSplits,
    TargetScale,
    TrainedProbe,
    augmented_batches,
    cosine_factor,
    known_losses,
    plain_batches,
    validation_scores,
)
from selfray.models.encoder import Encoder
from selfray.models.layer_decay import layer_wise_rate
from selfray.models.vit import VisionTransformer
from selfray.progress import progress_bar

LEARNING_RATE = 5e-4  # before the scaling by batch size / 256
_RATE_IS_FOR = 256
LAYER_DECAY = 0.65
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # 5 of 100 passes there
PASSES = 20  # ours: a fifth of theirs, since the best step on validate is kept
FEWEST_STEPS = 500  # ours, for few images
BATCH_SIZE = 32  # ours: what fits one GPU at 518 pixels
CHECKS = 10  # ours: how often validate is looked at

_TESTED_AT_ONCE = 64


class FineTuned(nn.Module):
    """A copy of the encoder with a linear layer on CLS and the mean patch token.

    Args:
        encoder: Copied; stays as it is.
        outputs: K.
        last_blocks: How many blocks are trained, with the final norm; None for all and what is
            before them.

    Attributes:
        encoder: The copy.
        head: [2 D] to [K].
    """

    def __init__(self, encoder: VisionTransformer, outputs: int, last_blocks: int | None) -> None:
        super().__init__()
        # In evaluation mode as it came, because nothing but stochastic depth would change.
        self.encoder = copy.deepcopy(encoder)
        self.head = nn.Linear(2 * encoder.width, outputs)
        if last_blocks is not None:
            self.encoder.requires_grad_(False)
            self.encoder.blocks[encoder.depth - last_blocks :].requires_grad_(True)
            self.encoder.norm.requires_grad_(True)
        else:
            self.encoder.requires_grad_(True)

    def pooled(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] to CLS and mean patch token, [B, 2 D]."""
        tokens = self.encoder(images)
        return torch.cat([tokens.cls, tokens.patches.mean(dim=1)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, C, S, S] to outputs [B, K]."""
        return self.head(self.pooled(images))


def require_fine_tunable(encoder: Encoder, last_blocks: int | None) -> None:
    """Raise InputError where an encoder, or so many of its blocks, cannot be fine-tuned.

    Args:
        encoder: Any.
        last_blocks: As for `fine_tune`.
    """
    if not isinstance(encoder.model, VisionTransformer):
        raise InputError(
            f"fine-tune: {encoder.name} is no vision transformer of the kinds that can be trained "
            "here. Judge it by linear, knn, sgd or attentive."
        )
    if last_blocks is not None and not 1 <= last_blocks <= encoder.depth:
        raise InputError(
            f"fine-tune-last-{last_blocks}: {encoder.name} has {encoder.depth} blocks. Allowed: "
            f"1 to {encoder.depth}, or fine-tune for all."
        )


def parameter_groups(model: FineTuned) -> list[dict]:
    """Groups of trained parameters with `rate`, the layer-wise factor, and `weight_decay`.

    Matrices and convolutions decay; biases, norms, LayerScale, tokens and positions do not.
    """
    groups: defaultdict[tuple[float, bool], list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = layer_wise_rate(name, model.encoder.depth, LAYER_DECAY, 1.0)
            groups[rate, name.endswith(".weight") and parameter.ndim > 1].append(parameter)
    return [
        {"params": parameters, "rate": rate, "weight_decay": WEIGHT_DECAY if decays else 0.0}
        for (rate, decays), parameters in groups.items()
    ]


def default_steps(images: int) -> int:
    """Steps for so many training images."""
    return max(FEWEST_STEPS, math.ceil(PASSES * images / BATCH_SIZE))


def fine_tune(
    encoder: Encoder,
    image_of: ImageOf,
    splits: LabelledSplits,
    *,
    last_blocks: int | None,
    steps: int,
    seed: int,
) -> TrainedProbe:
    """Train a copy of the encoder, keep its best step on validate, predict test.

    The best step has the highest mean over all targets, of AUROC and of R²; step 0 is the linear
    probe.

    Args:
        encoder: Stays as it is.
        image_of: Reads images, and augments those to train on.
        splits: Images and targets.
        last_blocks: How many blocks are trained; None for the whole encoder.
        steps: Of training.
        seed: Of order and augmentation.

    Raises:
        InputError: The encoder is no vision transformer, or has fewer blocks.
    """
    require_fine_tunable(encoder, last_blocks)
    train, scale = splits.train, TargetScale.of(splits.train.targets, splits.real)
    device = encoder.device
    targets = scale.standardised(train.targets).to(device)
    real = torch.from_numpy(splits.real).to(device)
    known = scale.standardised(splits.validate.targets).numpy()
    model = FineTuned(encoder.vit, len(real), last_blocks).to(device)
    _begin_as_linear_probe(model, image_of, splits, scale)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    batch_size = min(BATCH_SIZE, len(train.rows))
    learning_rate = LEARNING_RATE * batch_size / _RATE_IS_FOR
    best = _Best(model)

    def check(step: int) -> None:
        judged = _all_of(model, image_of, splits.validate.rows)
        best.look(step, float(validation_scores(known, judged, splits.real).mean()))

    check(0)
    checks = {math.ceil(steps * (part + 1) / CHECKS) for part in range(CHECKS)}
    batches = augmented_batches(image_of, train.rows, batch_size, steps, seed)
    with progress_bar(total=steps, unit="step", desc="fine-tune") as bar:
        for step, (images, places) in enumerate(batches):
            factor = cosine_factor(step, steps, round(WARMUP * steps))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor * group["rate"]
            outputs = _in_half_precision(model, images.to(device))
            loss = known_losses(outputs, targets[torch.from_numpy(places)], real).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step + 1 in checks:
                check(step + 1)
            bar.update()
    best.put_back()
    predicted = scale.predictions(_all_of(model, image_of, splits.test_rows))
    settings = {
        "trained": "all" if last_blocks is None else f"last {last_blocks} blocks",
        "chosen_step": best.step,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
    }
    return TrainedProbe(predicted, settings)


class _Best:
    """The weights of the best step so far, kept in memory."""

    def __init__(self, model: FineTuned) -> None:
        self._model, self._score = model, -math.inf
        self.step, self._weights = 0, self._copy()

    def look(self, step: int, score: float) -> None:
        if score > self._score:  # never where it is not a number
            self.step, self._score, self._weights = step, score, self._copy()

    def put_back(self) -> None:
        self._model.load_state_dict(self._weights, strict=False)

    def _copy(self) -> dict[str, Tensor]:
        trained = ((n, p) for n, p in self._model.named_parameters() if p.requires_grad)
        return {name: parameter.detach().clone() for name, parameter in trained}


def _begin_as_linear_probe(
    model: FineTuned, image_of: ImageOf, splits: LabelledSplits, scale: TargetScale
) -> None:
    """Give the head the weights of `fit_probes`, with the standardisation of features in them."""
    names = tuple(str(k) for k in range(len(splits.real)))
    numbers = frozenset(name for name, real in zip(names, splits.real, strict=True) if real)
    train, validate = (
        ProbeData(
            _all_of(model, image_of, split.rows, model.pooled),
            scale.standardised(split.targets).double().numpy(),
            names,
            numbers,
        )
        for split in (splits.train, splits.validate)
    )
    probes = fit_probes(train, validate)
    weight = torch.stack([probes.weights[name] / probes.standardizer.scale for name in names])
    bias = (
        torch.tensor([probes.biases[n] for n in names], dtype=torch.float64)
        - weight @ probes.standardizer.mean
    )
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)


def _in_half_precision(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Outputs as float32, computed in bfloat16 on a GPU."""
    kind = images.device.type
    with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
        return network(images).float()


@torch.no_grad()
def _all_of(
    model: FineTuned,
    image_of: ImageOf,
    rows: np.ndarray,
    network: Callable[[Tensor], Tensor] | None = None,
) -> np.ndarray:
    """What the model, or a part of it, gives for images as they are, [n, ...]."""
    device = model.head.weight.device
    parts = [
        _in_half_precision(network or model, images.to(device)).cpu()
        for images in plain_batches(image_of, rows, _TESTED_AT_ONCE)
    ]
    return torch.cat(parts).numpy()
