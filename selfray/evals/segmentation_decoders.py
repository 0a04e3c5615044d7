"""Decoders from patch tokens to logits: linear, ViTDet's feature pyramid, and UPerNet.

Each takes a list of levels, patch tokens [B, D, h, w] of one block or of four, and gives logits
[B, K, H', W'] on a grid that is finer than the patches; bringing them to the size of an image is
for the caller. Pérez-García et al. (RAD-DINO, Nature Machine Intelligence 7, 2025) judge
encoders by linear, ViTDet and UPerNet. What the paper leaves open is decided, and said, below.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.errors import InputError, nearest

DECODERS = ("linear", "linear-four-blocks", "vitdet", "upernet")
"""Each also with `FINE_TUNED` behind it: the encoder is trained together with the decoder."""
FINE_TUNED = "-fine-tuned"

_OF_FOUR_BLOCKS = {"linear-four-blocks", "upernet"}

LEVELS = 4
"""Blocks that a decoder of several reads, and maps of the pyramid."""

# Of the 518-pixel encoders of the paper, whose logits a linear decoder enlarges from 37 x 37.
_FINE_ENOUGH = 32
# Li et al.: channels of the pyramid; fewer where the tokens are narrower.
_CHANNELS = 256


def plain_name(name: str) -> str:
    """A decoder's name without `FINE_TUNED`."""
    return name.removesuffix(FINE_TUNED)


def is_fine_tuned(name: str) -> bool:
    """Whether the encoder is trained together with the decoder of this name."""
    return name.endswith(FINE_TUNED)


