"""The encoder equals timm's vit_*_dinov2."""

import dataclasses

import pytest
import torch

from selfray.models.vit import ARCHITECTURES, Shape, VisionTransformer, build_vit

vision_transformer = pytest.importorskip("timm.models.vision_transformer")

TOLERANCE = 2e-5
TIMM_NAMES = {
    "vit_small": "vit_small_patch14_dinov2",
    "vit_base": "vit_base_patch14_dinov2",
    "vit_large": "vit_large_patch14_dinov2",
    "vit_giant": "vit_giant_patch14_dinov2",
}


def timm_model(name: str, **changes):
    """Their model, without weights, for any image size."""
    entry = getattr(vision_transformer, name)
    return entry(pretrained=False, num_classes=0, dynamic_img_size=True, **changes).eval()


def carry_over(ours: VisionTransformer, theirs) -> None:
    """Our weights to timm by timm's own conversion of DINOv2's names."""
    state = dict(ours.state_dict())
    theirs.load_state_dict(vision_transformer.checkpoint_filter_fn(state, theirs), strict=True)


@pytest.fixture(
    scope="module",
    params=[
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2",
    ],
)
def models(request):
    name = request.param
    shape = Shape(48, 3, 3, "swiglu" if "giant" in name else "mlp")
    registers = 4 if "reg4" in name else 0
    ours = VisionTransformer(shape, patch_size=14, image_size=70, registers=registers).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    ours.position_interpolation = "bicubic-antialias"
    theirs = timm_model(name, img_size=70, embed_dim=48, depth=3, num_heads=3)
    carry_over(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (3, 3), (7, 4)])
def test_features_equal_at_native_and_other_sizes(models, grid):
    ours, theirs = models
    torch.manual_seed(1)
    images = torch.randn(2, 3, 14 * grid[0], 14 * grid[1])
    with torch.no_grad():
        found, expected = ours(images), theirs.forward_features(images)
    tokens = torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)
    assert tokens.std() > 0.1
    torch.testing.assert_close(tokens, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("arch", ["vit_tiny", *TIMM_NAMES])
def test_every_architecture_equals_at_full_width(arch, patch_size):
    whole = ARCHITECTURES[arch]
    depth = whole.depth if whole.ffn == "mlp" else 4  # giant, shortened
    shape = dataclasses.replace(whole, depth=depth)
    ours = VisionTransformer(
        shape, patch_size=patch_size, image_size=8 * patch_size, layerscale_init=1.0
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.02, generator=generator))
    ours.position_interpolation = "bicubic-antialias"
    theirs = timm_model(
        TIMM_NAMES.get(arch, TIMM_NAMES["vit_small"]),
        img_size=8 * patch_size,
        patch_size=patch_size,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
    )
    carry_over(ours, theirs)
    torch.manual_seed(5)
    for rows, columns in ((8, 8), (11, 11), (6, 9)):
        images = torch.randn(1, 3, rows * patch_size, columns * patch_size)
        with torch.no_grad():
            found, expected = ours(images), theirs.forward_features(images)
        tokens = torch.cat([found.cls[:, None], found.patches], dim=1)
        assert tokens.std() > 0.1
        torch.testing.assert_close(tokens, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("arch", TIMM_NAMES)
def test_their_architecture_takes_our_parameters(arch):
    assert arch in ARCHITECTURES
    with torch.device("meta"):
        ours = build_vit(arch, patch_size=14, image_size=518)
        theirs = timm_model(TIMM_NAMES[arch])
    assert theirs.blocks[0].attn.num_heads == ours.shape.heads
    carry_over(ours, theirs)  # strict: names and shapes
