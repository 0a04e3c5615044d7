"""DINO: every student crop predicts the teacher's distribution of every other global crop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.models.precision import at_least_float32


def cross_entropy(targets: Tensor, scores: Tensor, temperature: float) -> Tensor:
    """Cross-entropy between teacher targets and student scores, one value a token.

    Args:
        targets: Probabilities [..., K], each summing to 1.
        scores: The student's head output [..., K].
        temperature: Of the student, > 0.

    Returns:
        float32 [...]; float64 of float64 scores.
    """
    return -(targets * F.log_softmax(at_least_float32(scores) / temperature, dim=-1)).sum(-1)


def dino_loss(
    targets: Tensor, global_scores: Tensor, local_scores: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The DINO loss, in its global and its local part.

    The sum of both is the mean of the cross-entropy over all pairs of a teacher's global crop
    and another crop of the student: 2 + 2 · L pairs an image.

    Args:
        targets: Teacher probabilities of the two global crops, [2, B, K].
        global_scores: Student scores of the global crops, [2, B, K].
        local_scores: Student scores of the local crops, [L, B, K]; L may be 0.
        temperature: Of the student, > 0.

    Returns:
        Two scalars: pairs of global crops, pairs with a local crop; both already divided by the
        number of all pairs.

    Reference:
        Caron et al., ICCV 2021, eq. 3, normalised over all pairs as in DINOv2.
    """
    pairs = 2 + 2 * len(local_scores)
    crossed = cross_entropy(targets.flip(0), global_scores, temperature)  # [2, B]
    global_part = crossed.mean(1).sum() / pairs
    if len(local_scores) == 0:
        return global_part, torch.zeros_like(global_part)
    # Cross-entropy is linear in the target, so both global targets go in as their sum.
    local = cross_entropy(targets.sum(0), local_scores, temperature)  # [L, B]
    return global_part, local.mean(1).sum() / pairs
