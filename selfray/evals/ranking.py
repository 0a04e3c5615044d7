"""Which encoder is best, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfray.evals.bootstrap import LEVEL, Estimate


@dataclass(frozen=True)
class Rank:
    """The place of one encoder among those that were compared.

    Attributes:
        rank: 1 is best; encoders with equal points share the mean of their places.
        low: The better end of the interval of the rank.
        high: The worse end.
        best: Share of the resamples in which it is best, 0 to 1; equals share.
        may_be_best: Whether it belongs to the set that holds the best encoder with 95 %.
    """

    rank: float
    low: float
    high: float
    best: float
    may_be_best: bool


def rank_encoders(encoders: Sequence[Estimate]) -> list[Rank]:
    """Rank encoders by one metric, with uncertainty.

    The interval of the rank is that of the ranks over the resamples. It holds the right rank where
    encoders differ by more than their noise; where several are equal, no rank is right.

    `may_be_best` is by paired differences: an encoder is ruled out when the largest of the
    differences of the others to it, each over its standard error, is beyond the 95 % quantile that
    this largest one has in resamples (less the differences themselves). The encoder that is best in
    truth is ruled out in at most 5 % of studies, however many are compared: no correction for their
    number is due, because one encoder alone must not be lost.

    Args:
        encoders: Of one metric whose higher values are better, and the same resamples; at least
            two, all defined.

    Returns:
        One an encoder.

    Reference:
        Mogstad, Romano, Shaikh & Wilhelm, Inference for ranks with applications to mobility across
        neighbourhoods and academic achievement across countries, Review of Economic Studies 91
        (2024), section 3.2: a confidence set for the best.
    """
    from scipy.stats import rankdata

    points = np.array([one.point for one in encoders])
    resampled = np.stack([one.resampled for one in encoders])
    resampled = resampled[:, ~np.isnan(resampled).any(axis=0)]  # [E, R]
    places = rankdata(-resampled, axis=0)
    low, high = np.quantile(places, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    leads = resampled == resampled.max(axis=0)
    best = (leads / leads.sum(axis=0)).mean(axis=1)
    ranks = rankdata(-points)
    return [
        Rank(
            float(ranks[e]), float(low[e]), float(high[e]), float(best[e]),
            _may_be_best(e, points, resampled),
        )
        for e in range(len(encoders))
    ]  # fmt: skip


def _may_be_best(e: int, points: np.ndarray, resampled: np.ndarray) -> bool:
    behind = np.delete(points - points[e], e)  # [E - 1]
    noise = np.delete(resampled - resampled[e], e, axis=0) - behind[:, None]
    error = noise.std(axis=1)
    # An encoder with the very same predictions is neither ahead nor behind.
    differs = error > 0
    if not differs.any():
        return bool((behind <= 0).all())
    largest = (noise[differs] / error[differs, None]).max(axis=0)
    found = (behind[differs] / error[differs]).max()
    return bool(found <= np.quantile(largest, LEVEL))
