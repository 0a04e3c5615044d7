"""AdamW, layer-wise rates and clipping, against formulas in NumPy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from selfray.models.heads import DinoHead
from selfray.models.layer_decay import layer_wise_rate
from selfray.models.vit import build_vit
from selfray.objectives.optimizer import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_rates,
)

DEPTH, DECAY, PATCH = 6, 0.9, 0.2


@pytest.fixture
def student() -> nn.ModuleDict:
    torch.manual_seed(0)
    encoder = build_vit("vit_nano", patch_size=14, image_size=28, registers=2)
    head = DinoHead(192, prototypes=16, hidden=32, bottleneck=8, layers=3, batch_norm=False)
    return nn.ModuleDict({"encoder": encoder, "dino_head": head})


def _optimizer(student: nn.Module) -> torch.optim.AdamW:
    return build_optimizer(
        student, depth=DEPTH, layer_decay=DECAY, patch_embed_factor=PATCH, betas=(0.9, 0.99)
    )


def _expected_rates() -> dict[str, float]:
    """By prefix, from the top down: each block one factor below the one above it."""
    rates, rate = {"dino_head": 1.0, "encoder.norm": 1.0}, 1.0
    for block in reversed(range(DEPTH)):
        rate *= DECAY
        rates[f"encoder.blocks.{block}."] = rate
    rate *= DECAY
    for name in ("cls_token", "mask_token", "pos_embed", "register_tokens"):
        rates[f"encoder.{name}"] = rate
    return rates | {"encoder.patch_embed": rate * PATCH}


def test_every_parameter_learns_at_the_rate_of_its_layer(student: nn.ModuleDict) -> None:
    expected = _expected_rates()
    for name, _ in student.named_parameters():
        (rate,) = [rate for prefix, rate in expected.items() if name.startswith(prefix)]
        assert layer_wise_rate(name, DEPTH, DECAY, PATCH) == pytest.approx(rate, rel=1e-12), name


def test_one_group_holds_each_parameter_with_its_rate_and_decay(student: nn.ModuleDict) -> None:
    optimizer = _optimizer(student)
    set_rates(optimizer, 0.5, 0.3)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    expected = _expected_rates()
    for name, parameter in student.named_parameters():
        if name.endswith("weight_g"):
            assert id(parameter) not in found
            continue
        group = found[id(parameter)]
        (rate,) = [rate for prefix, rate in expected.items() if name.startswith(prefix)]
        assert group["lr"] == pytest.approx(0.5 * rate), name
        # Matrices, tokens and position embeddings decay; vectors (biases, norms, LayerScale) not.
        assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0), name


@pytest.mark.parametrize("frozen", ["encoder", "prototypes"])
def test_what_is_frozen_does_not_move_by_a_bit(student: nn.ModuleDict, frozen: str) -> None:
    optimizer = _optimizer(student)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    for _ in range(3):
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        set_rates(optimizer, 1e-2, 0.4, (frozen,))
        optimizer.step()
    for name, parameter in student.named_parameters():
        inside = name.startswith("encoder.") if frozen == "encoder" else ".last_layer." in name
        assert torch.equal(parameter, before[name]) == (inside or name.endswith("weight_g")), name


def test_steps_are_those_of_adamw() -> None:
    torch.manual_seed(0)
    student = nn.ModuleDict({"encoder": nn.Linear(3, 2).double(), "dino_head": nn.Identity()})
    optimizer = _optimizer(student)
    generator = np.random.default_rng(0)
    w = student["encoder"].weight.detach().numpy().copy()
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, 6):
        gradient, rate, decay = generator.standard_normal((2, 3)), 0.01 * t, 0.1 * t
        student["encoder"].weight.grad = torch.from_numpy(gradient)
        set_rates(optimizer, rate, decay)
        optimizer.step()
        # Loshchilov and Hutter, ICLR 2019, algorithm 2; `encoder.weight` counts as layer 0.
        rate *= DECAY ** (DEPTH + 1)
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        w = w - rate * decay * w
        w = w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
    np.testing.assert_allclose(student["encoder"].weight.detach(), w, rtol=1e-10)


def test_each_submodule_is_clipped_on_its_own(student: nn.ModuleDict) -> None:
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            size = 1.0 if name.startswith("encoder.") else 1e-5
            parameter.grad = size * torch.randn_like(parameter)
    before = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    flat = np.concatenate([g.flatten() for n, g in before.items() if n.startswith("encoder.")])
    length = np.linalg.norm(flat.astype(np.float64))
    assert float(clip_gradients(student, 3.0)) == pytest.approx(length, rel=1e-5)
    for name, parameter in student.named_parameters():
        if parameter.grad is not None:
            factor = 3.0 / length if name.startswith("encoder.") else 1.0
            np.testing.assert_allclose(parameter.grad, factor * before[name], rtol=1e-4, atol=1e-12)


def test_an_optimizer_put_back_goes_on_as_if_never_stopped(student: nn.ModuleDict) -> None:
    def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in student.parameters():
            parameter.grad = torch.randn_like(parameter)
        set_rates(optimizer, 1e-2, 0.1)
        optimizer.step()

    first = _optimizer(student)
    step(first, 0)
    saved = {name: t.clone() for name, t in optimizer_tensors(first, student).items()}
    weights = {name: t.clone() for name, t in student.state_dict().items()}
    step(first, 1)
    expected = {name: t.clone() for name, t in student.state_dict().items()}
    student.load_state_dict(weights)
    second = _optimizer(student)
    load_optimizer_tensors(second, student, saved)
    step(second, 1)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
