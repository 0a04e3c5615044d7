"""KoLeo: spread the features of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from selfray.distributed import gather_over_ranks
from selfray.errors import InputError
from selfray.models.precision import at_least_float32


def koleo_loss(cls_tokens: Tensor, eps: float = 1e-8) -> Tensor:
    """Spread a batch of features out, by the distance of each to its nearest neighbour.

    Taken over the global batch (features are gathered from all ranks), so that it does not
    depend on the number of ranks; upstream takes it on each rank.

    Args:
        cls_tokens: [B, D], any scale; normalised here. B >= 2 over all ranks.
        eps: Added to distances (dimensionless), so that twins give a finite loss.

    Returns:
        Scalar, float32 at least, lower when features are spread.

    Raises:
        InputError: B < 2: a lone feature has no neighbour.

    Reference:
        Sablayrolles et al., Spreading vectors for similarity search, ICLR 2019, eq. 2.
    """
    # In half precision eps would vanish and twins give log(0).
    with torch.autocast(cls_tokens.device.type, enabled=False):
        features = F.normalize(gather_over_ranks(at_least_float32(cls_tokens)), dim=-1, eps=eps)
        if len(features) < 2:
            raise InputError("KoLeo needs a batch of 2 or more. Set --loss.koleo-weight 0.")
        with torch.no_grad():
            similarity = features @ features.T
            similarity.fill_diagonal_(-torch.inf)
            neighbours = similarity.argmax(1)
        distances = F.pairwise_distance(features, features[neighbours], eps=eps)
        return -torch.log(distances + eps).mean()
