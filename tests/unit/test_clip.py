"""Contrastive losses against a second derivation, over ranks, and over parts of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_expit, logsumexp, softmax
from torch import Tensor, nn
from two_ranks import RANKS, on_ranks

from selfray import distributed
from selfray.models.text_encoder import Tokens, small_text_encoder, train_tokenizer
from selfray.models.vit import Shape, VisionTransformer
from selfray.objectives.clip import clip_loss, pairs_found, siglip_loss, similarities
from selfray.objectives.image_text import ImageText, Logits, Part

PAIRS, WIDTH, SCALE, BIAS = 6, 5, 7.0, -1.5


def _features() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.normal(size=(PAIRS, WIDTH))
    return images, images + generator.normal(size=(PAIRS, WIDTH))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _before_unit(x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """The gradient at x of what has this gradient at x / |x|."""
    unit, length = _unit(x), np.linalg.norm(x, axis=1, keepdims=True)
    return (gradient - unit * (unit * gradient).sum(1, keepdims=True)) / length


def _numpy_clip(
    images: np.ndarray, texts: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, float, float]:
    """Loss, and its gradients at images, texts, scale and bias, by hand."""
    similar = _unit(images) @ _unit(texts).T
    logits = SCALE * similar
    own = np.diag(logits)
    loss = ((logsumexp(logits, 1) - own) + (logsumexp(logits, 0) - own)).mean() / 2
    at_logits = (softmax(logits, 1) + softmax(logits, 0) - 2 * np.eye(PAIRS)) / (2 * PAIRS)
    return (loss, *_chain(images, texts, similar, at_logits), 0.0)


def _numpy_siglip(
    images: np.ndarray, texts: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray, float, float]:
    similar = _unit(images) @ _unit(texts).T
    signs = 2 * np.eye(PAIRS) - 1
    logits = SCALE * similar + BIAS
    loss = -log_expit(signs * logits).sum() / PAIRS
    at_logits = -signs * expit(-signs * logits) / PAIRS
    return (loss, *_chain(images, texts, similar, at_logits), at_logits.sum())


def _chain(
    images: np.ndarray, texts: np.ndarray, similar: np.ndarray, at_logits: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    return (
        _before_unit(images, SCALE * at_logits @ _unit(texts)),
        _before_unit(texts, SCALE * at_logits.T @ _unit(images)),
        (at_logits * similar).sum(),
    )


def _ours(name: str, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    found = similarities(images, texts)
    return clip_loss(found, scale) if name == "clip" else siglip_loss(found, scale, bias)


def _parameters() -> list[Tensor]:
    values = [*map(torch.tensor, _features()), torch.tensor(SCALE), torch.tensor(BIAS)]
    return [value.double().requires_grad_() for value in values]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_loss_and_its_gradients_are_those_of_a_derivation_in_float64(name: str) -> None:
    loss, *gradients = {"clip": _numpy_clip, "siglip": _numpy_siglip}[name](*_features())
    parameters = _parameters()
    ours = _ours(name, *parameters)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(loss, rel=1e-12)
    for parameter, expected in zip(parameters, gradients, strict=True):
        found = 0.0 if parameter.grad is None else parameter.grad.numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_two_ranks_give_loss_and_gradients_of_one(name: str) -> None:
    """Through a projection, whose gradient is averaged as in a run."""
    images, texts, scale, bias = _parameters()
    start = torch.eye(WIDTH, dtype=torch.float64) + 0.1

    def step(here: slice) -> tuple[Tensor, list[Tensor]]:
        trained = [start.clone(), start.T.clone(), scale.detach().clone(), bias.detach().clone()]
        parameters = [nn.Parameter(value) for value in trained]
        loss = _ours(
            name, images.detach()[here] @ parameters[0], texts.detach()[here] @ parameters[1],
            parameters[2], parameters[3],
        )  # fmt: skip
        loss.backward()
        distributed.average_gradients(parameters)
        gradients = [p.grad for p in parameters if p.grad is not None]
        return distributed.mean_over_ranks(loss.detach()), gradients

    loss, gradients = step(slice(None))
    assert len(gradients) == (3 if name == "clip" else 4)

    def of_rank(rank: int) -> None:
        distributed.start()
        each = PAIRS // RANKS
        own_loss, own = step(slice(rank * each, (rank + 1) * each))
        torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0)
        assert len(own) == len(gradients)
        for mine, whole in zip(own, gradients, strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-6, atol=1e-12)

    on_ranks(of_rank)


def test_the_share_of_pairs_found_counts_images_whose_text_is_nearest() -> None:
    images = torch.eye(4)
    assert float(pairs_found(similarities(images, images))) == 1.0
    assert float(pairs_found(similarities(images, images[[1, 0, 2, 3]]))) == 0.5


def test_nothing_told_apart_costs_the_logarithm_of_the_batch() -> None:
    found = similarities(torch.ones(8, 3), torch.ones(8, 3))
    assert float(clip_loss(found, torch.tensor(100.0))) == pytest.approx(np.log(8), rel=1e-5)


def test_the_factor_is_held_below_the_largest_and_can_fall_again() -> None:
    logits = Logits(99.0, 100.0, None)
    with torch.no_grad():
        logits.log_scale += 1
    logits.hold()
    assert float(logits.scale) == pytest.approx(100.0)
    logits.scale.backward()
    assert logits.log_scale.grad is not None
    assert float(logits.log_scale.grad) > 0


def _networks(loss: Any, drop_path: float) -> ImageText:
    torch.manual_seed(0)
    encoder = VisionTransformer(Shape(24, 2, 2), patch_size=14, image_size=28, drop_path=drop_path)
    tokenizer = train_tokenizer(["a small effusion", "no effusion"], 300)
    text = small_text_encoder(tokenizer, width=16, depth=1, heads=2, max_tokens=8, seed=0)
    return ImageText(
        encoder, text, mean=0.5, std=0.25, embedding=8, loss=loss, scale=10.0, scale_largest=100.0,
        bias=-2.0,
    ).train()  # fmt: skip


def _pairs(count: int) -> tuple[Tensor, Tokens]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
    ids = torch.randint(3, 260, (count, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    return images, Tokens(ids, mask)


def _gradients(networks: ImageText) -> dict[str, Tensor]:
    return {n: p.grad for n, p in networks.named_parameters() if p.grad is not None}


def _assert_same_gradients(one: ImageText, other: ImageText) -> None:
    ours, theirs = _gradients(one), _gradients(other)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        # float32 sums in another order, some hundreds of terms of 6e-8 each.
        scale = max(float(tensor.abs().max()), 1e-6)
        assert float((ours[name] - tensor).abs().max()) <= 1e-4 * scale, name


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(loss: str) -> None:
    images, texts = _pairs(6)
    whole, parted = _networks(loss, 0.0), _networks(loss, 0.0)
    told = whole.step([Part(images, texts, 3)])
    cuts = [slice(0, 2), slice(2, 4), slice(4, 6)]
    told_parted = parted.step([Part(images[c], texts.part(c), 3) for c in cuts])
    assert float(told_parted["loss"]) == pytest.approx(float(told["loss"]), rel=1e-6)
    _assert_same_gradients(parted, whole)


def test_the_second_pass_over_a_part_skips_the_same_branches_as_the_first() -> None:
    images, texts = _pairs(6)
    parts = [Part(images[c], texts.part(c), 10 + i) for i, c in enumerate([slice(3), slice(3, 6)])]
    ours, theirs = _networks("clip", 0.5), _networks("clip", 0.5)
    ours.step(parts)
    features = [theirs._features(part) for part in parts]
    at_once = (torch.cat([f[index] for f in features]) for index in (1, 2))
    theirs._loss(*at_once)[0].backward()
    _assert_same_gradients(ours, theirs)


def test_a_text_does_not_depend_on_the_padding_that_a_longer_one_brings() -> None:
    text = _networks("clip", 0.0).text_encoder.eval()
    alone = text(text.tokens(["no effusion"]))
    together = text(text.tokens(["no effusion", "a small effusion small small"]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)
