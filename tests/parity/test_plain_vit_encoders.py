"""Publishers' plain vision transformers equal PyTorch's own transformer, without their libraries.

The names in the files are written by hand: timm's and MAE's `VisionTransformer`, DINOv2's.
"""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from publisher_files import assert_same, convert, in_order, randomise, refusal, whole_object
from safetensors.torch import save_file
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.encoder import Encoder
from selfray.models.published import load_encoder

WIDTH, DEPTH, HEADS, PATCH = 192, 6, 3, 16
IN_TORCH = {
    "norm1": "norm1",
    "attn.qkv": "self_attn.in_proj_",
    "attn.proj": "self_attn.out_proj",
    "norm2": "norm2",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
}


class TorchTransformer(nn.Module):
    """A vision transformer of torch.nn's parts."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True
        )
        self.projection = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 1 + (224 // PATCH) ** 2, WIDTH))
        self.blocks = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-6)

    def before_norm(self, images: Tensor) -> Tensor:
        patches = self.projection(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(images), -1, -1), patches], dim=1)
        return self.blocks(tokens + self.positions)

    def timm_names(self) -> dict[str, Tensor]:
        """The parameters under the names that timm, MAE and DINOv2 share."""
        found = dict(self.state_dict())
        tensors = {"cls_token": found["cls"], "pos_embed": found["positions"]}
        for kind in ("weight", "bias"):
            tensors[f"patch_embed.proj.{kind}"] = found[f"projection.{kind}"]
            tensors[f"norm.{kind}"] = found[f"norm.{kind}"]
            for block in range(DEPTH):
                for theirs, ours in IN_TORCH.items():
                    dot = "" if ours.endswith("_") else "."
                    source = f"blocks.layers.{block}.{ours}{dot}{kind}"
                    tensors[f"blocks.{block}.{theirs}.{kind}"] = found[source]
        return tensors


@pytest.fixture(scope="module")
def reference() -> TorchTransformer:
    torch.manual_seed(0)
    model = TorchTransformer()
    randomise(model)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def features(encoder: Encoder, images: Tensor) -> tuple[Tensor, Tensor]:
    cls, patches = encoder.features(images)
    return cls, in_order(patches)


# BiomedCLIP


def write_clip(directory: Path, tensors: dict[str, Tensor], **changes) -> dict[str, Tensor]:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "image_size": 224}
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], **changes}
    config = {"model_cfg": {"vision_cfg": {**vision, **changes}}, "preprocess_cfg": preprocess}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    return {
        **{f"visual.trunk.{name}": tensor for name, tensor in tensors.items()},
        "visual.head.proj.weight": torch.randn(32, WIDTH),
        "text.transformer.embeddings.position_ids": torch.arange(8)[None],
        "text.proj.0.weight": torch.randn(4, 4),
        "logit_scale": torch.tensor(2.7),
    }


def twelve_blocks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """vit_tiny has twice the blocks; those added do nothing."""
    added = {
        name.replace(f"blocks.{block}.", f"blocks.{block + DEPTH}."): torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        for block in range(DEPTH)
        if name.startswith(f"blocks.{block}.")
    }
    return {**tensors, **added}


@pytest.mark.parametrize("file", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_clip_in_open_clips_layout_equals_torch(tmp_path, reference, images, file):
    tensors = write_clip(tmp_path, twelve_blocks(reference.timm_names()))
    write = torch.save if file.endswith(".bin") else save_file
    write(tensors, tmp_path / file)
    cls, patches = features(load_encoder(str(tmp_path)), images)
    with torch.no_grad():
        expected = reference.norm(reference.before_norm(images))
    assert_same(cls, expected[:, 0])
    assert_same(patches, expected[:, 1:])


def test_a_pickled_clip_is_refused_and_read_when_converted(tmp_path, reference):
    tensors = write_clip(tmp_path, twelve_blocks(reference.timm_names()))
    torch.save({"state_dict": whole_object(tensors)}, tmp_path / "open_clip_pytorch_model.bin")
    convert(refusal(tmp_path))
    assert load_encoder(str(tmp_path)).width == WIDTH
    assert (tmp_path / "open_clip_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"timm_model_name": "resnet50"}, "timm_model_name is 'resnet50', allowed: vit_SIZE"),
        ({"timm_model_name": "vit_small_patch16_224"}, "is no vit_small_patch16_224"),
        ({"timm_pool": "avg"}, "timm_pool is 'avg', allowed: '' or 'token'"),
        ({"image_size": 336}, "image_size is 336, vit_tiny_patch16_224 asks for 224"),
        ({"interpolation": "random"}, "interpolation is 'random', allowed: bicubic or bilinear"),
        ({"resize_mode": "longest"}, "resize_mode is 'longest', allowed: shortest or squash"),
        ({"mean": [0.5]}, "1 means and 3 standard deviations, allowed: three each"),
    ],
)
def test_a_clip_of_another_kind_is_refused(tmp_path, reference, changes, said):
    tensors = write_clip(tmp_path, twelve_blocks(reference.timm_names()), **changes)
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    assert said in refusal(tmp_path)


def test_a_clip_without_weights_is_told_which(tmp_path, reference):
    write_clip(tmp_path, reference.timm_names())
    assert "open_clip_model.safetensors nor open_clip_pytorch_model.bin" in refusal(tmp_path)


# MRM


def mrm_file(tensors: dict[str, Tensor]) -> dict[str, object]:
    """What its main_pretrain.py saves: parts that the encoder does without, one tensor twice."""
    words = torch.randn(20, WIDTH)
    model = {
        **tensors,
        "mask_token": torch.zeros(1, 1, WIDTH),
        "decoder_pos_embed": torch.zeros(1, 197, WIDTH),
        "decoder_embed.weight": torch.randn(WIDTH, WIDTH),
        "decoder_blocks.0.attn.qkv.weight": torch.randn(3 * WIDTH, WIDTH),
        "decoder_norm.weight": torch.ones(WIDTH),
        "decoder_pred.bias": torch.zeros(8),
        "bert_mlp.weight": torch.randn(8, WIDTH),
        "bert_encoder.model.bert.embeddings.word_embeddings.weight": words,
        "bert_encoder.model.cls.predictions.decoder.weight": words,
    }
    return {"model": model, "epoch": 199}


def torchs_mrm(reference: TorchTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of patches, normalised afresh, as timm's global_pool="avg", and patches as MAE's."""
    with torch.no_grad():
        tokens = reference.before_norm(images)
        fresh = nn.LayerNorm(WIDTH, eps=1e-6)
        return fresh(tokens[:, 1:].mean(1)), reference.norm(tokens)[:, 1:]


