"""Where half precision pays, and where it must not go."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """float32 of half-precision values; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies matrices in bfloat16 by itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()


def computes_in_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether matrix products are in bfloat16.

    Args:
        precision: `bfloat16`, `float32`, or `auto` for bfloat16 where the hardware has it.
        device: Where they are computed.
    """
    return has_fast_bfloat16(device) if precision == "auto" else precision == "bfloat16"
