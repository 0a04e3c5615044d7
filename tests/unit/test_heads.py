"""Projection heads, against NumPy, torch's own weight norm and batch norm, and published shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from selfray.config import PretrainConfig
from selfray.models.heads import DinoHead


def _head(*, batch_norm: bool = False, layers: int = 3) -> DinoHead:
    torch.manual_seed(0)
    head = DinoHead(
        12, prototypes=10, hidden=16, bottleneck=6, layers=layers, batch_norm=batch_norm
    )
    for parameter in head.mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head.double()


def _tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((7, 12)))


def _formula(head: DinoHead, x: np.ndarray) -> np.ndarray:
    state = {name: t.numpy() for name, t in head.state_dict().items()}
    linear = sorted({int(name.split(".")[1]) for name in state if name.startswith("mlp.")})
    for index in linear:
        x = x @ state[f"mlp.{index}.weight"].T + state[f"mlp.{index}.bias"]
        if index != linear[-1]:
            if head.batch_norm:
                x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    v = state["last_layer.weight_v"]
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ (state["last_layer.weight_g"] * v / np.linalg.norm(v, axis=1, keepdims=True)).T


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_scores_are_those_of_the_formula(batch_norm: bool, layers: int) -> None:
    head = _head(batch_norm=batch_norm, layers=layers)
    computed = head(_tokens()).detach()
    np.testing.assert_allclose(computed, _formula(head, _tokens().numpy()), rtol=1e-9, atol=1e-12)


def test_scores_are_cosines_with_prototypes() -> None:
    assert _head()(1e3 * _tokens()).abs().max() <= 1 + 1e-12


def test_prototypes_are_those_of_torch_weight_norm() -> None:
    head = _head()
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10, bias=False).double())
    with torch.no_grad():
        theirs.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        theirs.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    x = _tokens()[:, :6]
    torch.testing.assert_close(head.last_layer(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_batch_norm_in_the_head_is_torchs_without_parameters() -> None:
    head = _head(batch_norm=True, layers=2)
    theirs = nn.BatchNorm1d(16, affine=False).double().train()
    hidden = theirs(head.mlp[0](_tokens()))
    x = nn.functional.normalize(head.mlp[2](nn.functional.gelu(hidden)), dim=-1)
    torch.testing.assert_close(head(_tokens()), head.last_layer(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_gradients_are_those_of_the_scores(batch_norm: bool) -> None:
    head = _head(batch_norm=batch_norm)
    parameters = [p for p in head.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda x, *_: head(x), (_tokens().requires_grad_(), *parameters), fast_mode=True
    )


def test_the_lengths_of_prototypes_are_not_trained() -> None:
    head = _head()
    assert not head.last_layer.weight_g.requires_grad
    assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1, dtype=torch.float64))


def test_the_published_recipe_has_the_published_heads_names_and_shapes() -> None:
    config = PretrainConfig()
    with torch.device("meta"):
        head = DinoHead(
            768, prototypes=config.heads.prototypes, hidden=config.heads.hidden,
            bottleneck=config.heads.bottleneck, layers=config.heads.layers,
            batch_norm=config.heads.batch_norm,
        )  # fmt: skip
    # From the released dino_head.safetensors of microsoft/rad-dino.
    assert {name: list(tensor.shape) for name, tensor in head.state_dict().items()} == {
        "mlp.0.weight": [2048, 768], "mlp.0.bias": [2048],
        "mlp.2.weight": [2048, 2048], "mlp.2.bias": [2048],
        "mlp.4.weight": [256, 2048], "mlp.4.bias": [256],
        "last_layer.weight_g": [65_536, 1], "last_layer.weight_v": [65_536, 256],
    }  # fmt: skip