@pytest.mark.parametrize("given", ["directory", "file"])
def test_mrm_equals_torch(tmp_path, reference, images, given):
    file = tmp_path / "MRM.pth"
    torch.save(mrm_file(reference.timm_names()), file)
    encoder = load_encoder(str(tmp_path if given == "directory" else file))
    cls, patches = features(encoder, images)
    expected_cls, expected_patches = torchs_mrm(reference, images)
    assert_same(cls, expected_cls)
    assert_same(patches, expected_patches)
    assert (encoder.width, encoder.grid, encoder.image_size) == (WIDTH, (14, 14), 224)
    assert encoder.training_data == ("MIMIC-CXR",) and not encoder.has_attention
    assert (encoder.mean, encoder.std) == (pytest.approx(0.4978), pytest.approx(0.2449))


def test_mrm_with_its_training_arguments_is_refused_and_read_when_converted(
    tmp_path, reference, images
):
    content = mrm_file(reference.timm_names()) | {"args": argparse.Namespace(lr=1.5e-4)}
    torch.save(content, tmp_path / "MRM.pth")
    said = refusal(tmp_path)
    assert "MRM.pth holds more than tensors" in said
    convert(said)
    cls, _ = features(load_encoder(str(tmp_path)), images)
    assert_same(cls, torchs_mrm(reference, images)[0])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"blocks.2.mlp.fc2.bias": None}, "1 missing (blocks.2.mlp.fc2.bias)"),
        ({"fc_norm.weight": torch.ones(WIDTH)}, "1 unexpected (fc_norm.weight)"),
        ({"blocks.0.ls1.gamma": torch.ones(WIDTH)}, "1 unexpected (blocks.0.ls1.gamma)"),
        ({"norm.bias": torch.ones(3)}, "norm.bias is [3]"),
        ({"pos_embed": None}, "1 missing (pos_embed)"),
        ({"pos_embed": torch.ones(197, WIDTH)}, "pos_embed is [197, 192], allowed: 3 dimensions"),
        ({"cls_token": torch.ones(1, 1, 100)}, "tokens have 100 values, allowed: a multiple of 64"),
        ({"blocks.6.norm1.weight": torch.ones(WIDTH)}, "has 7 blocks of width 192"),
    ],
)
def test_what_is_wrong_with_a_vision_transformers_file_is_said(tmp_path, reference, changes, said):
    tensors = {**reference.timm_names(), **changes}
    tensors = {name: t.clone() for name, t in tensors.items() if t is not None}
    save_file(tensors, tmp_path / "MRM.safetensors")
    assert said in refusal(tmp_path / "MRM.safetensors")


