"""How much memory a language model takes, before its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import nn

from selfray.errors import InputError

# Bytes a token that a block keeps for the backward pass, in widths, at 2 bytes a number, where
# attention weights are not kept; Korthikanti et al., MLSys 2023, equation 1.
_BLOCK_BYTES = 34
_OF_TRAINING = 12  # bytes a trained number: gradient and AdamW's two moments, float32
_LOGITS = 8  # bytes a logit: itself and its gradient, float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training takes at its peak.

    Attributes:
        weights: Of the language model and its adapters.
        optimizer: Gradients and moments of what is trained.
        activations: What is kept for the backward pass, and logits.
    """

    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.activations


def plan_memory(
    network: nn.Module,
    *,
    trained: Literal["none", "lora", "full"],
    lora_rank: int,
    lora_targets: tuple[str, ...],
    dtype: torch.dtype,
    bfloat16: bool,
    tokens: int,
    activation_checkpointing: bool,
) -> MemoryPlan:
    """Plan the training of a report model; generation takes less.

    Args:
        network: The language model, on the meta device.
        trained: Of it, beside the projector.
        lora_rank: Of adapters.
        lora_targets: Names of layers with adapters, or `all-linear`.
        dtype: Of the weights.
        bfloat16: Whether activations are kept in bfloat16.
        tokens: Computed at a time, over all examples.
        activation_checkpointing: Whether a block keeps its input alone.
    """
    config = network.config.get_text_config()  # type: ignore[operator,union-attr]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    adapters = lora_rank * _adapted_widths(network, lora_targets) if trained == "lora" else 0
    weights = parameters * dtype.itemsize + adapters * 4
    learned = {"none": 0, "lora": adapters, "full": parameters}[trained]
    kept = tokens * config.hidden_size * (1 if bfloat16 else 2)
    blocks = config.num_hidden_layers
    a_block = kept * _BLOCK_BYTES
    activations = a_block + 2 * kept * blocks if activation_checkpointing else a_block * blocks
    logits = tokens * config.vocab_size * _LOGITS
    return MemoryPlan(weights, learned * _OF_TRAINING, activations + logits)


def _adapted_widths(network: nn.Module, targets: tuple[str, ...]) -> int:
    """Inputs and outputs of the layers with adapters, summed."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    total = 0
    for name, module in network.named_modules():
        weight = getattr(module, "weight", None)
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's
        named = targets == ("all-linear",) or name.rpartition(".")[2] in targets
        if weight is not None and linear and named and module is not head:
            total += sum(weight.shape)
    return total


def require_memory(plan: MemoryPlan, source: Path, device: torch.device) -> None:
    """Refuse a language model that does not fit.

    Args:
        plan: What it takes.
        source: The language model, for the error.
        device: Where it is to be trained.

    Raises:
        InputError: Says what it needs, part by part, and what there is.
    """
    free = free_memory(device)
    if plan.total <= free:
        return
    parts = [
        f"{_gb(size)} for {what}"
        for what, size in (
            ("weights", plan.weights),
            ("gradients and the optimizer", plan.optimizer),
            ("activations", plan.activations),
        )
        if size
    ]
    raise InputError(
        f"{source} needs about {_gb(plan.total)} of memory ({', '.join(parts)}), and {device.type} "
        f"has {_gb(free)} free. Take a smaller model, --language.trained lora or none, --precision "
        "bfloat16, a smaller --micro-batch, or --activation-checkpointing true."
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