def blocks_read(name: str, depth: int) -> tuple[int, ...]:
    """Which of an encoder's blocks a decoder reads.

    Args:
        name: One of `DECODERS`, with or without `FINE_TUNED`.
        depth: How many blocks the encoder shows, >= 1.

    Returns:
        From 0, ascending, the last one last: four that are evenly spaced, for `linear-four-blocks`
        and `upernet` where there are so many; else the last one alone.

    Reference:
        MMSegmentation's ViT and its UPerNet: blocks 3, 6, 9 and 12 of 12. DINOv2's linear
        segmentation of four blocks takes the last four; on the phantom those are no better
        (docs/experiments.md), and patch tokens need to be kept once only.
    """
    if plain_name(name) in _OF_FOUR_BLOCKS and depth >= LEVELS:
        return tuple(depth * part // LEVELS - 1 for part in range(1, LEVELS + 1))
    return (depth - 1,)


def build_decoder(
    name: str, width: int, classes: int, grid: tuple[int, int], levels: int = 1
) -> nn.Module:
    """A decoder with fresh weights.

    Args:
        name: One of `DECODERS`.
        width: D of the tokens.
        classes: K, maps of logits.
        grid: Rows and columns of patches.
        levels: How many it will be given, 1 or 4.

    Raises:
        InputError: There is no such decoder, or `upernet` without transformers.
    """
    require_decoder(name)
    if name.startswith("linear"):
        return LinearDecoder(width, classes, grid, levels)
    return (VitDetDecoder if name == "vitdet" else UperNetDecoder)(width, classes)


def require_decoder(name: str) -> None:
    """Check that a decoder can be built.

    Args:
        name: To be one of `DECODERS`, with or without `FINE_TUNED`.

    Raises:
        InputError: There is no such decoder, or `upernet` without transformers.
    """
    if plain_name(name) not in DECODERS:
        allowed = (*DECODERS, *(f"{decoder}{FINE_TUNED}" for decoder in DECODERS))
        raise InputError(f"decoder {name!r} is unknown. {nearest(name, allowed)}")
    if plain_name(name) == "upernet":
        _upernet()


class LinearDecoder(nn.Module):
    """Logits that are a linear function of the tokens at their place, and of no other.

    As DINOv2's linear segmentation, where a patch is fine enough. Of a grid of fewer than 32 rows
    a token gives several logits, one for each cell of its patch, so that there are as many: a grid
    of 8 x 8 at one logit a patch cannot outline a lung, whoever made the tokens.

    Args:
        width: D.
        classes: K.
        grid: Rows and columns of patches.
        levels: How many, whose tokens are put side by side.

    Reference:
        Oquab et al., DINOv2: Learning robust visual features without supervision, TMLR 2024, 7.4;
        Shi et al., Real-time single image and video super-resolution, CVPR 2016, for the order of
        the cells.
    """

    def __init__(self, width: int, classes: int, grid: tuple[int, int], levels: int = 1) -> None:
        super().__init__()
        cells = -(-_FINE_ENOUGH // min(grid))
        self.logits = nn.Conv2d(levels * width, classes * cells**2, 1)
        self.arrange = nn.PixelShuffle(cells)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w] of each level to [B, K, c * h, c * w]."""
        return self.arrange(self.logits(torch.cat(list(levels), dim=1)))


class ChannelNorm(nn.LayerNorm):
    """Normalises the channels of each place of [B, C, H, W]: `LN` of ViTDet's code."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class FeaturePyramid(nn.Module):
    """ViTDet's simple feature pyramid, before its lateral convolutions.

    One map becomes four of 4, 2, 1 and 1/2 times its sides. Of four levels, as from four blocks of
    the encoder, each becomes one of them, the earliest block the finest map; so does BEiT's
    UPerNet.

    Args:
        width: D.

    Attributes:
        channels: Of each map, finest first.

    Reference:
        Li et al., Exploring plain vision transformer backbones for object detection, ECCV 2022;
        Bao et al., BEiT, ICLR 2022, for four levels.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = (width // 4, width // 2, width, width)
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                    ChannelNorm(width // 2, eps=1e-6),
                    nn.GELU(),
                    nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
                ),
                nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                nn.Identity(),
                # The source drops the last of an odd number of rows, and all of one row.
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """[B, D, h, w], one or four, to four maps, finest first."""
        spread = levels if len(levels) == len(self.scales) else [levels[-1]] * len(self.scales)
        return [scale(level) for scale, level in zip(self.scales, spread, strict=True)]


class VitDetDecoder(nn.Module):
    """ViTDet's simple feature pyramid with its lateral convolutions, summed for a label map.

    ViTDet detects objects and has no head for label maps: the maps are enlarged to the finest and
    added up, as in semantic FPN, and a 1 x 1 convolution gives the logits.

    Args:
        width: D.
        classes: K.

    Reference:
        Li et al., as `FeaturePyramid`; Kirillov et al., Panoptic feature pyramid networks, CVPR
        2019, 3.1.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        channels = min(_CHANNELS, width)
        self.pyramid = FeaturePyramid(width)
        self.laterals = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(found, channels, 1, bias=False),
                ChannelNorm(channels, eps=1e-6),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                ChannelNorm(channels, eps=1e-6),
            )
            for found in self.pyramid.channels
        )
        self.activation = nn.ReLU()
        self.logits = nn.Conv2d(channels, classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w], one or four, to [B, K, 4 * h, 4 * w]."""
        maps = [f(m) for f, m in zip(self.laterals, self.pyramid(levels), strict=True)]
        total = torch.stack([_enlarged(m, maps[0]) for m in maps]).sum(dim=0)
        return self.logits(self.activation(total))


class UperNetDecoder(nn.Module):
    """UPerNet's head, that of transformers, on ViTDet's pyramid.

    It pools the coarsest map over 1, 4, 9 and 36 parts of the image, adds the maps from coarse to
    fine, and joins them all.

    Args:
        width: D.
        classes: K.

    Reference:
        Xiao et al., Unified perceptual parsing for scene understanding, ECCV 2018.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        configuration, head = _upernet()
        channels = min(_CHANNELS, width)
        config = configuration(hidden_size=channels, use_auxiliary_head=False, num_labels=classes)
        self.pyramid = FeaturePyramid(width)
        self.head = head(config, in_channels=list(self.pyramid.channels))

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """[B, D, h, w], one or four, to [B, K, 4 * h, 4 * w]; B >= 2 in training."""
        return self.head(self.pyramid(levels))


def _enlarged(found: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(found, like.shape[-2:], mode="bilinear", align_corners=False)


def _upernet() -> tuple[type, type]:
    """transformers' configuration and head of UPerNet."""
    try:
        folder = "transformers.models.upernet"
        configuration = import_module(f"{folder}.configuration_upernet").UperNetConfig
        return configuration, import_module(f"{folder}.modeling_upernet").UperNetHead
    except ImportError as cause:
        raise InputError(
            "decoder 'upernet' is built by transformers, which is not installed. Run "
            "`pip install 'selfray[encoders]'`, or take linear or vitdet."
        ) from cause