def test_a_published_name_is_found_among_converted_files(tmp_path, reference, monkeypatch):
    monkeypatch.setenv("SELFRAY_ENCODERS", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    said = refusal("RL4M/MRM")
    assert "MRM.pth" in said and "github.com/RL4M/MRM-pytorch" in said
    (tmp_path / "RL4M" / "MRM").mkdir(parents=True)
    save_file(reference.timm_names(), tmp_path / "RL4M" / "MRM" / "MRM.safetensors")
    assert load_encoder("RL4M/MRM").training_data == ("MIMIC-CXR",)


# DINOv2


def dinov2_names(reference: TorchTransformer) -> dict[str, Tensor]:
    """With mask token and LayerScale, and positions of 37 x 37 patches of 14 pixels."""
    generator = torch.Generator().manual_seed(2)
    scales = {f"blocks.{b}.ls{n}.gamma": torch.ones(WIDTH) for b in range(DEPTH) for n in (1, 2)}
    return {
        **{name: tensor.clone() for name, tensor in reference.timm_names().items()},
        **scales,
        "mask_token": torch.zeros(1, WIDTH),
        "patch_embed.proj.weight": 0.05 * torch.randn(WIDTH, 3, 14, 14, generator=generator),
        "pos_embed": torch.randn(1, 1 + 37**2, WIDTH, generator=generator),
    }


def torchs_dinov2(reference: TorchTransformer, tensors: dict[str, Tensor], images: Tensor):
    """Its tokens, with the scale of 0.1 patch more: the formula of DINOv2's own code."""
    patches = F.conv2d(
        images, tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"], stride=14
    )
    positions = tensors["pos_embed"][0, 1:].T.reshape(1, WIDTH, 37, 37)
    positions = F.interpolate(positions, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    cls = tensors["cls_token"] + tensors["pos_embed"][:, :1]
    tokens = (patches + positions).flatten(2).transpose(1, 2)
    tokens = torch.cat([cls.expand(len(images), -1, -1), tokens], dim=1)
    with torch.no_grad():
        return reference.norm(reference.blocks(tokens))


def test_dinov2s_own_file_equals_torch(tmp_path, reference, images):
    tensors = dinov2_names(reference)
    file = tmp_path / "dinov2_vits14_pretrain.pth"
    torch.save(tensors, file)
    expected = torchs_dinov2(reference, tensors, images)
    for given in (tmp_path, file):
        encoder = load_encoder(str(given))
        cls, patches = features(encoder, images)
        assert_same(cls, expected[:, 0])
        assert_same(patches, expected[:, 1:])
        assert (encoder.grid, encoder.patch_size, encoder.vit.registers) == ((16, 16), 14, 0)


def test_two_files_of_dinov2_beside_each_other_are_told_apart_by_name(tmp_path, reference):
    tensors = dinov2_names(reference)
    for name in ("dinov2_vits14_pretrain.pth", "dinov2_vitb14_pretrain.pth"):
        torch.save(tensors, tmp_path / name)
    assert "dinov2_vitb14_pretrain.pth, dinov2_vits14_pretrain.pth. Give" in refusal(tmp_path)
    assert load_encoder(str(tmp_path / "dinov2_vits14_pretrain.pth")).width == WIDTH


def test_a_pickled_network_is_refused_and_read_when_converted(tmp_path, reference):
    tensors = dinov2_names(reference)
    torch.save(whole_object(tensors), tmp_path / "dinov2_vits14_pretrain.pth")
    said = refusal(tmp_path)
    assert "holds more than tensors" in said
    convert(said)
    assert load_encoder(str(tmp_path)).width == WIDTH
    del tensors["mask_token"]
    save_file(tensors, tmp_path / "dinov2_vits14_pretrain.safetensors")
    assert "1 missing (mask_token)" in refusal(tmp_path)


def test_a_folder_with_files_of_two_publishers_is_refused(tmp_path, reference):
    torch.save(mrm_file(reference.timm_names()), tmp_path / "MRM.pth")
    torch.save(dinov2_names(reference), tmp_path / "dinov2_vits14_pretrain.pth")
    assert "several encoders, MRM.* and dinov2_vit*.*. Put each into a folder" in refusal(tmp_path)
    assert load_encoder(str(tmp_path / "MRM.pth")).training_data == ("MIMIC-CXR",)


def test_a_file_of_no_known_publisher_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"")
    with pytest.raises(InputError, match=r"weights\.pth"):
        load_encoder(str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("timm:resnet50", "timm", "selfray[timm]"),
        ("xrv:densenet121-res224-all", "torchxrayvision", "selfray[xrv]"),
    ],
)
def test_a_library_that_is_not_installed_is_named(monkeypatch, name, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    said = refusal(name)
    assert f"needs {module}, which cannot be imported" in said and extra in said
