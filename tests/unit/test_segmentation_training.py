"""The loss in NumPy, geometry by ramps, and a training whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from selfray.evals import segmentation_training as training
from selfray.evals.segmentation_training import (
    LabelledInputs,
    SegmentationDecoder,
    logits_at,
    segmentation_loss,
    share_pixels,
    train_decoder,
    validation_dice,
)
from selfray.models.preprocessing import Preprocessing

GRID, WIDTH, SIDE = (8, 8), 6, 128


def planted(images: int, *, seed: int) -> LabelledInputs:
    """Two labels that never meet; which patch has one is written in its token."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 3, (images, *GRID))  # 0 is background
    tokens = rng.normal(size=(images, *GRID, WIDTH)) * 0.1 + 3
    for label in (1, 2):
        tokens[..., label] += 5 * (patches == label)
    tokens[..., 0] = 7  # a channel that never changes
    bits = np.array([0, 1, 2], np.uint16)[patches].repeat(16, axis=1).repeat(16, axis=2)
    kept = torch.from_numpy(tokens.astype(np.float16)[:, None])
    return LabelledInputs(lambda chosen: kept[chosen], bits)


def decoder(*, multi_label: bool = False, seed: int = 0) -> SegmentationDecoder:
    return SegmentationDecoder(
        "linear", WIDTH, GRID, levels=1, labels=2, multi_label=multi_label, seed=seed
    )


def batches(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 24, 8)


def trained(*, multi_label: bool = False, steps: int = 60) -> tuple[SegmentationDecoder, float]:
    model, train = decoder(multi_label=multi_label), planted(24, seed=0)
    model.scale_by([train.inputs(np.arange(24))])
    best = train_decoder(model, train, planted(8, seed=1), batches, steps, lambda: None)
    return model, best[1]


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


@pytest.mark.parametrize("multi_label", [True, False])
def test_the_loss_is_dice_plus_cross_entropy_written_out(multi_label):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 2 if multi_label else 3, 4, 5)) * 2
    coverage = rng.random((3, 2, 4, 5)) / 2
    if multi_label:
        shares = sigmoid(logits)
        entropy = -(coverage * np.log(shares) + (1 - coverage) * np.log(1 - shares)).mean()
    else:
        exponents = np.exp(logits)
        every = exponents / exponents.sum(axis=1, keepdims=True)
        target = np.concatenate([1 - coverage.sum(axis=1, keepdims=True), coverage], axis=1)
        entropy = -(target * np.log(every)).sum(axis=1).mean()
        shares = every[:, 1:]
    dice = [
        (2 * (s * c).sum() + 1) / (s.sum() + c.sum() + 1)
        for s, c in zip(shares.swapaxes(0, 1), coverage.swapaxes(0, 1), strict=True)
    ]
    found = segmentation_loss(
        torch.from_numpy(logits), torch.from_numpy(coverage), multi_label=multi_label
    )
    assert found.item() == pytest.approx(entropy + 1 - np.mean(dice), rel=1e-9)


def test_a_label_that_a_batch_lacks_gives_a_finite_gradient():
    logits = torch.full((2, 1, 4, 4), -200.0, requires_grad=True)
    segmentation_loss(logits, torch.zeros(2, 1, 4, 4), multi_label=True).backward()
    assert logits.grad is not None and logits.grad.isfinite().all()


@pytest.mark.parametrize("multi_label", [True, False])
def test_what_tokens_tell_is_learned(multi_label):
    model, dice = trained(multi_label=multi_label)
    # Not 1, as bilinear logits round the corners of single patches; chance is about a half.
    assert dice > 0.9
    assert validation_dice(decoder(multi_label=multi_label), planted(8, seed=1)) < 0.6
    masks = model.masks(model(planted(8, seed=1).inputs(np.arange(8))))
    assert masks.shape == (8, 2, 32, 32)
    assert multi_label or not masks.all(dim=1).any()


