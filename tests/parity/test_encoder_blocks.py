"""The last blocks equal transformers' hidden states after its final norm, and timm's."""

import pytest
import torch

from selfray.errors import InputError
from selfray.models.encoder import Encoder, Tokens, vit_encoder
from selfray.models.huggingface import read_model
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import Shape, VisionTransformer

TOLERANCE = 2e-5
PREPROCESSING = Preprocessing(70, (0.5,), (0.25,))


def encoder(registers: int) -> Encoder:
    torch.manual_seed(0)
    network = VisionTransformer(
        Shape(48, 5, 3), patch_size=14, image_size=70, registers=registers, layerscale_init=0.5
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    return vit_encoder("ours", network, PREPROCESSING)


@pytest.mark.parametrize("registers", [0, 3])
def test_blocks_are_hidden_states_after_the_final_norm(registers, tmp_path):
    transformers = pytest.importorskip("transformers")
    fields = {
        "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 3, "image_size": 70,
        "patch_size": 14, "layerscale_value": 0.5, "initializer_range": 0.1,
    }  # fmt: skip
    if registers:
        config = transformers.Dinov2WithRegistersConfig(**fields, num_register_tokens=registers)
        theirs = transformers.Dinov2WithRegistersModel(config).eval()
    else:
        theirs = transformers.Dinov2Model(transformers.Dinov2Config(**fields)).eval()
    torch.nn.init.normal_(theirs.layernorm.weight)
    theirs.save_pretrained(tmp_path)
    ours = vit_encoder("ours", read_model(tmp_path)[0], PREPROCESSING)
    images = torch.randn(2, 1, 70, 70)
    with torch.no_grad():
        states = theirs(images.expand(-1, 3, -1, -1), output_hidden_states=True).hidden_states
        expected = [theirs.layernorm(state) for state in states[-4:]]
    found = ours.blocks(images, 4)
    assert len(found) == 4
    for (cls, patches), tokens in zip(found, expected, strict=True):
        torch.testing.assert_close(cls, tokens[:, 0], atol=TOLERANCE, rtol=0)
        grid = tokens[:, 1 + registers :].reshape(2, 5, 5, 48).permute(0, 3, 1, 2)
        torch.testing.assert_close(patches, grid, atol=TOLERANCE, rtol=0)
    assert (found[0][0] - found[3][0]).abs().max() > 0.1
    for last, whole in zip(found[-1], ours.features(images), strict=True):
        torch.testing.assert_close(last, whole, atol=0, rtol=0)


def test_blocks_are_those_of_timm():
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    ours = encoder(0)
    theirs = vision_transformer.vit_small_patch14_dinov2(
        num_classes=0, img_size=70, embed_dim=48, depth=5, num_heads=3
    ).eval()
    state = dict(ours.vit.state_dict())
    theirs.load_state_dict(vision_transformer.checkpoint_filter_fn(state, theirs))
    images = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        expected = theirs.get_intermediate_layers(
            images, n=4, reshape=True, return_prefix_tokens=True, norm=True
        )
    for (cls, patches), (grid, prefix) in zip(ours.blocks(images, 4), expected, strict=True):
        torch.testing.assert_close(cls, prefix[:, 0], atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(patches, grid, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("last_blocks", [None, 2])
def test_layer_wise_rates_are_those_of_timm(last_blocks):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    from timm.optim import param_groups_layer_decay

    from selfray.evals.fine_tuning import LAYER_DECAY, WEIGHT_DECAY, FineTuned, parameter_groups

    model = FineTuned(encoder(0).vit, 3, last_blocks)
    theirs = vision_transformer.vit_small_patch14_dinov2(
        num_classes=3, img_size=70, embed_dim=48, depth=5, num_heads=3
    )
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    groups = param_groups_layer_decay(
        theirs,
        weight_decay=WEIGHT_DECAY,
        no_weight_decay_list=theirs.no_weight_decay(),
        layer_decay=LAYER_DECAY,
    )
    expected = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    ours = {id(p): name for name, p in model.named_parameters()}
    found = {
        ours[id(p)].removeprefix("encoder."): (group["rate"], group["weight_decay"])
        for group in parameter_groups(model)
        for p in group["params"]
    }
    assert len(found) > 20
    # timm counts the final norm to the last block; BEiT, MAE and we count it to the head.
    assert expected["norm.weight"][0] == pytest.approx(LAYER_DECAY * found["norm.weight"][0])
    for name, (rate, decay) in found.items():
        if not name.startswith(("mask_token", "norm.")):  # timm has no mask token
            assert expected[name] == (pytest.approx(rate), decay), name


def test_more_blocks_than_there_are_and_other_networks_are_refused():
    images = torch.randn(1, 1, 70, 70)
    with pytest.raises(InputError, match=r"6 blocks asked for; ours shows 5 blocks"):
        encoder(0).blocks(images, 6)

    class Other(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> Tokens:
            return Tokens(images.mean((2, 3)), images.flatten(2).transpose(1, 2)[:, :25])

    other = Encoder("other", Other(), PREPROCESSING, width=1, grid=(5, 5))
    with pytest.raises(InputError, match=r"4 blocks asked for; other shows its last block only"):
        other.blocks(images, 4)
    (last,) = other.blocks(images, 1)
    torch.testing.assert_close(last, other.features(images))
