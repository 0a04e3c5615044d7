"""Where half precision must not go."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """float32 of half-precision values; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
