"""Image and text encoder with a space that they share: one contrastive step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from selfray.models.text_encoder import TextEncoder, Tokens
from selfray.models.vit import VisionTransformer
from selfray.objectives.clip import clip_loss, pairs_found, siglip_loss, similarities
from selfray.objectives.student_teacher import mean_cosine

ContrastiveLoss = Literal["clip", "siglip"]


class Part(NamedTuple):
    """Some pairs of a batch.

    Attributes:
        images: uint8 [B, S, S].
        texts: Tokens of the B texts.
        seed: Of the randomness inside the networks (drop path, dropout).
    """

    images: Tensor
    texts: Tokens
    seed: int


class Logits(nn.Module):
    """The learned factor and bias from similarities to logits.

    Args:
        scale: Initial factor, > 0; learned as its logarithm.
        largest: The factor stays at or below this.
        bias: Initial bias, or None for none.
    """

    def __init__(self, scale: float, largest: float, bias: float | None) -> None:
        super().__init__()
        self._largest = math.log(largest)
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    @property
    def scale(self) -> Tensor:
        """The factor, scalar."""
        return self.log_scale.exp()

    @torch.no_grad()
    def hold(self) -> None:
        """Bring the factor back below the largest, after an optimizer step."""
        self.log_scale.clamp_(max=self._largest)


class ImageText(nn.Module):
    """Both encoders, their projections, and what makes logits of similarities.

    Args:
        encoder: Of images; what the run is for.
        text_encoder: Of texts.
        mean: Mean of the pixels after scaling to 0..1.
        std: Standard deviation of the same.
        embedding: Width E of the shared space.
        loss: `clip` or `siglip`.
        scale: Initial factor of the similarities.
        scale_largest: Its largest value.
        bias: Initial bias of siglip's logits.

    Reference:
        Radford et al., ICML 2021: linear projections without bias, drawn with a standard deviation
        of 1 / sqrt(width).
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        text_encoder: TextEncoder,
        *,
        mean: float,
        std: float,
        embedding: int,
        loss: ContrastiveLoss,
        scale: float,
        scale_largest: float,
        bias: float,
    ) -> None:
        super().__init__()
        self.encoder, self.text_encoder = encoder, text_encoder
        self.image_projection = _projection(encoder.width, embedding)
        self.text_projection = _projection(text_encoder.width, embedding)
        self.logits = Logits(scale, scale_largest, bias if loss == "siglip" else None)
        self.mean, self.std, self.loss = mean, std, loss

    @property
    def trained(self) -> nn.Module:
        """What the optimizer moves: everything."""
        return self

    @property
    def result(self) -> VisionTransformer:
        """The encoder that the run is for."""
        return self.encoder

    def step(self, parts: Sequence[Part]) -> dict[str, Tensor]:
        """Forward and backward of this rank's batch; gradients are left in the parameters.

        Of several parts, the features of all are computed first, without what a backward pass
        needs; then each part again, with the gradient that the whole batch's loss has at its
        features. So the loss is of the whole batch, whatever the parts.

        Args:
            parts: The batch, cut along the pairs.

        Returns:
            Scalars: `loss`, `mean_cosine` (between CLS tokens of different images; 1 means
            collapse), `pairs_found`, `logit_scale` and, with siglip, `logit_bias`.

        Reference:
            Gao et al., Scaling deep contrastive learning batch size under memory limited setup,
            RepL4NLP 2021.
        """
        if len(parts) == 1:
            cls, images, texts = self._features(parts[0])
            loss, watched = self._loss(images, texts)
            loss.backward()
            return watched | {"mean_cosine": mean_cosine(cls.detach())}
        with torch.no_grad():
            cls, images, texts = (
                torch.cat(features)
                for features in zip(*(self._features(part) for part in parts), strict=True)
            )
        images.requires_grad_()
        texts.requires_grad_()
        loss, watched = self._loss(images, texts)
        loss.backward()
        first = 0
        for part in parts:
            _, *features = self._features(part)
            here = slice(first, first + len(part.images))
            gradients = [images.grad[here], texts.grad[here]]  # pyright: ignore[reportOptionalSubscript]
            torch.autograd.backward(features, gradients)
            first = here.stop
        return watched | {"mean_cosine": mean_cosine(cls)}

    def _features(self, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """CLS [B, D], and images and texts in the shared space, [B, E] each."""
        torch.manual_seed(part.seed)
        images = part.images.unsqueeze(1).float().div_(255).sub_(self.mean).div_(self.std)
        cls = self.encoder(images).cls
        texts = self.text_encoder(part.texts)
        return cls, self.image_projection(cls), self.text_projection(texts)

    def _loss(self, images: Tensor, texts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        found = similarities(images, texts)
        scale, bias = self.logits.scale, self.logits.bias
        loss = clip_loss(found, scale) if bias is None else siglip_loss(found, scale, bias)
        watched = {
            "loss": loss.detach(),
            "pairs_found": pairs_found(found),
            "logit_scale": scale.detach(),
        }
        if bias is not None:
            watched["logit_bias"] = bias.detach()
        return loss, watched


def _projection(width: int, embedding: int) -> nn.Linear:
    projection = nn.Linear(width, embedding, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection
