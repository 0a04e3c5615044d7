"""Training of a decoder on patch tokens, and its label maps at any resolution.

Labels that share pixels (lungs and lung zones) each have a sigmoid of their own: multi-label. Of
labels that never do, one softmax over them and the background decides: multi-class.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.evals.segmentation_decoders import build_decoder

BATCH_SIZE = 16
"""Images a step, as in DINOv2's linear segmentation."""

_WARM_UP = 0.1  # of the steps
_WEIGHT_DECAY = 1e-4  # as in DINOv2's linear segmentation
_CHECKS = 5  # validations, evenly spaced, the last one after the last step
_CHUNK = 64  # images at a time where no gradient is needed
# Pixels of both masks that Dice's loss adds, so that a label that a batch lacks gives no 0/0.
_SMOOTH = 1.0
_LEARNING_RATES = {"linear": 1e-1, "linear-four-blocks": 1e-1, "vitdet": 1e-3, "upernet": 1e-3}

InputsOf = Callable[[np.ndarray], Tensor]
"""From places among the images of a split, int [b], to what a `SegmentationDecoder` takes."""


@dataclass(frozen=True)
class LabelledInputs:
    """What a decoder is given for some images, and their label maps on the same square.

    Attributes:
        inputs: Reads those of some of the n images.
        label_maps: uint16 [n, T, T], bit k where label k is; T even.
    """

    inputs: InputsOf
    label_maps: np.ndarray


