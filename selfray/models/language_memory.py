"""How much memory a language model takes, before its weights are read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn

from selfray.errors import InputError, nearest

# Bytes a token that a block keeps for the backward pass, in widths, at 2 bytes a number, where
# attention weights are not kept; Korthikanti et al., MLSys 2023, equation 1.
_BLOCK_BYTES = 34
_OF_TRAINING = 12  # bytes a trained number: gradient and AdamW's two moments, float32
_LOGITS = 8  # bytes a logit: itself and its gradient, float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training, or a writing, takes at its peak.

    Attributes:
        weights: Of the language model and its adapters.
        optimizer: Gradients and moments of what is trained.
        activations: What is kept for the backward pass or for the next token, and logits.
    """

    weights: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.optimizer + self.activations


@dataclass(frozen=True)
class LanguageUse:
    """What is done with a language model, as far as its memory depends on it.

    Attributes:
        device: Where.
        tokens: Read and written at a time, over all examples.
        dtype: Of the weights.
        bfloat16: Whether activations are kept in bfloat16.
        trained: Of the language model, beside the projector; None: reports are written only.
        lora_rank: Of adapters; 0 without.
        lora_targets: Names of layers with adapters, or `all-linear`.
        activation_checkpointing: Whether a block keeps its input alone.
    """

    device: torch.device
    tokens: int
    dtype: torch.dtype = torch.float32
    bfloat16: bool = False
    trained: Literal["none", "lora", "full"] | None = None
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    activation_checkpointing: bool = False


def plan_memory(network: nn.Module, use: LanguageUse) -> MemoryPlan:
    """Plan the training of a report model, or its writing, which keeps keys and values instead.

    Args:
        network: The language model, on the meta device.
        use: What is done with it.

    Raises:
        InputError: No linear layer has a name that adapters are asked for.
    """
    config = network.config.get_text_config()  # type: ignore[operator,union-attr]
    parameters = sum(parameter.numel() for parameter in network.parameters())
    adapters = use.lora_rank * _adapted_widths(network, use.lora_targets) if use.lora_rank else 0
    weights = parameters * use.dtype.itemsize + adapters * 4
    learned = {"lora": adapters, "full": parameters}.get(use.trained or "none", 0)
    width = use.tokens * (1 if use.bfloat16 else 2)
    blocks, a_block = config.num_hidden_layers, width * config.hidden_size * _BLOCK_BYTES
    if use.trained is None:
        activations = a_block + 2 * blocks * 2 * width * _width_of_keys(config)
    elif use.activation_checkpointing:
        activations = a_block + 2 * width * config.hidden_size * blocks
    else:
        activations = a_block * blocks
    logits = use.tokens * config.vocab_size * _LOGITS
    return MemoryPlan(weights, learned * _OF_TRAINING, activations + logits)


def _width_of_keys(config: Any) -> int:
    """Numbers a token and block that a key has, over all heads; a value has as many."""
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size * (getattr(config, "num_key_value_heads", None) or heads)


def _adapted_widths(network: nn.Module, targets: tuple[str, ...]) -> int:
    """Inputs and outputs of the layers with adapters, summed."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    linear = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's
    }
    if targets == ("all-linear",):
        return _widths(module for module in linear.values() if module is not head)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in linear):
            known = {name.rpartition(".")[2] for name in linear}
            raise InputError(
                f"--report.language.lora-targets has {target!r}, and no linear layer of the "
                f"language model is called so. {nearest(target, known)}"
            )
    ends = tuple(f".{target}" for target in targets)
    return _widths(module for name, module in linear.items() if f".{name}".endswith(ends))


def _widths(layers: Iterable[nn.Module]) -> int:
    return sum(sum(layer.get_parameter("weight").shape) for layer in layers)


def require_memory(
    network: nn.Module, source: Path, use: LanguageUse, weights_read: bool = False
) -> None:
    """Refuse a language model that does not fit.

    Args:
        network: The language model, on the meta device until its weights are read.
        source: Where it is from, for the error.
        use: What is done with it.
        weights_read: Whether weights have taken their memory already.

    Raises:
        InputError: Says what it needs, part by part, and what there is.
    """
    plan, free = plan_memory(network, use), free_memory(use.device)
    plan = replace(plan, weights=0) if weights_read else plan
    if plan.total <= free:
        return
    kept = "keys, values and activations" if use.trained is None else "activations"
    parts = [
        f"{_gb(size)} for {what}"
        for what, size in (
            ("weights", plan.weights),
            ("gradients and the optimizer", plan.optimizer),
            (kept, plan.activations),
        )
        if size
    ]
    remedy = (
        "Write where there is more, or free some."
        if use.trained is None
        else "Take a smaller model, --report.language.trained lora or none, --report.precision "
        "bfloat16, a smaller --report.micro-batch, or --report.activation-checkpointing true."
    )
    raise InputError(
        f"{source} needs about {_gb(plan.total)} of memory ({', '.join(parts)}), and "
        f"{use.device.type} has {_gb(free)} free. {remedy}"
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
