"""AdamW with layer-wise learning rates, and gradient clipping by submodule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from selfray.models.layer_decay import layer_wise_rate

_TEXT = "text_encoder."


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: not on biases, norms, LayerScale, scalars.

    Names in text encoders are others'; there, biases and norms are what is a vector.
    """
    if parameter.ndim == 0 or (name.startswith(_TEXT) and parameter.ndim < 2):
        return False
    return not (name.endswith((".bias", ".gamma")) or ".norm" in name)


def build_optimizer(
    student: nn.Module,
    *,
    depth: int,
    layer_decay: float,
    patch_embed_factor: float,
    betas: tuple[float, float],
    text_factor: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW with one parameter group for each (learning-rate factor, decay, kind).

    Args:
        student: Holds `encoder` and heads; frozen parameters are left out.
        depth: Number of blocks of the encoder.
        layer_decay: See `layer_wise_rate`.
        patch_embed_factor: See `layer_wise_rate`.
        betas: Of AdamW.
        text_factor: Learning-rate factor of a text encoder.
    """
    groups: defaultdict[tuple[float, bool, str], list[Tensor]] = defaultdict(list)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            rate = layer_wise_rate(name, depth, layer_decay, patch_embed_factor)
            rate *= text_factor if name.startswith(_TEXT) else 1.0
            groups[rate, decays(name, parameter), _kind(name)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "rate": rate, "decays": decay, "kind": kind}
            for (rate, decay, kind), parameters in groups.items()
        ],
        lr=0.0,
        betas=betas,
        fused=True,
    )


def set_rates(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    weight_decay: float,
    frozen: Iterable[str] = (),
) -> None:
    """Set this step's learning rate and weight decay.

    Args:
        optimizer: From `build_optimizer`.
        learning_rate: Before layer-wise factors.
        weight_decay: Where it applies.
        frozen: Kinds that do not move in this step: `encoder`, `prototypes`.
    """
    frozen = set(frozen)
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["kind"] in frozen else learning_rate * group["rate"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0


def clip_gradients(student: nn.Module, largest: float) -> Tensor:
    """Clip the gradient norm of each submodule (encoder, heads) on its own.

    Args:
        student: Holds `encoder` and heads.
        largest: Largest norm of a submodule's gradient.

    Returns:
        Norm of the encoder's gradient before clipping, scalar.
    """
    norms: dict[str, Tensor] = {}
    for name, child in student.named_children():
        norms[name] = nn.utils.clip_grad_norm_(child.parameters(), largest)
    return norms["encoder"]


def optimizer_tensors(optimizer: torch.optim.Optimizer, student: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state by parameter name, e.g. `encoder.norm.weight.exp_avg`."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, student: nn.Module, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` took out."""
    parameters = dict(student.named_parameters())
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for name, tensor in tensors.items():
        parameter_name, key = name.rsplit(".", 1)
        parameter = parameters[parameter_name]
        # The step count too: the fused optimizer keeps it beside the parameter.
        state[parameter][key] = tensor.to(parameter.device)
    optimizer.state = state


def _kind(name: str) -> str:
    if ".last_layer." in name:
        return "prototypes"
    return "encoder" if name.startswith("encoder.") else "head"
