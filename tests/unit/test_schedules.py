"""Schedules, against arrays built as DINOv2's `CosineScheduler` builds them."""

from __future__ import annotations

import numpy as np
import pytest
from micro_run import micro_config

from selfray.objectives.schedules import cosine, linear
from selfray.pretrain import scheduled


def _array(base: float, final: float, total: int, warmup: int) -> np.ndarray:
    rise = np.linspace(0.0, base, warmup)
    iters = np.arange(total - warmup)
    fall = final + 0.5 * (base - final) * (1 + np.cos(np.pi * iters / len(iters)))
    return np.concatenate([rise, fall])


@pytest.mark.parametrize("warmup", [0, 1, 2, 7, 40])
def test_the_cosine_is_dinov2s_at_every_step(warmup: int) -> None:
    computed = [cosine(step, 40, 1e-3, 1e-6, warmup) for step in range(40)]
    np.testing.assert_allclose(computed, _array(1e-3, 1e-6, 40, warmup), rtol=1e-12)


def test_after_its_end_the_cosine_stays() -> None:
    assert cosine(40, 40, 0.992, 1.0) == cosine(99, 40, 0.992, 1.0) == 1.0


@pytest.mark.parametrize("steps", [2, 3, 30])
def test_the_line_goes_from_first_to_last_and_stays(steps: int) -> None:
    expected = np.concatenate([np.linspace(0.04, 0.07, steps), np.full(10, 0.07)])
    computed = [linear(step, steps, 0.04, 0.07) for step in range(steps + 10)]
    np.testing.assert_allclose(computed, expected, rtol=1e-12)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_line_without_length_is_its_end(steps: int) -> None:
    assert linear(0, steps, 0.04, 0.07) == 0.07


def test_a_run_follows_its_schedules_at_every_step() -> None:
    config = micro_config(
        steps=200,
        batch_size=256,
        optimizer__learning_rate=2e-3,
        optimizer__warmup=0.05,
        optimizer__weight_decay=(0.04, 0.4),
        optimizer__freeze_last_layer=0.01,
        teacher__momentum=(0.992, 1.0),
        loss__teacher_temperature=(0.04, 0.07),
        loss__teacher_temperature_warmup=0.5,
    )
    values = [scheduled(config, step, frozen_steps=0) for step in range(200)]
    # sqrt(256 / 1024) = 1/2
    np.testing.assert_allclose([v.learning_rate for v in values], _array(1e-3, 1e-6, 200, 10))
    np.testing.assert_allclose([v.weight_decay for v in values], _array(0.04, 0.4, 200, 0))
    np.testing.assert_allclose([v.teacher_momentum for v in values], _array(0.992, 1, 200, 0))
    temperatures = np.concatenate([np.linspace(0.04, 0.07, 100), np.full(100, 0.07)])
    np.testing.assert_allclose([v.teacher_temperature for v in values], temperatures)
    assert [v.frozen for v in values] == [("prototypes",)] * 2 + [()] * 198


def test_while_a_fresh_head_warms_up_only_the_encoder_is_frozen() -> None:
    config = micro_config(steps=200, optimizer__freeze_last_layer=0.01)
    frozen = [scheduled(config, step, frozen_steps=5).frozen for step in range(7)]
    assert frozen == [("encoder",)] * 5 + [()] * 2
