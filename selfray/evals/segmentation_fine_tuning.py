"""Fine-tuning for segmentation: the encoder is trained together with a decoder on it.

The decoder begins fresh and keeps its own learning rate. The encoder's falls from the last block
to the first; it and the weight decay are those by which BEiT-B, pre-trained on images alone, is
fine-tuned with UPerNet (Bao et al., ICLR 2022, published configuration for ADE20K).
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from selfray.evals.segmentation_training import SegmentationDecoder
from selfray.models.layer_decay import layer_wise_rate
from selfray.models.vit import VisionTransformer

_LEARNING_RATE = 7e-4  # for 16 images a step, there as here
_LAYER_DECAY = 0.65
_WEIGHT_DECAY = 0.05


class FineTunedDecoder(SegmentationDecoder):
    """A decoder together with a copy of the encoder that makes its patch tokens.

    Args:
        name: One of `DECODERS`.
        encoder: Copied; stays as it is.
        blocks: Which of its blocks the decoder reads, ascending, from 0; the last is its last.
        grid: Rows and columns of patches.
        labels: K.
        multi_label: Whether labels share pixels.
        seed: Of the decoder's fresh weights.
    """

    def __init__(
        self,
        name: str,
        encoder: VisionTransformer,
        blocks: Sequence[int],
        grid: tuple[int, int],
        *,
        labels: int,
        multi_label: bool,
        seed: int,
    ) -> None:
        super().__init__(
            name,
            encoder.width,
            grid,
            levels=len(blocks),
            labels=labels,
            multi_label=multi_label,
            seed=seed,
        )
        self.encoder = copy.deepcopy(encoder).requires_grad_(True)
        self.blocks = tuple(blocks)

    def train(self, mode: bool = True) -> FineTunedDecoder:
        """The encoder stays in evaluation mode: stochastic depth is for long trainings."""
        super().train(mode)
        self.encoder.eval()
        return self

    def levels(self, inputs: Tensor) -> list[Tensor]:
        """Preprocessed images [B, C, S, S] to float32 [B, D, h, w] of each block."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
            return block_levels(self.encoder, inputs, self.blocks)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The decoder's, and the encoder's layer by layer; matrices and convolutions decay."""
        groups: defaultdict[tuple[float, bool], list[Tensor]] = defaultdict(list)
        for name, parameter in self.encoder.named_parameters():
            share = layer_wise_rate(f"encoder.{name}", self.encoder.depth, _LAYER_DECAY, 1.0)
            groups[share, name.endswith(".weight") and parameter.ndim > 1].append(parameter)
        return super().parameter_groups() + [
            {
                "params": parameters,
                "rate": _LEARNING_RATE * share,
                "weight_decay": _WEIGHT_DECAY if decays else 0.0,
            }
            for (share, decays), parameters in groups.items()
        ]


def block_levels(encoder: VisionTransformer, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Patch tokens of some blocks, each after the final norm, as `Encoder.blocks` without gradient.

    Args:
        encoder: The network.
        images: [B, C, H, W], preprocessed.
        blocks: Which, ascending, from 0.

    Returns:
        float32 [B, D, h, w] of each.
    """
    x = encoder.embed(images)
    rows, first_patch = images.shape[-2] // encoder.patch_size, 1 + encoder.registers
    found = []
    for index, block in enumerate(encoder.blocks):
        x = block(x)
        if index in blocks:
            patches = encoder.norm(x)[:, first_patch:].float()
            found.append(patches.transpose(1, 2).unflatten(2, (rows, -1)))
    return found
