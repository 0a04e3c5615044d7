"""Attentive pooling against PyTorch's multi-head attention, and tokens that tell their label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trained_probe_data import PlantedImages, assert_a_function_of_the_seed, chance

from selfray.evals import attentive_probe as module
from selfray.evals.attentive_probe import AttentivePools, attentive_probe, default_steps, head_count
from selfray.evals.metrics import auroc_by_column, r2_by_column
from selfray.evals.stepwise import known_losses

CPU = torch.device("cpu")
WIDTH = 128  # two heads


def test_pooling_is_multi_head_attention_with_the_same_weights():
    torch.manual_seed(0)
    pools = AttentivePools(WIDTH, 5, candidates=3, seed=2).double().eval()
    assert pools.heads == 2
    for parameter in pools.parameters():  # candidates differ, and nothing is small
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    pools.norm.running_mean.normal_()
    pools.norm.running_var.uniform_(0.5, 2)
    tokens = torch.randn(4, 7, WIDTH, dtype=torch.float64)
    found = pools(tokens)
    assert found.shape == (3, 4, 5)
    normalised = (tokens - pools.norm.running_mean) / (pools.norm.running_var + 1e-6).sqrt()
    for candidate, part in enumerate(pools.parts):
        theirs = torch.nn.MultiheadAttention(WIDTH, 2, bias=False, batch_first=True).double()
        with torch.no_grad():
            theirs.in_proj_weight.copy_(torch.cat([torch.eye(WIDTH), part.key, part.value]))
            theirs.out_proj.weight.copy_(torch.eye(WIDTH))
            pooled, _ = theirs(part.query.expand(4, 1, -1), normalised, normalised)
        expected = torch.nn.functional.linear(pooled[:, 0], part.weight, part.bias)
        torch.testing.assert_close(found[candidate], expected, rtol=0, atol=1e-10)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_heads_divide_the_width():
    assert [head_count(width) for width in (768, 1024, 1536, 128, 100, 24)] == [12, 16, 24, 2, 1, 1]


def test_a_target_without_labels_moves_nothing():
    pools = AttentivePools(WIDTH, 2, candidates=2, seed=0)
    tokens = torch.randn(6, 5, WIDTH)
    targets = torch.tensor([[torch.nan, 1.0]] * 5 + [[torch.nan, torch.nan]])
    known_losses(pools(tokens), targets, torch.tensor([False, False])).sum().backward()
    for part in pools.parts:
        assert (part.weight.grad[0] == 0).all() and (part.bias.grad[0] == 0).all()
        assert (part.weight.grad[1] != 0).any() and (part.query.grad != 0).any()


@pytest.fixture(scope="module")
def tokens() -> tuple[PlantedImages, np.ndarray, np.ndarray]:
    """Patch tokens of noise; in one of sixteen, anywhere, a pattern of the label's sign.

    The mean of the tokens has it too, sixteen times as weak as in its place and a quarter of the
    noise's spread; CLS has nothing.
    """
    images = PlantedImages()
    generator = np.random.default_rng(5)
    count, width = len(images.targets), 24
    patches = generator.normal(size=(count, 4, 4, width))
    places = generator.integers(0, 4, (count, 2))
    sign = 2 * images.targets[:, 0] - 1
    pattern = np.where(np.arange(width) < width // 2, 1.0, -1.0)
    patches[np.arange(count), places[:, 0], places[:, 1]] += 4 * sign[:, None] * pattern
    return images, generator.normal(size=(count, width)), patches.astype(np.float16)


def test_finds_what_is_there_and_nothing_in_noise(tokens, monkeypatch):
    monkeypatch.setattr(module, "BATCH_SIZE", 32)
    images, cls, patches = tokens
    found = attentive_probe(cls, patches, images.splits, steps=150, seed=0, device=CPU)
    known = images.known
    auroc = auroc_by_column(known[:, :2], found.predictions[:, :2])
    assert auroc[0] == 1
    assert abs(auroc[1] - 0.5) < 4 * chance(known[:, 1])
    assert r2_by_column(known[:, 2:], found.predictions[:, 2:])[0] > 0.8


def test_numbers_are_a_function_of_the_seed(tokens):
    images, cls, patches = tokens
    assert_a_function_of_the_seed(
        lambda seed: attentive_probe(cls, patches, images.splits, steps=4, seed=seed, device=CPU)
    )


def test_each_learning_rate_is_trained_as_if_alone(tokens, monkeypatch):
    images, cls, patches = tokens
    splits = images.only(0)  # one kind of target, so that one candidate is chosen
    together = attentive_probe(cls, patches, splits, steps=30, seed=0, device=CPU)
    chosen = together.settings["chosen"]["binary"]["learning_rate"]
    monkeypatch.setattr(module, "LEARNING_RATES", (chosen,))
    alone = attentive_probe(cls, patches, splits, steps=30, seed=0, device=CPU)
    np.testing.assert_allclose(alone.predictions, together.predictions, atol=1e-4)


def test_steps_are_twenty_passes_or_a_thousand():
    assert default_steps(500) == 1000
    assert default_steps(128_000) == 20_000
