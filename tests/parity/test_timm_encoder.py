"""`timm:NAME`: features and preprocessing equal timm's own."""

import pytest
import torch
from PIL import Image
from publisher_files import (
    assert_same,
    convert,
    gray_images,
    in_order,
    randomise,
    refusal,
    whole_object,
)
from safetensors.torch import save_file

from selfray.models.published import load_encoder

timm = pytest.importorskip("timm")

GRIDS = {
    "test_vit3.r160_in1k": (10, 10),
    "vit_wee_patch16_reg1_gap_256.sbb_in1k": (16, 16),
    "deit_tiny_distilled_patch16_224": (14, 14),
    "test_resnet": (5, 5),
    "test_convnext": (5, 5),
    "tinynet_e": (4, 4),
    "swin_tiny_patch4_window7_224": (7, 7),
}
SLOW = ("swin_tiny_patch4_window7_224",)


def theirs(name: str, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, **changes)
    randomise(model, std=0.2)
    return model.eval()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in GRIDS]
)
def test_features_and_preprocessing_equal_timms(tmp_path, name):
    model = theirs(name)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    encoder = load_encoder(f"timm:{name}={tmp_path / 'model.safetensors'}")
    side = encoder.image_size
    images = torch.randn(1, 3, side, side)
    with torch.no_grad():
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
    cls, patches = encoder.features(images)
    assert_same(cls, pooled)
    if features.ndim == 3:
        assert_same(in_order(patches), features[:, model.num_prefix_tokens :])
    else:
        assert_same(patches, features.permute(0, 3, 1, 2) if "swin" in name else features)
    assert encoder.grid == patches.shape[2:] == GRIDS[name]
    assert encoder.width == cls.shape[1]
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model), is_training=False
    )
    for pixels in gray_images():
        expected = transform(Image.fromarray(pixels).convert("RGB"))
        assert (encoder.preprocess(pixels) - expected).abs().max() < 1e-6


def test_another_number_of_classes_and_none_are_read(tmp_path):
    file = tmp_path / "model.safetensors"
    images = torch.randn(1, 3, 160, 160)
    for classes in (5, 0):
        model = theirs("test_resnet", num_classes=classes)
        save_file(model.state_dict(), file)
        cls, _ = load_encoder(f"timm:test_resnet={file}").features(images)
        with torch.no_grad():
            assert_same(cls, model.forward_features(images).mean((2, 3)))


def test_what_does_not_fit_is_named(tmp_path):
    tensors = dict(theirs("test_resnet").state_dict())
    del tensors["layer3.0.bn1.bias"]
    tensors["head.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "model.safetensors")
    said = refusal(f"timm:test_resnet={tmp_path / 'model.safetensors'}")
    assert "layer3.0.bn1.bias" in said and '"head.weight"' in said


def test_a_pickled_network_is_refused_and_read_when_converted(tmp_path):
    torch.save(whole_object(theirs("test_resnet").state_dict()), tmp_path / "model.pth")
    said = refusal(f"timm:test_resnet={tmp_path / 'model.pth'}")
    assert "model.pth holds more than tensors" in said
    convert(said)
    assert load_encoder(f"timm:test_resnet={tmp_path / 'model.safetensors'}").width == 96


def test_a_name_is_read_from_hugging_faces_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    said = refusal("timm:test_resnet.r160_in1k")
    assert "model.safetensors from huggingface.co/timm/test_resnet.r160_in1k" in said
    assert "timm:test_resnet.r160_in1k=FILE" in said
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "snapshots" / "0123").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    model = theirs("test_resnet")
    save_file(model.state_dict(), repository / "snapshots" / "0123" / "model.safetensors")
    images = torch.randn(1, 3, 160, 160)
    cls, _ = load_encoder("timm:test_resnet.r160_in1k").features(images)
    with torch.no_grad():
        assert_same(cls, model.forward_features(images).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:vit_base_patch14_dinov", "Did you mean vit_base_patch14_dinov2"),
        ("timm:resnet50.nonsense", "no weights 'nonsense' of resnet50. Allowed: resnet50.a1_in1k"),
        ("timm:resnet50=/nowhere/model.safetensors", "/nowhere/model.safetensors cannot be read"),
    ],
)
def test_an_unknown_name_or_file_is_refused(name, said):
    assert said in refusal(name)


def test_networks_whose_pooled_features_are_of_another_width_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(theirs("lcnet_035").state_dict(), file)
    assert "1280 values an image and 176 a patch" in refusal(f"timm:lcnet_035={file}")
