"""Projection heads: from CLS or patch tokens to scores over prototypes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.distributed import sum_over_ranks, world_size
from selfray.models.precision import at_least_float32


class DinoHead(nn.Module):
    """MLP, L2 normalisation, and weight-normed prototypes of unit length.

    Parameters are named as in the published `dino_head.safetensors`: `mlp.{0,2,4}.weight|bias`,
    `last_layer.weight_g|weight_v`.

    Args:
        width: Width of the tokens.
        prototypes: Number of prototypes K.
        hidden: Width of the hidden layers.
        bottleneck: Width before the prototypes.
        layers: Linear layers of the MLP, >= 1.
        batch_norm: Normalise each hidden layer over the tokens of the global batch. It removes
            what all radiographs share, without which a small encoder does not start to learn.

    Reference:
        Caron et al., Emerging properties in self-supervised vision transformers, ICCV 2021;
        batch norm in the head is an option there.
    """

    def __init__(
        self,
        width: int,
        *,
        prototypes: int,
        hidden: int,
        bottleneck: int,
        layers: int,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.batch_norm = batch_norm
        widths = [width, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            modules += [nn.Linear(fan_in, fan_out), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = Prototypes(bottleneck, prototypes)
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of tokens.

        Args:
            tokens: [n, width].

        Returns:
            Cosines between tokens and prototypes, [n, K], in -1 to 1 (weight_g is 1).
        """
        for module in self.mlp:
            if self.batch_norm and isinstance(module, nn.GELU):
                tokens = _standardise_over_batch(tokens)
            tokens = module(tokens)
        # Norms and their gradients lose too much in bfloat16.
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = F.normalize(at_least_float32(tokens), dim=-1, eps=1e-6)
        return self.last_layer(tokens)


class Prototypes(nn.Module):
    """Weight-normed linear map without bias; the lengths `weight_g` stay at 1.

    Args:
        bottleneck: Width of the input.
        prototypes: Number of prototypes.
    """

    def __init__(self, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(prototypes, bottleneck), std=0.02)
        )
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(tokens, self.weight_g * F.normalize(self.weight_v, dim=-1))


def _standardise_over_batch(tokens: Tensor, eps: float = 1e-5) -> Tensor:
    """Zero mean and unit variance of each feature over the global batch; no parameters."""
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = at_least_float32(tokens)
        if world_size() == 1:
            variance, mean = torch.var_mean(tokens, dim=0, correction=0)
            return (tokens - mean) * torch.rsqrt(variance + eps)
        count = sum_over_ranks(torch.full((1,), float(len(tokens)), device=tokens.device))
        mean = sum_over_ranks(tokens.sum(0)) / count
        variance = sum_over_ranks((tokens - mean).square().sum(0)) / count
        return (tokens - mean) * torch.rsqrt(variance + eps)
