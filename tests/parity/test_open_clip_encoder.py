"""BiomedCLIP's layout: features and preprocessing equal open_clip's."""

import json

import pytest
import torch
from PIL import Image
from publisher_files import assert_same, gray_images, in_order, randomise, refusal
from safetensors.torch import save_file

from selfray.models.plain_vit import _ONLY_OURS
from selfray.models.published import load_encoder
from selfray.models.vit import build_vit

open_clip = pytest.importorskip("open_clip")
timm = pytest.importorskip("timm")

# BiomedCLIP's file, but a smaller tower, and a text tower for which nothing is downloaded.
CONFIG = {
    "model_cfg": {
        "embed_dim": 32,
        "custom_text": True,  # as where text_cfg names a BERT: names of the text tower begin so
        "vision_cfg": {
            "timm_model_name": "vit_tiny_patch16_224",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 224,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 1, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


@pytest.fixture(scope="module")
def theirs_and_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("biomedclip")
    torch.manual_seed(0)
    settings = {k: v for k, v in CONFIG["model_cfg"].items() if k != "custom_text"}
    model = open_clip.model.CustomTextCLIP(**settings)
    randomise(model)
    torch.save(model.state_dict(), directory / "open_clip_pytorch_model.bin")
    (directory / "open_clip_config.json").write_text(json.dumps(CONFIG))
    theirs, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{directory}")
    return theirs.eval(), preprocess, directory


def test_tokens_equal_those_of_open_clips_own_reader(theirs_and_directory):
    theirs, _, directory = theirs_and_directory
    encoder = load_encoder(str(directory))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.visual.trunk.forward_features(images)
        pooled = theirs.visual.trunk(images)
    cls, patches = encoder.features(images)
    assert_same(cls, expected[:, 0])
    assert_same(cls, pooled)
    assert_same(in_order(patches), expected[:, 1:])
    assert (encoder.width, encoder.grid, encoder.patch_size) == (192, (14, 14), 16)


def test_the_projected_image_is_open_clips_image_feature(theirs_and_directory):
    theirs, _, directory = theirs_and_directory
    images = torch.randn(2, 3, 224, 224)
    cls, _ = load_encoder(str(directory)).features(images)
    with torch.no_grad():
        assert_same(theirs.visual.head(cls), theirs.encode_image(images))


@pytest.mark.parametrize("changes", [{}, {"resize_mode": "squash", "interpolation": "bilinear"}])
def test_preprocessing_equals_open_clips(theirs_and_directory, tmp_path, changes):
    directory = tmp_path / "changed"
    directory.mkdir()
    config = {**CONFIG, "preprocess_cfg": {**CONFIG["preprocess_cfg"], **changes}}
    (directory / "open_clip_config.json").write_text(json.dumps(config))
    weights = "open_clip_pytorch_model.bin"
    (directory / weights).symlink_to(theirs_and_directory[2] / weights)
    _, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{directory}")
    encoder = load_encoder(str(directory))
    for pixels in gray_images():
        expected = preprocess(Image.fromarray(pixels))
        assert (encoder.preprocess(pixels) - expected).abs().max() < 1e-5


def test_a_missing_and_an_unexpected_parameter_are_named(theirs_and_directory, tmp_path):
    theirs, _, _ = theirs_and_directory
    (tmp_path / "open_clip_config.json").write_text(json.dumps(CONFIG))
    tensors = {name: t.clone() for name, t in theirs.state_dict().items()}
    tensors["visual.trunk.fc_norm.weight"] = torch.ones(192)
    del tensors["visual.trunk.blocks.3.norm2.bias"]
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    said = refusal(tmp_path)
    assert "missing (blocks.3.norm2.bias)" in said and "unexpected (fc_norm.weight)" in said


def test_biomedclips_own_tower_takes_the_parameters():
    with torch.device("meta"):
        theirs = timm.create_model("vit_base_patch16_224", num_classes=0).state_dict()
        ours = build_vit("vit_base", patch_size=16, image_size=224).state_dict()
    plain = {name: t.shape for name, t in ours.items() if not _ONLY_OURS.fullmatch(name)}
    assert plain == {name: t.shape for name, t in theirs.items()}
