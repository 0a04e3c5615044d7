"""Balanced targets, against the textbook forms in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import softmax

from selfray.objectives.centering import centered_targets, sinkhorn_targets, update_center


def _scores(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (n, k))


def _swav(scores: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    """SwAV's published loop: prototypes × samples, each side's marginal in turn."""
    q = np.exp(scores / temperature).T
    k, n = q.shape
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * n
    return (q * n).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_is_that_of_swav(iterations: int) -> None:
    scores = _scores(12, 5)
    computed = sinkhorn_targets(torch.from_numpy(scores), 0.06, iterations).numpy()
    np.testing.assert_allclose(computed, _swav(scores, 0.06, iterations), rtol=1e-10)


def test_sinkhorn_in_float32_is_close_to_float64() -> None:
    scores = _scores(64, 128)
    computed = sinkhorn_targets(torch.from_numpy(scores).float(), 0.04).numpy()
    # exp of logits up to 25: float32's 6e-8 grows by that factor, and by the six divisions.
    np.testing.assert_allclose(computed, _swav(scores, 0.04, 3), rtol=2e-5, atol=1e-9)


def test_every_image_has_a_distribution_and_every_prototype_is_used_equally() -> None:
    targets = sinkhorn_targets(torch.from_numpy(_scores(20, 6)), 0.2, iterations=200).numpy()
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-12)
    np.testing.assert_allclose(targets.sum(0), 20 / 6, rtol=1e-6)


def test_scores_that_would_overflow_exp_do_not() -> None:
    targets = sinkhorn_targets(torch.tensor([[90.0, -90.0], [80.0, 70.0]]), 0.04)
    assert torch.isfinite(targets).all()
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


def test_no_masked_patch_gives_no_target() -> None:
    assert sinkhorn_targets(torch.zeros(0, 5), 0.04).shape == (0, 5)


def test_centered_targets_are_a_sharpened_softmax_around_the_centre() -> None:
    scores, center = _scores(4, 6), _scores(1, 6, seed=1)[0]
    computed = centered_targets(torch.from_numpy(scores), torch.from_numpy(center), 0.05)
    np.testing.assert_allclose(computed, softmax((scores - center) / 0.05, axis=1), rtol=1e-10)


def test_the_centre_is_a_moving_average_of_the_mean_score() -> None:
    center, expected = torch.zeros(6, dtype=torch.float64), np.zeros(6)
    for seed in range(5):
        scores = _scores(4 + seed, 6, seed)
        update_center(center, torch.from_numpy(scores))
        expected = 0.9 * expected + 0.1 * scores.mean(axis=0)
    np.testing.assert_allclose(center, expected, rtol=1e-10)