class SegmentationDecoder(nn.Module):
    """A decoder with the scaling of the tokens that it was trained on.

    Args:
        name: One of `DECODERS`.
        width: D of the tokens.
        grid: Rows and columns of patches.
        levels: L, how many blocks' tokens it is given.
        labels: K.
        multi_label: Whether labels share pixels.
        seed: Of the fresh weights.
    """

    def __init__(
        self,
        name: str,
        width: int,
        grid: tuple[int, int],
        *,
        levels: int,
        labels: int,
        multi_label: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.name, self.labels, self.multi_label = name, labels, multi_label
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.decoder = build_decoder(name, width, labels + (not multi_label), grid, levels)
        self.mean = nn.Buffer(torch.zeros(levels, width, 1, 1))
        self.std = nn.Buffer(torch.ones(levels, width, 1, 1))

    @torch.no_grad()
    def scale_by(self, batches: Iterable[Tensor]) -> None:
        """Take mean and standard deviation of each channel from some inputs.

        What DINOv2's linear segmentation learns in a batch normalisation.
        """
        sums = []
        for inputs in batches:
            values = torch.stack(self.levels(inputs.to(self.mean.device))).double()
            count = torch.full_like(values[:, 0, :, 0, 0], values[0, :, 0].numel())
            sums.append(torch.stack([count, values.sum((1, 3, 4)), (values**2).sum((1, 3, 4))]))
        count, total, squares = torch.stack(sums).sum(dim=0)
        mean = total / count
        self.mean.copy_(mean[..., None, None])
        # A channel that never changes must not be divided by 0.
        variance = (squares / count - mean**2).clamp_min(1e-12)
        self.std.copy_(variance.sqrt()[..., None, None])

    def levels(self, inputs: Tensor) -> list[Tensor]:
        """Patch tokens [B, L, h, w, D] as a decoder takes them: float32 [B, D, h, w] of each."""
        return [level.float().permute(0, 3, 1, 2) for level in inputs.unbind(dim=1)]

    def forward(self, inputs: Tensor) -> Tensor:
        """What `levels` takes to logits [B, K or K + 1, H', W'].

        In the multi-class case map 0 is the background.
        """
        found = zip(self.levels(inputs), self.mean, self.std, strict=True)
        return self.decoder([(level - mean) / std for level, mean, std in found])

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, for an optimiser; `rate` is the highest learning rate."""
        rate = _LEARNING_RATES[self.name]
        return [
            {"params": [*self.decoder.parameters()], "rate": rate, "weight_decay": _WEIGHT_DECAY}
        ]

    def masks(self, logits: Tensor) -> Tensor:
        """From logits at any resolution, [B, K or K + 1, H, W], to bool [B, K, H, W]."""
        if self.multi_label:
            return logits > 0
        return F.one_hot(logits.argmax(dim=1), self.labels + 1)[..., 1:].movedim(-1, 1).bool()


def segmentation_loss(logits: Tensor, coverage: Tensor, *, multi_label: bool) -> Tensor:
    """Dice + cross-entropy; of labels that share pixels, Dice + binary cross-entropy.

    Dice's sums run over the batch, so that a label that is small or absent in one image does not
    swing the loss; the background has no Dice.

    Args:
        logits: [B, K, H, W]; multi-class [B, K + 1, H, W], background first.
        coverage: [B, K, H, W], the share of each cell that a label covers, 0 to 1.
        multi_label: Whether labels share pixels.

    Returns:
        Scalar, >= 0.

    Reference:
        Milletari et al., V-Net, 3DV 2016, without the squares; Isensee et al., nnU-Net, Nature
        Methods 18 (2021), for the sum of both and for the batch.
    """
    if multi_label:
        entropy = F.binary_cross_entropy_with_logits(logits, coverage)
        shares = logits.sigmoid()
    else:
        background = 1 - coverage.sum(dim=1, keepdim=True)
        entropy = F.cross_entropy(logits, torch.cat([background, coverage], dim=1))
        shares = logits.softmax(dim=1)[:, 1:]
    common = (shares * coverage).sum(dim=(0, 2, 3))
    sizes = shares.sum(dim=(0, 2, 3)) + coverage.sum(dim=(0, 2, 3))
    return entropy + (1 - (2 * common + _SMOOTH) / (sizes + _SMOOTH)).mean()


def train_decoder(
    decoder: SegmentationDecoder,
    train: LabelledInputs,
    validate: LabelledInputs,
    batch_at: Callable[[int], np.ndarray],
    steps: int,
    on_step: Callable[[], object],
) -> tuple[int, float]:
    """Train, and keep the weights of the best of a few validations.

    AdamW, linear warm-up over a tenth of the steps, then a cosine down to 0. On a CPU, the same
    arguments give the same weights.

    Args:
        decoder: Changed in place; its device is used.
        train: To fit.
        validate: To choose the step by its Dice: the mean over labels of the mean over images that
            have the label.
        batch_at: From a step, 0 and up, to int [B], which of the training images are its batch.
        steps: How many, >= 1.
        on_step: Called after each.

    Returns:
        The best step, 1 to `steps`, and its Dice on `validate`.
    """
    device = decoder.mean.device
    optimizer = torch.optim.AdamW(decoder.parameter_groups())
    checks = {math.ceil(steps * k / _CHECKS) for k in range(1, _CHECKS + 1)}
    best, best_step, kept = -1.0, 0, decoder.state_dict()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * _schedule(step, steps)
        decoder.train()
        chosen = batch_at(step)
        logits = decoder(train.inputs(chosen).to(device))
        logits, coverage = _aligned(logits, train.label_maps[chosen], decoder.labels)
        loss = segmentation_loss(logits, coverage, multi_label=decoder.multi_label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 in checks:
            dice = validation_dice(decoder, validate)
            if dice > best:
                best, best_step, kept = dice, step + 1, copy.deepcopy(decoder.state_dict())
        on_step()
    decoder.load_state_dict(kept)
    decoder.eval()
    return best_step, best


@torch.no_grad()
def validation_dice(decoder: SegmentationDecoder, data: LabelledInputs) -> float:
    """Dice on the square that the encoder sees: mean over labels of the mean over images.

    Images that lack a label do not count for it, nor do labels that no image has.
    """
    decoder.eval()
    device = decoder.mean.device
    total, count = (torch.zeros(decoder.labels, dtype=torch.float64) for _ in range(2))
    for start in range(0, len(data.label_maps), _CHUNK):
        chosen = np.arange(start, min(start + _CHUNK, len(data.label_maps)))
        logits = decoder(data.inputs(chosen).to(device))
        logits, coverage = _aligned(logits, data.label_maps[chosen], decoder.labels)
        truth, found = coverage >= 0.5, decoder.masks(logits)
        common, sizes = (truth & found).sum((2, 3)), truth.sum((2, 3)) + found.sum((2, 3))
        present = truth.any(dim=-1).any(dim=-1)  # [b, K]
        dice = torch.where(present, 2 * common / sizes.clamp_min(1), 0.0)
        total += dice.double().sum(dim=0).cpu()
        count += present.sum(dim=0).cpu()
    return float((total[count > 0] / count[count > 0]).mean())


def logits_at(
    logits: Tensor, box: tuple[float, float, float, float], size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Bring logits of the square that an encoder sees back to the image, bilinearly.

    Args:
        logits: [K, H', W'] of the square.
        box: Where the square lies in the image: top, left, bottom, right edge, pixels.
        size: H and W of the image.

    Returns:
        [K, H, W], and bool [H, W], which pixels lie in the square. Outside, logits go on with
        those of the edge and mean nothing.
    """
    top, left, bottom, right = box
    along = [
        (torch.arange(side, dtype=torch.float64, device="cpu") + 0.5 - start) / (end - start)
        for side, start, end in zip(size, (top, left), (bottom, right), strict=True)
    ]
    y, x = torch.meshgrid(*along, indexing="ij")
    inside = (y >= 0) & (y < 1) & (x >= 0) & (x < 1)
    places = (torch.stack([x, y], dim=-1) * 2 - 1).to(logits)[None]
    # Coordinates of edges, not of centres, as in the enlarging to which this amounts.
    found = F.grid_sample(logits[None], places, padding_mode="border", align_corners=False)[0]
    return found, inside.to(logits.device)


def share_pixels(label_maps: np.ndarray) -> bool:
    """Whether any pixel of uint16 label maps has two labels."""
    # Taking 1 off clears the lowest bit that is set; of 0 it sets all, which the & undoes.
    return bool((label_maps & (label_maps - np.uint16(1))).any())


def _aligned(logits: Tensor, label_maps: np.ndarray, labels: int) -> tuple[Tensor, Tensor]:
    """Logits and coverage [B, K, S, S] at the side at which the loss compares them.

    That is the label maps' own, or half of it where the logits are no finer: a quarter of the work.
    """
    side = label_maps.shape[-1]
    bits = torch.from_numpy(label_maps.astype(np.int32)).to(logits.device)[:, None]
    places = torch.arange(labels, device=logits.device, dtype=torch.int32)[:, None, None]
    coverage = ((bits >> places) & 1).float()
    if max(logits.shape[-2:]) <= side // 2:
        side //= 2
        coverage = F.avg_pool2d(coverage, 2)
    return F.interpolate(logits, (side, side), mode="bilinear", align_corners=False), coverage


def _schedule(step: int, steps: int) -> float:
    warm_up = max(1, int(_WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
