"""k-nearest neighbours on frozen features: a judge without a fit, as in DINO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS: tuple[int, ...] = (10, 20, 100, 200)
TEMPERATURE = 0.07

_ELEMENTS = 8_000_000  # similarities or votes in memory at once


def knn_scores(
    train_features: np.ndarray | Tensor,
    train_labels: np.ndarray,
    features: np.ndarray | Tensor,
    neighbours: Sequence[int] = NEIGHBOURS,
    *,
    temperature: float = TEMPERATURE,
) -> dict[int, np.ndarray]:
    """Score images by a weighted vote of their nearest neighbours, by cosine similarity.

    A neighbour votes on a target with weight exp(similarity / temperature). Neighbours whose label
    is null have no vote; where no neighbour has one, the score is the training prevalence.

    Args:
        train_features: [N, D].
        train_labels: [N, T]: 1, 0, or NaN where it is not known.
        features: [M, D].
        neighbours: Numbers of neighbours k; those above N count as N.
        temperature: Dimensionless, > 0; lower gives the nearest more say.

    Returns:
        By k, float64 [M, T] in 0 to 1; NaN for targets without a training label.

    Reference:
        Wu et al., Unsupervised feature learning via non-parametric instance discrimination, CVPR
        2018, section 3.4; k and temperature from Caron et al., DINO, ICCV 2021.
    """
    references = _normalised(train_features)
    queries = _normalised(features)
    labels = torch.as_tensor(train_labels, dtype=torch.float64)
    known = ~labels.isnan()
    values = torch.nan_to_num(labels)
    prevalence = values.sum(dim=0) / known.sum(dim=0)  # 0/0 is NaN: no label at all
    top = min(max(neighbours), len(references))
    scores: dict[int, list[Tensor]] = {k: [] for k in neighbours}
    width = max(len(references), top * labels.shape[1])
    for block in queries.split(max(1, _ELEMENTS // width)):
        similarity, nearest = (block @ references.T).topk(top, dim=1)  # [m, top], best first
        weight = torch.exp((similarity.double() - 1) / temperature)[:, :, None]
        votes = (weight * known[nearest]).cumsum(dim=1)  # [m, top, T]
        positive = (weight * values[nearest]).cumsum(dim=1)
        for k in neighbours:
            total = votes[:, min(k, top) - 1]
            share = positive[:, min(k, top) - 1] / total
            scores[k].append(torch.where(total > 0, share, prevalence))
    return {k: torch.cat(parts).numpy() for k, parts in scores.items()}


def _normalised(features: np.ndarray | Tensor) -> Tensor:
    return torch.nn.functional.normalize(torch.as_tensor(features).float(), dim=1)
