"""Balanced teacher targets: by centering or by Sinkhorn-Knopp."""

from __future__ import annotations

import torch
from torch import Tensor

from selfray.distributed import sum_over_ranks
from selfray.models.precision import at_least_float32

# DINO's and DINOv2's momentum of the running centre.
_CENTER_MOMENTUM = 0.9


def centered_targets(scores: Tensor, center: Tensor, temperature: float) -> Tensor:
    """Teacher probabilities after subtracting the running centre.

    Args:
        scores: Teacher head output [n, K].
        center: Running mean of the scores [K].
        temperature: Of the teacher, > 0.

    Returns:
        float32 (float64 of float64) [n, K], rows sum to 1.

    Reference:
        Caron et al., ICCV 2021, section 3.1.
    """
    return torch.softmax((at_least_float32(scores) - center) / temperature, dim=-1)


@torch.no_grad()
def update_center(center: Tensor, scores: Tensor) -> None:
    """Move the centre a tenth of the way to the mean score of the global batch, in place.

    Args:
        center: [K].
        scores: Teacher head output [n, K] of this rank; n may differ between ranks.
    """
    count = sum_over_ranks(torch.full((1,), float(len(scores)), device=scores.device))
    mean = sum_over_ranks(at_least_float32(scores).sum(0)) / count.clamp(min=1)
    center.lerp_(mean, 1 - _CENTER_MOMENTUM)


@torch.no_grad()
def sinkhorn_targets(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Teacher probabilities of a batch in which every prototype is used equally.

    Args:
        scores: Teacher head output [n, K] of this rank; n may differ between ranks.
        temperature: Of the teacher, > 0.
        iterations: Alternations of the two normalisations.

    Returns:
        float32 (float64 of float64) [n, K]; rows sum to 1, columns over the global batch
        nearly to rows / K.

    Reference:
        Cuturi, Sinkhorn distances, NeurIPS 2013; Caron et al., SwAV, NeurIPS 2020, appendix A.
    """
    logits = at_least_float32(scores) / temperature
    # A prototype's largest score cancels in the first normalisation. Without it exp overflows;
    # with the largest of all prototypes instead, an image far from it underflows to a row of 0.
    largest = logits.amax(0) if len(logits) else logits.new_full(logits.shape[1:], -torch.inf)
    assignment = torch.exp(logits - _max_over_ranks(largest))
    for _ in range(iterations):
        assignment = assignment / sum_over_ranks(assignment.sum(0)).clamp(min=1e-30)
        assignment = assignment / assignment.sum(1, keepdim=True).clamp(min=1e-30)
    return assignment


def _max_over_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value
