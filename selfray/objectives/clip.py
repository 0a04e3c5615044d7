"""Contrastive losses of images and their texts, over the batches of all ranks."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray import distributed


class Similarities(NamedTuple):
    """Cosine similarities of this rank's b pairs with all B of the batch.

    Attributes:
        by_image: [b, B], this rank's images with every text.
        by_text: [b, B], this rank's texts with every image.
        own: int64 [b], the column of each row's own partner.
    """

    by_image: Tensor
    by_text: Tensor
    own: Tensor


def similarities(images: Tensor, texts: Tensor) -> Similarities:
    """Gather the batch from all ranks and compare.

    Gradients pass to the features of every rank: each rank's loss is of its own rows, the batch's
    is the mean over ranks, and gradients averaged over ranks are those of one rank with all.

    Args:
        images: [b, E], any scale; normalised here, in float32 at least. Equal b on all ranks.
        texts: [b, E], row by row those of the images.
    """
    with torch.autocast(images.device.type, enabled=False):
        images, texts = (_unit(features) for features in (images, texts))
        all_images = distributed.gather_over_ranks(images)
        all_texts = distributed.gather_over_ranks(texts)
        first = distributed.rank() * len(images)
        own = torch.arange(first, first + len(images), device=images.device)
        return Similarities(images @ all_texts.T, texts @ all_images.T, own)


def clip_loss(found: Similarities, scale: Tensor) -> Tensor:
    """Cross-entropy of the own partner among all, images to texts and texts to images.

    Args:
        found: Of the batch.
        scale: Factor of the similarities, 1 / temperature, scalar.

    Returns:
        Mean over this rank's pairs and both directions, nats, scalar; ln B where nothing is told
        apart.

    Reference:
        Radford et al., Learning transferable visual models from natural language supervision,
        ICML 2021, figure 3; van den Oord et al., Representation learning with contrastive
        predictive coding, 2018, eq. 4 (InfoNCE).
    """
    by_image = F.cross_entropy(scale * found.by_image, found.own)
    by_text = F.cross_entropy(scale * found.by_text, found.own)
    return (by_image + by_text) / 2


def siglip_loss(found: Similarities, scale: Tensor, bias: Tensor) -> Tensor:
    """Logistic loss of every pair: is the text the image's own?

    Args:
        found: Of the batch.
        scale: Factor of the similarities, scalar.
        bias: Added to the logits, scalar; it begins low, since nearly all pairs do not match.

    Returns:
        Sum over the texts, mean over this rank's images, nats, scalar.

    Reference:
        Zhai et al., Sigmoid loss for language image pre-training, ICCV 2023, eq. 1 and
        algorithm 1.
    """
    logits = scale * found.by_image + bias
    signs = torch.full_like(logits, -1.0)
    signs[torch.arange(len(logits), device=logits.device), found.own] = 1.0
    return -F.logsigmoid(signs * logits).sum() / len(logits)


@torch.no_grad()
def pairs_found(found: Similarities) -> Tensor:
    """Share of this rank's images whose own text is the nearest of all, scalar, 0 to 1."""
    return (found.by_image.argmax(1) == found.own).float().mean()


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
