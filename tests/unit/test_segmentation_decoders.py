"""Decoders against the formulas of their sources, and against transformers' own pyramid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from selfray.errors import InputError
from selfray.evals.segmentation_decoders import (
    DECODERS,
    ChannelNorm,
    FeaturePyramid,
    LinearDecoder,
    blocks_read,
    build_decoder,
)

WIDTH, CLASSES = 16, 3


def tokens(batch: int = 2, grid: tuple[int, int] = (8, 8), seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, WIDTH, *grid, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("grid", "fine"), [((8, 8), (32, 32)), ((7, 7), (28, 28))])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_four_to_a_patch_and_every_weight_learns(name, grid, fine):
    if name == "upernet":
        pytest.importorskip("transformers")
    levels = 4 if name == "linear-four-blocks" else 1
    decoder = build_decoder(name, WIDTH, CLASSES, grid, levels)
    logits = decoder([tokens(grid=grid)] * levels)
    seven = name.startswith("linear") and grid == (7, 7)
    expected = (35, 35) if seven else fine  # 5 x 7 are 32 at least
    assert logits.shape == (2, CLASSES, *expected)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in decoder.parameters())


def test_linear_logits_are_each_token_times_a_matrix_cell_by_cell():
    decoder = LinearDecoder(WIDTH, CLASSES, (8, 8))
    found = decoder([tokens()]).detach().numpy()
    weight = decoder.logits.weight.detach().double().numpy()[:, :, 0, 0]
    bias = decoder.logits.bias.detach().double().numpy()
    cells = 4
    expected = np.empty((2, CLASSES, 32, 32))
    for y in range(32):
        for x in range(32):
            cell = (y % cells) * cells + x % cells
            maps = np.arange(CLASSES) * cells**2 + cell
            token = tokens()[:, :, y // cells, x // cells].double().numpy()
            expected[:, :, y, x] = token @ weight[maps].T + bias[maps]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_linear_logit_depends_on_its_own_token_alone():
    decoder = LinearDecoder(WIDTH, CLASSES, (8, 8))
    changed = tokens()
    changed[:, :, 3, 5] += 1
    moved = (decoder([changed]) != decoder([tokens()])).any(dim=1)[0]
    assert moved[12:16, 20:24].all()
    assert moved.sum() == 16


def test_a_grid_as_fine_as_the_paper_s_has_one_logit_a_patch():
    decoder = LinearDecoder(WIDTH, CLASSES, (37, 37))
    assert decoder([tokens(grid=(37, 37))]).shape == (2, CLASSES, 37, 37)


def test_the_pyramid_scales_as_that_of_sam_3_in_transformers():
    module = pytest.importorskip("transformers.models.sam3.modeling_sam3")
    pyramid = FeaturePyramid(WIDTH)
    pyramid.scales[0][1] = nn.Identity()  # SAM 3 leaves the normalisation out
    for scale, ours in zip((4.0, 2.0, 1.0, 0.5), pyramid.scales, strict=True):
        theirs = nn.Sequential(*module.Sam3FPNLayer(WIDTH, WIDTH, scale).scale_layers)
        names = dict(zip(theirs.state_dict(), ours.state_dict(), strict=True))
        ours.load_state_dict({names[k]: v for k, v in theirs.state_dict().items()})
        theirs.eval()
        level = tokens(grid=(6, 6))
        torch.testing.assert_close(ours(level), theirs(level))


def test_the_channels_of_each_place_are_normalised():
    values = tokens(grid=(3, 5))
    found = ChannelNorm(WIDTH, eps=1e-6)(values).detach().numpy()
    centred = values.double().numpy() - values.double().numpy().mean(axis=1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["vitdet", "upernet"])
def test_of_four_levels_the_first_makes_the_finest_map(name):
    if name == "upernet":
        pytest.importorskip("transformers")
    decoder = build_decoder(name, WIDTH, CLASSES, (8, 8)).eval()
    levels = [tokens(seed=k) for k in range(4)]
    maps = decoder.pyramid(levels)
    assert [m.shape[-1] for m in maps] == [32, 16, 8, 4]
    for k, level in enumerate(levels):
        torch.testing.assert_close(maps[k], decoder.pyramid.scales[k](level))
    assert not torch.equal(decoder(levels), decoder([levels[-1]]))
    torch.testing.assert_close(decoder([levels[-1]] * 4), decoder([levels[-1]]))


def test_an_unknown_decoder_is_named_with_the_allowed_ones():
    with pytest.raises(InputError, match=r"'vitdt' is unknown. Did you mean 'vitdet'\? Allowed:"):
        build_decoder("vitdt", WIDTH, CLASSES, (8, 8))


def test_linear_on_four_blocks_is_the_sum_of_a_linear_function_of_each():
    decoder = build_decoder("linear-four-blocks", WIDTH, CLASSES, (8, 8), 4)
    levels = [tokens(seed=k) for k in range(4)]
    nothing = [torch.zeros_like(level) for level in levels]
    parts = torch.zeros(2, CLASSES, 32, 32)
    for k, level in enumerate(levels):
        parts += decoder([*nothing[:k], level, *nothing[k + 1 :]]) - decoder(nothing)
    torch.testing.assert_close(decoder(levels), parts + decoder(nothing), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "depth", "blocks"),
    [
        ("linear", 12, (11,)),
        ("vitdet-fine-tuned", 12, (11,)),
        ("upernet", 12, (2, 5, 8, 11)),  # `out_indices` of MMSegmentation's ViT-B with UPerNet
        ("upernet-fine-tuned", 24, (5, 11, 17, 23)),
        ("linear-four-blocks", 6, (0, 2, 3, 5)),
        ("upernet", 4, (0, 1, 2, 3)),
        ("upernet", 3, (2,)),
        ("upernet", 1, (0,)),
    ],
)
def test_blocks_are_the_last_or_four_evenly_spaced(name, depth, blocks):
    assert blocks_read(name, depth) == blocks
