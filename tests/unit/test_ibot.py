"""The iBOT loss, against a loop over crops and their masked patches in float64."""

from __future__ import annotations

import numpy as np
import torch
from scipy.special import log_softmax, softmax

from selfray.objectives.ibot import ibot_loss

COUNTS = [3, 0, 1, 5]  # masked patches of each crop


def _inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    n = sum(COUNTS)
    weights = np.concatenate([np.full(c, 1 / c) for c in COUNTS if c])
    targets = softmax(generator.standard_normal((n, 6)), axis=1)
    return targets, generator.uniform(-1, 1, (n, 6)), weights


def test_the_loss_is_a_mean_over_a_crops_masked_patches_then_over_all_crops() -> None:
    targets, scores, weights = _inputs()
    of_crops, first = [], 0
    for count in COUNTS:
        patches = range(first, first + count)
        losses = [-np.dot(targets[i], log_softmax(scores[i] / 0.1)) for i in patches]
        of_crops.append(np.mean(losses) if losses else 0.0)
        first += count
    computed = ibot_loss(*(torch.from_numpy(a) for a in (targets, scores, weights)), 4, 0.1)
    np.testing.assert_allclose(float(computed), np.mean(of_crops), rtol=1e-12)


def test_gradients_are_those_of_the_loss() -> None:
    targets, scores, weights = (torch.from_numpy(a) for a in _inputs())
    assert torch.autograd.gradcheck(
        lambda s: ibot_loss(targets, s, weights, 4, 0.1), (scores.requires_grad_(),)
    )


def test_without_masked_patches_the_loss_is_0_and_has_a_gradient() -> None:
    scores = torch.zeros(0, 6, requires_grad=True)
    loss = ibot_loss(torch.zeros(0, 6), scores, torch.zeros(0), 4, 0.1)
    loss.backward()
    assert float(loss.detach()) == 0.0
