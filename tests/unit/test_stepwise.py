"""Targets, losses, batches and choices against NumPy, PyTorch's schedules and counting."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from selfray.evals.stepwise import (
    Purpose,
    TargetScale,
    augmented_batches,
    batch_places,
    choose,
    chosen_outputs,
    cosine_factor,
    generator_at,
    known_losses,
    validation_scores,
)

REAL = np.array([False, True, False])


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [2, 5, 3] and targets [5, 3], of which the last target is null throughout."""
    generator = np.random.default_rng(0)
    targets = np.stack([generator.integers(0, 2, 5), generator.normal(size=5), np.zeros(5)], 1)
    targets[[0, 3], 0] = targets[4, 1] = targets[:, 2] = np.nan
    return torch.from_numpy(generator.normal(size=(2, 5, 3))), torch.from_numpy(targets)


def test_losses_are_the_means_over_what_is_known(batch):
    outputs, targets = batch
    found = known_losses(outputs, targets, torch.from_numpy(REAL)).numpy()
    z, y = outputs.numpy(), targets.numpy()
    for c in range(2):
        rows = [1, 2, 4]
        log_loss = [np.log(1 + np.exp(-z[c, i, 0] * (2 * y[i, 0] - 1))) for i in rows]
        assert found[c, 0] == pytest.approx(np.mean(log_loss), abs=1e-12)
        squares = [(z[c, i, 1] - y[i, 1]) ** 2 for i in range(4)]
        assert found[c, 1] == pytest.approx(np.mean(squares), abs=1e-12)
    assert (found[:, 2] == 0).all()


def test_null_labels_give_no_gradient(batch):
    outputs, targets = batch
    outputs.requires_grad_()
    known_losses(outputs, targets, torch.from_numpy(REAL)).sum().backward()
    assert outputs.grad is not None
    null = targets.isnan().expand_as(outputs)
    assert (outputs.grad[null] == 0).all() and (outputs.grad[~null] != 0).all()


def test_the_cosine_is_that_of_pytorch():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 37, eta_min=0)
    for step in range(37):
        assert cosine_factor(step, 37) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_the_warm_up_is_a_line_that_ends_at_one():
    factors = [cosine_factor(step, 30, 4) for step in range(30)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[4:] == [cosine_factor(step, 26) for step in range(26)]
    assert all(a > b for a, b in pairwise(factors[4:]))


def test_each_pass_shows_every_image_once_in_an_order_of_its_own():
    seen = np.concatenate([batch_places(step, 4, 10, seed=5) for step in range(10)])
    passes = seen.reshape(4, 10)
    assert (np.sort(passes, axis=1) == np.arange(10)).all()
    assert len({tuple(one) for one in passes}) == 4
    again = batch_places(7, 4, 10, seed=5)  # without what came before
    assert (again == seen[28:32]).all()
    assert (np.concatenate([batch_places(s, 4, 10, seed=6) for s in range(10)]) != seen).any()


def test_augmentation_depends_on_seed_step_and_place_only():
    def image_of(row, generator):
        return torch.tensor([row, *generator.random(2)])

    rows = np.array([40, 41, 42, 43, 44])
    batches = list(augmented_batches(image_of, rows, 3, 6, seed=9))
    for step, (images, places) in enumerate(batches):
        assert (places == batch_places(step, 3, 5, 9)).all()
        for slot in range(3):
            drawn = generator_at(9, Purpose.AUGMENTATION, step, slot).random(2)
            expected = torch.tensor([rows[places[slot]], *drawn])
            torch.testing.assert_close(images[slot], expected, rtol=0, atol=0)
    assert len({float(image[1]) for images, _ in batches for image in images}) == 18


def test_numbers_come_back_in_their_unit_and_logits_as_probabilities():
    targets = np.array([[1, 30.0, 0], [0, 50.0, 1], [1, np.nan, np.nan]])
    scale = TargetScale.of(targets, REAL)
    standardised = scale.standardised(targets).double().numpy()
    np.testing.assert_allclose(standardised[:2, 1], [-1, 1])
    np.testing.assert_array_equal(standardised[:, ::2], targets[:, ::2])
    outputs = np.array([[800.0, -1.0, -800.0], [0.3, 1.0, -0.3]])
    predictions = scale.predictions(outputs)
    np.testing.assert_allclose(predictions[:, 1], [30, 50])
    np.testing.assert_allclose(predictions[0, ::2], [1, 0])
    np.testing.assert_allclose(predictions[1, ::2], [1 / (1 + np.exp(-0.3)), 1 / (1 + np.exp(0.3))])


def test_the_choice_is_made_for_each_kind_and_never_falls_on_what_diverged():
    nan = np.nan
    scores = np.array([[0.6, 0.5, 0.7], [0.9, nan, 0.5], [nan, 0.4, 0.99]])
    assert choose(scores, REAL) == {"binary": 1, "real": 0}
    assert choose(scores[:, :1], REAL[:1]) == {"binary": 1}
    assert choose(np.full((2, 3), nan), REAL) == {}
    outputs = np.arange(18.0).reshape(3, 2, 3)
    picked = chosen_outputs(outputs, {"binary": 1}, REAL)
    np.testing.assert_array_equal(picked, [[6, nan, 8], [9, nan, 11]])


def test_a_column_that_is_not_finite_has_no_score_and_spoils_no_other():
    targets = np.array([[0, 1.0, 1], [1, 2.0, 0], [1, 3.0, 1]])
    outputs = np.array([[0.1, np.inf, 2], [0.2, 2.0, 1], [0.3, 3.0, 3]])
    np.testing.assert_array_equal(validation_scores(targets, outputs, REAL), [1, np.nan, 1])