def test_training_is_the_same_at_the_same_seed_and_another_at_another():
    first, second = (trained(steps=5)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    weights = [decoder(seed=seed).decoder.logits.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_decoder_leaves_torch_s_own_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    decoder()
    assert torch.equal(torch.rand(1), expected)


def test_the_weights_of_the_best_validation_are_kept(monkeypatch):
    answers = iter([0.3, 0.8, 0.1, 0.5, 0.2])
    seen: list[torch.Tensor] = []

    def validation(model: SegmentationDecoder, data: LabelledInputs) -> float:
        seen.append(model.decoder.logits.weight.detach().clone())
        return next(answers)

    monkeypatch.setattr(training, "validation_dice", validation)
    model, train = decoder(), planted(24, seed=0)
    assert train_decoder(model, train, train, batches, 10, lambda: None) == (4, 0.8)
    assert torch.equal(model.decoder.logits.weight, seen[1])
    assert not torch.equal(seen[1], seen[4])


def test_validation_is_the_mean_over_labels_of_images_that_have_them():
    data = planted(2, seed=3)
    data.label_maps[0] = 1  # label 0 everywhere, label 1 in the other image alone
    data.label_maps[1] = 2
    model = decoder(multi_label=True)
    for weight in model.decoder.parameters():
        torch.nn.init.zeros_(weight)
    cells = model.decoder.logits.bias.numel() // 2
    model.decoder.logits.bias.data[:cells] = 1  # label 0 is found everywhere, label 1 nowhere
    model.decoder.logits.bias.data[cells:] = -1
    assert validation_dice(model, data) == pytest.approx((1 + 0) / 2)


@pytest.mark.parametrize("size", [(128, 128), (400, 400), (64, 64)])
def test_logits_of_a_whole_image_come_back_as_torch_enlarges_them(size):
    logits = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    found, inside = logits_at(logits, (0.0, 0.0, *map(float, size)), size)
    expected = F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert inside.all()


@pytest.mark.parametrize("shape", [(300, 500), (500, 300), (257, 391)])
@pytest.mark.parametrize(
    "preprocessing",
    [
        Preprocessing(64, (0,), (1,), shortest_edge=64),
        Preprocessing(56, (0,), (1,), shortest_edge=64, odd_margin="even"),
        Preprocessing(64, (0,), (1,)),
    ],
)
def test_a_place_in_the_image_comes_back_to_where_it_was(preprocessing, shape):
    """The preprocessing itself carries ramps of gray; brought back, they are the ramps again."""
    box = preprocessing.seen(*shape)
    for axis in (0, 1):
        ramp = np.linspace(0, 255, shape[axis])
        image = np.broadcast_to(ramp[:, None] if axis == 0 else ramp, shape).round()
        square = preprocessing.square(image.astype(np.uint8)).astype(np.float32)
        found, inside = logits_at(torch.from_numpy(square), box, shape)
        assert inside.sum() == pytest.approx((box[2] - box[0]) * (box[3] - box[1]), rel=0.02)
        # Away from the edge, where the ramp ends and filters bend it; 2 gray values are a pixel
        # and a half at most, and half a pixel of the square is five.
        inner = np.zeros(shape, bool)
        inner[20:-20, 20:-20] = True
        inner &= inside.numpy()
        rows, columns = (np.flatnonzero(inner.any(axis=1 - a)) for a in (0, 1))
        core = np.ix_(rows[12:-12], columns[12:-12])
        off = (found[0].numpy() - image)[core]
        assert abs(off.mean()) < 0.5 and np.abs(off).max() < 2


def test_the_square_seen_is_what_pillow_crops():
    image = np.zeros((300, 500), np.uint8)
    top, left, bottom, right = Preprocessing(64, (0,), (1,), shortest_edge=64).seen(*image.shape)
    assert (top, bottom) == (0, 300)
    assert right - left == pytest.approx(64 * 500 / Image.fromarray(image).resize((106, 64)).width)
    assert (left + right) / 2 == pytest.approx(250, abs=0.5 * 500 / 106 + 1e-9)


def test_labels_share_pixels_where_two_bits_are_set():
    maps = np.array([[[0, 1], [2, 4]]], np.uint16)
    assert not share_pixels(maps)
    maps[0, 0, 0] = 0b1010
    assert share_pixels(maps)
