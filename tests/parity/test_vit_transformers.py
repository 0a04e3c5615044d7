"""The encoder equals transformers' Dinov2Model and Dinov2WithRegistersModel."""

import pytest
import torch
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from selfray.models.huggingface import huggingface_names, read_model
from selfray.models.vit import ARCHITECTURES, build_vit

TOLERANCE = 2e-5
SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
KINDS = ["mlp", "swiglu", "mlp-registers", "swiglu-registers"]


def transformers_model(kind: str, patch_size: int = 14, image_size: int = 70, **shape):
    """Their model of a kind; on the meta device where that is the current one."""
    fields = {
        **(shape or SMALL),
        "patch_size": patch_size,
        "image_size": image_size,
        "use_swiglu_ffn": kind.startswith("swiglu"),
        "attn_implementation": "eager",
    }
    if kind.endswith("registers"):
        config = Dinov2WithRegistersConfig(**fields, num_register_tokens=3)
        return Dinov2WithRegistersModel(config).eval()
    return Dinov2Model(Dinov2Config(**fields)).eval()


def randomise(model: torch.nn.Module, seed: int) -> None:
    """No parameter stays zero or one, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.1, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def compare(theirs, ours, images, masks=None) -> None:
    with torch.no_grad():
        expected = theirs(pixel_values=images, bool_masked_pos=masks).last_hidden_state
        found = ours(images, masks)
    assert found.patches.std() > 0.1  # a constant would agree with a constant
    tokens = torch.cat([found.cls[:, None], found.registers, found.patches], dim=1)
    torch.testing.assert_close(tokens, expected, atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=[(kind, patch) for kind in KINDS for patch in (14, 16)])
def models(request, tmp_path_factory):
    kind, patch_size = request.param
    theirs = transformers_model(kind, patch_size, 5 * patch_size)
    randomise(theirs, seed=0)
    directory = tmp_path_factory.mktemp("theirs")
    theirs.save_pretrained(directory)
    return theirs, read_model(directory)[0]


@pytest.mark.parametrize("grid", [(5, 5), (8, 8), (3, 3), (7, 4), (1, 25)])
def test_features_equal_at_native_and_other_sizes(models, grid):
    theirs, ours = models
    torch.manual_seed(1)
    height, width = (side * ours.patch_size for side in grid)
    compare(theirs, ours, torch.randn(2, 3, height, width))


@pytest.mark.parametrize("grid", [(5, 5), (4, 6)])
def test_masked_features_equal(models, grid):
    theirs, ours = models
    torch.manual_seed(2)
    images = torch.randn(3, 3, grid[0] * ours.patch_size, grid[1] * ours.patch_size)
    masks = torch.rand(3, grid[0] * grid[1]) < 0.4
    compare(theirs, ours, images, masks)
    with torch.no_grad():
        difference = (ours(images, masks).cls - ours(images).cls).abs().max()
    assert difference > 1e-2  # masks do something


def test_cls_attention_equals_the_last_layers(models):
    theirs, ours = models
    torch.manual_seed(3)
    images = torch.randn(2, 3, 5 * ours.patch_size, 7 * ours.patch_size)
    with torch.no_grad():
        layers = theirs(pixel_values=images, output_attentions=True).attentions
        found = ours.cls_attention(images)
    expected = layers[-1][:, :, 0, 1 + ours.registers :]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def disturb(model: torch.nn.Module) -> None:
    """As `randomise`, but so little that wide layers do not saturate attention."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.02, generator=generator))


def test_base_at_518_equals(tmp_path):
    theirs = transformers_model(
        "mlp", 14, 518, hidden_size=768, num_hidden_layers=12, num_attention_heads=12
    )
    disturb(theirs)
    theirs.set_attn_implementation("sdpa")
    theirs.save_pretrained(tmp_path)
    ours, _ = read_model(tmp_path)
    torch.manual_seed(4)
    compare(theirs, ours, torch.randn(1, 3, 518, 518))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "patch_size"), [("plain", 14), ("registers", 16)])
@pytest.mark.parametrize("arch", ["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant"])
def test_every_architecture_equals_at_full_width(tmp_path, arch, kind, patch_size):
    shape = ARCHITECTURES[arch]
    theirs = transformers_model(
        f"{shape.ffn}-{kind}",
        patch_size,
        8 * patch_size,
        hidden_size=shape.width,
        num_hidden_layers=min(shape.depth, 24 if shape.ffn == "mlp" else 4),  # giant, shortened
        num_attention_heads=shape.heads,
    )
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours, _ = read_model(tmp_path)
    torch.manual_seed(5)
    for rows, columns in ((8, 8), (11, 11), (6, 9)):
        compare(theirs, ours, torch.randn(1, 3, rows * patch_size, columns * patch_size))


@pytest.mark.parametrize("patch_size", [14, 16])
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_their_parameters_and_shapes(arch, registers, patch_size):
    shape = ARCHITECTURES[arch]
    with torch.device("meta"):
        ours = build_vit(
            arch, patch_size=patch_size, image_size=16 * patch_size, registers=registers
        )
        theirs = transformers_model(
            shape.ffn + ("-registers" if registers else ""),
            patch_size,
            16 * patch_size,
            hidden_size=shape.width,
            num_hidden_layers=shape.depth,
            num_attention_heads=shape.heads,
        )
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    expected = {published_name(name): list(p.shape) for name, p in theirs.named_parameters()}
    found = {}
    for name, parameter in ours.named_parameters():
        parts = huggingface_names(name)
        found |= {p: [len(parameter) // len(parts), *parameter.shape[1:]] for p in parts}
    merged = {"gate_proj": "weights_in", "up_proj": None}
    for name in list(expected):
        for part, whole in merged.items():
            if part in name:
                rows, *rest = expected.pop(name)
                if whole:
                    expected[name.replace(part, whole)] = [2 * rows, *rest]
    assert found == expected


def published_name(name: str) -> str:
    """The name in published files of a parameter of transformers' model in memory."""
    for now, then in {
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.down_proj": "mlp.weights_out",
        "layers.": "layer.",
    }.items():
        name = name.replace(now, then)
    return name
