"""The DINO loss, against sums over all pairs in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from selfray.objectives.dino import cross_entropy, dino_loss

TEMPERATURE = 0.1


def _inputs(local_count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    targets = softmax(5 * generator.standard_normal((2, 3, 7)), axis=-1)
    return (
        targets,
        generator.uniform(-1, 1, (2, 3, 7)),
        generator.uniform(-1, 1, (local_count, 3, 7)),
    )


def _pairs(
    targets: np.ndarray, global_scores: np.ndarray, local_scores: np.ndarray
) -> tuple[float, float]:
    """Mean over images of each (teacher crop, other student crop), then over the pairs."""
    of_global, of_local = [], []
    for t in range(2):
        for s, scores in enumerate([*global_scores, *local_scores]):
            if s == t:
                continue
            values = [
                -sum(targets[t, b] * log_softmax(scores[b] / TEMPERATURE))
                for b in range(targets.shape[1])
            ]
            (of_global if s < 2 else of_local).append(np.mean(values))
    pairs = len(of_global) + len(of_local)
    return sum(of_global) / pairs, sum(of_local) / pairs


@pytest.mark.parametrize("local_count", [0, 1, 8])
def test_the_loss_is_the_mean_over_all_pairs_of_different_crops(local_count: int) -> None:
    inputs = _inputs(local_count)
    computed = dino_loss(*(torch.from_numpy(a) for a in inputs), TEMPERATURE)
    np.testing.assert_allclose([float(v) for v in computed], _pairs(*inputs), rtol=1e-12)


def test_equal_crops_at_equal_temperatures_give_the_entropy_of_the_target() -> None:
    _, scores, _ = _inputs(0)
    scores[1] = scores[0]
    targets = softmax(scores / TEMPERATURE, axis=-1)
    entropy = -(targets * np.log(targets)).sum(-1).mean()
    t, s = torch.from_numpy(targets), torch.from_numpy(scores)
    loss, _ = dino_loss(t, s, s[:0], TEMPERATURE)
    assert float(loss) == pytest.approx(entropy, rel=1e-12)


def test_uniform_scores_give_ln_k() -> None:
    targets = torch.from_numpy(_inputs(0)[0])
    zero = torch.zeros(2, 3, 7, dtype=torch.float64)
    assert float(sum(dino_loss(targets, zero, zero[:1], 0.1))) == pytest.approx(np.log(7))


def test_gradients_are_those_of_the_loss() -> None:
    targets, global_scores, local_scores = (torch.from_numpy(a) for a in _inputs(2))
    assert torch.autograd.gradcheck(
        lambda g, l: dino_loss(targets, g, l, TEMPERATURE),  # noqa: E741
        (global_scores.requires_grad_(), local_scores.requires_grad_()),
    )


def test_half_precision_scores_are_summed_in_float32() -> None:
    scores = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.full((4, 4096), 1 / 4096)
    exact = cross_entropy(targets.double(), scores.double(), TEMPERATURE)
    computed = cross_entropy(targets, scores, TEMPERATURE)
    assert computed.dtype == torch.float32
    np.testing.assert_allclose(computed.double(), exact, rtol=1e-5)
