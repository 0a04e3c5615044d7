"""iBOT: masked patch tokens predict what the teacher sees in their place."""

from __future__ import annotations

from torch import Tensor

from selfray.objectives.dino import cross_entropy


def ibot_loss(
    targets: Tensor, scores: Tensor, patch_weights: Tensor, crops: int, temperature: float
) -> Tensor:
    """Cross-entropy of masked patches: mean over the patches of a crop, then over the crops.

    Args:
        targets: Teacher probabilities of the masked patches, [M, K].
        scores: Student scores of the same patches, [M, K].
        patch_weights: 1 / (masked patches of the same crop), [M].
        crops: Number of global crops, masked or not. Crops left whole count with loss 0, as
            upstream has it, so the masking probability also weighs this loss.
        temperature: Of the student, > 0.

    Returns:
        Scalar float32.

    Reference:
        Zhou et al., iBOT, ICLR 2022, eq. 2; the weights are DINOv2's `forward_masked`.
    """
    return (cross_entropy(targets, scores, temperature) * patch_weights).sum() / crops
