"""KoLeo, against SciPy's distances in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from selfray.errors import InputError
from selfray.objectives.koleo import koleo_loss


def test_the_loss_is_minus_the_mean_log_distance_to_the_nearest_neighbour() -> None:
    tokens = 3 * np.random.default_rng(0).standard_normal((9, 5))
    on_sphere = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    distances = cdist(on_sphere, on_sphere) + np.diag(np.full(9, np.inf))
    expected = -np.log(distances.min(axis=1)).mean()
    # The two eps of 1e-8 move the log of a distance of order 1 by some 1e-8.
    assert float(koleo_loss(torch.from_numpy(tokens))) == pytest.approx(expected, abs=1e-7)


def test_gradients_are_those_of_the_loss() -> None:
    tokens = torch.from_numpy(np.random.default_rng(1).standard_normal((5, 4)))
    assert torch.autograd.gradcheck(koleo_loss, (tokens.requires_grad_(),))


def test_the_loss_falls_when_features_spread() -> None:
    close = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2]])
    apart = torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]])
    assert koleo_loss(apart) < koleo_loss(close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_twins_give_a_finite_loss_and_gradient(dtype: torch.dtype) -> None:
    tokens = torch.ones(4, 8, dtype=dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = koleo_loss(tokens)
    loss.backward()
    assert torch.isfinite(loss)
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


def test_a_lone_image_is_refused() -> None:
    with pytest.raises(InputError, match="batch of 2 or more"):
        koleo_loss(torch.ones(1, 8))
