"""An encoder trained together with a decoder: its tokens, its rates, its copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from selfray.evals.segmentation_decoders import blocks_read
from selfray.evals.segmentation_fine_tuning import FineTunedDecoder, block_levels
from selfray.models.encoder import Encoder
from selfray.models.published import load_encoder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("random:vit_pico/16@64")


def fine_tuned(encoder: Encoder) -> FineTunedDecoder:
    blocks = blocks_read("linear-four-blocks", encoder.depth)
    return FineTunedDecoder(
        "linear-four-blocks", encoder.vit, blocks, encoder.grid, labels=2, multi_label=True, seed=0
    )


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def test_tokens_are_those_of_the_encoder_s_blocks(encoder):
    found = block_levels(encoder.vit, images(), (0, 2, 5))
    shown = encoder.blocks(images(), encoder.depth)
    for level, block in zip(found, (0, 2, 5), strict=True):
        torch.testing.assert_close(level, shown[block][1])


def test_scaled_tokens_have_mean_0_and_deviation_1(encoder):
    model = fine_tuned(encoder)
    model.scale_by([images()[:1], images()[1:]])
    for level, mean, std in zip(model.levels(images()), model.mean, model.std, strict=True):
        tokens = level.detach().double().numpy()
        np.testing.assert_allclose(mean[:, 0, 0], tokens.mean(axis=(0, 2, 3)), atol=1e-6)
        np.testing.assert_allclose(std[:, 0, 0], tokens.std(axis=(0, 2, 3)), rtol=1e-4)


def test_rates_fall_block_by_block_below_the_decoder_s_and_only_matrices_decay(encoder):
    model = fine_tuned(encoder)
    groups = model.parameter_groups()
    of = {id(p): group for group in groups for p in group["params"]}
    trained = [p for n, p in model.named_parameters()]
    assert len(of) == len(trained) and {id(p) for p in trained} == of.keys()
    blocks = list(model.encoder.blocks)
    rates = [of[id(block.norm1.weight)]["rate"] for block in blocks]
    # BEiT's 7e-4, times 0.65 a layer below the norm.
    np.testing.assert_allclose(rates[::-1], 7e-4 * 0.65 ** np.arange(1, 7))
    assert of[id(model.encoder.norm.weight)]["rate"] == 7e-4
    assert of[id(model.decoder.logits.weight)]["rate"] == 0.1
    decays = {n: of[id(p)]["weight_decay"] for n, p in model.encoder.named_parameters()}
    assert decays["blocks.0.attn.qkv.weight"] == decays["patch_embed.proj.weight"] == 0.05
    assert decays["blocks.0.norm1.weight"] == decays["pos_embed"] == decays["cls_token"] == 0


def test_a_step_moves_the_copy_and_not_the_encoder(encoder):
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    model = fine_tuned(encoder).train()
    assert model.training and not model.encoder.training
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).square().mean().backward()
    optimizer.step()
    moved = {n for n, p in model.encoder.named_parameters() if not torch.equal(p, before[n])}
    assert {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight"} <= moved
    assert all(torch.equal(before[n], v) for n, v in encoder.model.state_dict().items())
