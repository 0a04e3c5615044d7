"""The encoder's behaviour that no other implementation could say."""

import math

import numpy as np
import pytest
import torch

from selfray.errors import InputError
from selfray.models.vit import Block, Shape, VisionTransformer, build_vit

SMALL = Shape(24, 3, 2)


def small_vit(**changes) -> VisionTransformer:
    fields = {"patch_size": 8, "image_size": 32, "layerscale_init": 1.0, **changes}
    return VisionTransformer(SMALL, **fields)


def block_in_training(drop_path: float) -> Block:
    torch.manual_seed(0)
    return Block(SMALL, 1.0, drop_path).train()


@pytest.mark.parametrize("drop_path", [0.1, 0.3, 0.5])
def test_drop_path_skips_its_share_and_scales_the_rest(drop_path):
    block = block_in_training(drop_path)
    torch.nn.init.zeros_(block.ls2.gamma)  # leaves attention's branch alone
    x = torch.randn(20, 5, 24)
    whole = block.eval()(x) - x
    torch.manual_seed(1)
    branch = block.train()(x) - x
    skipped = (branch.abs().amax((1, 2)) < 1e-7).numpy()
    assert skipped.sum() == round(20 * drop_path)
    scale = 20 / (20 - skipped.sum())
    torch.testing.assert_close(branch[~skipped], whole[~skipped] * scale, atol=1e-5, rtol=1e-5)


def test_drop_path_saves_the_work_of_skipped_images():
    block = block_in_training(0.3)
    sizes = []
    for part in (block.attn, block.mlp):
        part.register_forward_hook(lambda _m, inputs, _o: sizes.append(len(inputs[0])))
    block(torch.randn(10, 5, 24))
    assert sizes == [7, 7]


def test_drop_path_keeps_the_expected_branch():
    block = block_in_training(0.4)
    torch.nn.init.zeros_(block.ls2.gamma)
    x = torch.randn(5, 3, 24)
    with torch.no_grad():
        whole = block.eval()(x) - x
        block.train()
        mean = torch.stack([block(x) - x for _ in range(3000)]).mean(0)
    assert (mean - whole).abs().max() < 6 * whole.abs().max() * math.sqrt(2 / 3 / 3000)


def test_no_drop_path_outside_training():
    model = small_vit(drop_path=0.5).eval()
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(images).cls, model(images).cls)


