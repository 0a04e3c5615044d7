"""Schedules: a value for each step, as a function of the step."""

from __future__ import annotations

import math


def cosine(step: int, steps: int, first: float, last: float, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0 to `first`, then a half cosine from `first` to `last`.

    Args:
        step: 0 to steps - 1; later steps give `last`.
        steps: Length of the schedule.
        first: Value after the warm-up.
        last: Value that the cosine tends to at `steps`.
        warmup_steps: Length of the warm-up; step 0 then gives 0.

    Reference:
        DINOv2's `CosineScheduler`, including that the warm-up begins at 0 and ends at `first`
        on its last step.
    """
    if step < warmup_steps:
        return first * step / max(1, warmup_steps - 1)
    if step >= steps:
        return last
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * progress))


def linear(step: int, steps: int, first: float, last: float) -> float:
    """A straight line from `first` at step 0 to `last` at step `steps` - 1, constant after.

    Args:
        step: >= 0.
        steps: Length of the line; 0 or 1 give `last` at once.
        first: Value at step 0.
        last: Value at the end.
    """
    if step >= steps - 1:
        return last
    return first + (last - first) * step / (steps - 1)
