"""The process group of a run; on one process everything here does nothing.

Started by `torchrun`, each process holds a slice of every global batch. Sums over ranks that a
gradient passes through are differentiable, so that N ranks compute the gradient of one.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from torch import Tensor, nn

from selfray.errors import InputError


def start() -> torch.device:
    """Join the process group that `torchrun` describes, if there is one.

    Returns:
        The device of this rank.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(stop)
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def stop() -> None:
    """Leave the process group; called when the process ends."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 to world size - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def slice_of_batch(batch_size: int) -> slice:
    """The slots of the global batch that are this rank's.

    Raises:
        InputError: The batch cannot be shared out evenly.
    """
    ranks = world_size()
    if batch_size % ranks:
        raise InputError(
            f"batch_size {batch_size} cannot be shared out over {ranks} ranks. "
            f"Use a multiple of {ranks}."
        )
    each = batch_size // ranks
    return slice(rank() * each, (rank() + 1) * each)


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over ranks; gradients pass."""
    return differentiable.all_reduce(value) if world_size() > 1 else value


def gather_over_ranks(value: Tensor) -> Tensor:
    """Concatenation [ranks · B, ...] of a tensor [B, ...] over ranks; gradients pass."""
    if world_size() == 1:
        return value
    # A sum with zeros elsewhere: torch deprecates its gather that gradients pass.
    others = [torch.zeros_like(value) for _ in range(world_size())]
    return sum_over_ranks(torch.cat([*others[: rank()], value, *others[rank() + 1 :]]))


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when it is true on one."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over ranks, without gradients."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / world_size()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its mean over ranks, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