def test_drop_path_is_a_function_of_torchs_seed():
    model = small_vit(drop_path=0.5).train()
    images = torch.randn(8, 3, 32, 32)

    def features(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(images).cls

    assert torch.equal(features(3), features(3))
    assert not torch.equal(features(3), features(4))


@pytest.mark.parametrize("autocast", [False, True])
def test_activation_checkpointing_changes_no_gradient(autocast):
    torch.manual_seed(0)
    model = small_vit(drop_path=0.5, registers=2).train()
    images, masks = torch.randn(6, 3, 32, 32), torch.rand(6, 16) < 0.5
    gradients = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        model.zero_grad()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(images, masks)
        (output.cls.square().sum() + output.patches.square().sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) > 30
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_activation_checkpointing_runs_blocks_twice():
    model = small_vit().train()
    runs = []
    model.blocks[1].register_forward_pre_hook(lambda *_: runs.append(1))
    model.activation_checkpointing = True
    model(torch.randn(1, 3, 32, 32)).cls.sum().backward()
    assert len(runs) == 2


def test_every_parameter_gets_a_gradient_where_masks_are_given():
    model = small_vit(registers=2).train()
    output = model(torch.randn(2, 3, 32, 40), torch.rand(2, 20) < 0.5)
    (output.cls.sum() + output.registers.square().sum() + output.patches.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_one_channel_stands_for_three_equal_ones():
    model = small_vit().eval()
    gray = torch.randn(2, 1, 32, 32)
    one, three = model(gray), model(gray.repeat(1, 3, 1, 1))
    assert torch.equal(one.cls, three.cls) and torch.equal(one.patches, three.patches)


def test_the_mask_token_hides_pixels():
    model = small_vit().eval()
    torch.nn.init.normal_(model.mask_token)
    images = torch.randn(1, 3, 32, 32)
    changed = images.clone()
    changed[:, :, 8:16, 16:24] += 1  # patch 6 of the 4 x 4
    masks = torch.zeros(1, 16, dtype=torch.bool)
    assert not torch.equal(model(images, masks).cls, model(changed, masks).cls)
    masks[0, 6] = True
    assert torch.equal(model(images, masks).cls, model(changed, masks).cls)


def test_output_shapes_and_the_order_of_tokens():
    model = small_vit(registers=3).eval()
    output = model(torch.randn(2, 3, 24, 40))
    assert [tuple(t.shape) for t in output] == [(2, 24), (2, 3, 24), (2, 15, 24)]


def test_initial_weights_are_dinov2s_and_depend_on_the_seed_alone():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_vit("vit_nano", patch_size=14, image_size=112, registers=4).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pos_embed"], other["pos_embed"])
    for name, std in {
        "pos_embed": 0.02,
        "blocks.2.attn.qkv.weight": 0.02,
        "blocks.5.mlp.fc2.weight": 0.02,
        "cls_token": 1e-6,
        "register_tokens": 1e-6,
    }.items():
        assert first[name].std() == pytest.approx(std, rel=0.15), name
    for name in ("mask_token", "blocks.0.attn.proj.bias", "blocks.3.mlp.fc1.bias"):
        assert not first[name].any(), name
    assert (first["blocks.1.ls2.gamma"] == 1e-5).all()


def test_bfloat16_autocast_keeps_the_residual_stream_in_float32():
    torch.manual_seed(0)
    model = small_vit(drop_path=0.5).train()
    kinds = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, output: kinds.append(output.dtype))
    model.blocks[0].mlp.fc1.register_forward_hook(lambda _m, _i, o: kinds.append(o.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(4, 3, 32, 32))
    assert kinds.count(torch.float32) == 3 and kinds.count(torch.bfloat16) == 1
    assert output.cls.dtype == torch.float32


def cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -0.75."""
    d = np.abs(distance)
    near = 1.25 * d**3 - 2.25 * d**2 + 1
    far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def resample(grid: np.ndarray, size: int, scale: float) -> np.ndarray:
    """Bicubic along the first axis; borders repeat; output i looks at (i + 0.5) / scale - 0.5."""
    places = (np.arange(size) + 0.5) / scale - 0.5
    out = np.zeros((size, *grid.shape[1:]))
    for tap in range(-1, 3):
        source = np.floor(places) + tap
        rows = grid[np.clip(source, 0, len(grid) - 1).astype(int)]
        out += cubic(places - source)[:, None, None] * rows
    return out


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (7, 3), (2, 9)])
def test_offset_interpolation_is_dinov2s_formula(rows, columns):
    model = small_vit()
    model.position_interpolation = "bicubic-offset"
    table = model.pos_embed.detach().double().numpy()[0]
    expected = table[1:].reshape(4, 4, 24)
    if (rows, columns) != (4, 4):  # the native grid is left as it is
        expected = resample(expected, rows, (rows + 0.1) / 4)
        expected = resample(expected.swapaxes(0, 1), columns, (columns + 0.1) / 4).swapaxes(0, 1)
    found = model.positions(rows, columns).detach().numpy()[0]
    np.testing.assert_array_equal(found[0], table[0].astype(np.float32))
    np.testing.assert_allclose(found[1:], expected.reshape(-1, 24), atol=1e-6)


def test_cls_attention_is_a_share():
    model = small_vit(registers=2).eval()
    attention = model.cls_attention(torch.randn(2, 3, 24, 32))
    assert attention.shape == (2, 2, 12)
    assert (attention >= 0).all() and (attention.sum(-1) < 1).all()


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (200, 224, "image height is 200, not a multiple of patch_size 14. Use 196 or 210."),
        (224, 225, "image width is 225, not a multiple of patch_size 14. Use 224 or 238."),
        (224, 5, "image width is 5, not a multiple of patch_size 14. Use 14."),
    ],
)
def test_a_size_that_fits_no_patches_is_refused_with_the_nearest(height, width, said):
    model = build_vit("vit_nano", patch_size=14, image_size=224)
    with pytest.raises(InputError) as error:
        model(torch.zeros(1, 3, height, width))
    assert str(error.value) == said


def test_what_cannot_be_built_is_refused():
    with pytest.raises(InputError, match="Did you mean 'vit_small'"):
        build_vit("vit_smal", patch_size=14, image_size=224)
    with pytest.raises(InputError, match=r"image_size is 225, .* Use 224 or 238"):
        build_vit("vit_nano", patch_size=14, image_size=225)
    with pytest.raises(InputError, match="drop_path is 1"):
        build_vit("vit_nano", patch_size=14, image_size=224, drop_path=1.0)


def test_sine_and_cosine_positions_are_those_of_masked_autoencoders():
    grid = 5
    encoder = build_vit("vit_pico", patch_size=2, image_size=2 * grid, position_init="sincos")
    width = encoder.width
    expected = np.empty((grid * grid, width))
    for patch in range(grid * grid):
        row, column = divmod(patch, grid)
        for k in range(width // 4):
            angles = [place / 10_000 ** (4 * k / width) for place in (column, row)]
            for part, angle in enumerate(angles):
                expected[patch, part * width // 2 + k] = math.sin(angle)
                expected[patch, part * width // 2 + width // 4 + k] = math.cos(angle)
    np.testing.assert_allclose(encoder.pos_embed[0, 1:].detach(), expected, atol=1e-6)
    assert 0 < encoder.pos_embed[0, 0].abs().max() < 0.1  # CLS begins as DINOv2's
