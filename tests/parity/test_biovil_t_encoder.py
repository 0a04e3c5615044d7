"""BioViL-T: features and preprocessing equal its publisher's; the ResNet equals transformers'."""

import re

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
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from selfray.models.published import load_encoder

NAME = "biovil_t_image_model_proj_size_128"
# What the encoder of a single image does without.
UNUSED = {
    "encoder.encoder.fc.weight": torch.zeros(1000, 8),
    "encoder.vit_pooler.type_embed": torch.zeros(2, 1, 256),
    "encoder.vit_pooler.blocks.0.attn.proj_q.weight": torch.zeros(8, 8),
    "projector.model.1.num_batches_tracked": torch.tensor(5),
}


def torchvisions_name(name: str) -> str:
    """torchvision's name of a parameter of transformers' ResNet."""
    name = name.replace("embedder.embedder.convolution", "conv1")
    name = name.replace("embedder.embedder.normalization", "bn1")
    name = re.sub(r"encoder\.stages\.(\d+)\.layers", lambda m: f"layer{int(m[1]) + 1}", name)
    name = name.replace("shortcut.convolution", "downsample.0")
    name = name.replace("shortcut.normalization", "downsample.1")
    name = re.sub(r"\.layer\.(\d)\.convolution", lambda m: f".conv{int(m[1]) + 1}", name)
    return re.sub(r"\.layer\.(\d)\.normalization", lambda m: f".bn{int(m[1]) + 1}", name)


@pytest.fixture(scope="module")
def reference() -> tuple[nn.Module, dict[str, Tensor]]:
    """transformers' ResNet-50, and a file's tensors with its parameters in it."""
    torch.manual_seed(0)
    resnet = ResNetModel(ResNetConfig()).eval()
    randomise(resnet)
    tensors = {
        "encoder.backbone_to_vit.weight": 0.01 * torch.randn(256, 2048, 1, 1),
        "encoder.missing_previous_emb": torch.randn(1, 256, 1, 1),
        **UNUSED,
    }
    for name, tensor in resnet.state_dict().items():
        tensors[f"encoder.encoder.{torchvisions_name(name)}"] = tensor
    return resnet, tensors


def test_features_equal_transformers_resnet(tmp_path, reference):
    resnet, tensors = reference
    torch.save(tensors, tmp_path / f"{NAME}.pt")
    images = torch.rand(1, 3, 448, 448)
    encoder = load_encoder(str(tmp_path))
    cls, patches = encoder.features(images)
    with torch.no_grad():
        maps = resnet(images).last_hidden_state
        static = torch.einsum(
            "bchw,dc->bdhw", maps, tensors["encoder.backbone_to_vit.weight"][:, :, 0, 0]
        )
    assert_same(patches[:, :256], static)
    assert_same(cls[:, :256], static.mean((2, 3)))
    previous = tensors["encoder.missing_previous_emb"][:, :, 0, 0]
    torch.testing.assert_close(cls[:, 256:], previous, atol=1e-6, rtol=0)
    assert (encoder.width, encoder.grid, encoder.image_size) == (512, (14, 14), 448)
    assert encoder.training_data == ("MIMIC-CXR",)


def test_a_pickled_model_is_refused_and_read_when_converted(tmp_path, reference):
    file = tmp_path / f"{NAME}.pt"
    torch.save(whole_object(reference[1]), file)
    said = refusal(file)
    assert f"{NAME}.pt holds more than tensors" in said
    convert(said)
    assert load_encoder(str(tmp_path)).width == 512


def test_a_missing_and_an_unexpected_parameter_are_named(tmp_path, reference):
    tensors = {name: tensor.clone() for name, tensor in reference[1].items()}
    del tensors["encoder.missing_previous_emb"], tensors["encoder.encoder.layer3.5.bn2.running_var"]
    tensors["encoder.encoder.layer5.0.conv1.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / f"{NAME}.safetensors")
    said = refusal(tmp_path)
    assert "2 missing (encoder.layer3.5.bn2.running_var, missing_previous_emb)" in said
    assert "1 unexpected (encoder.layer5.0.conv1.weight)" in said


# The publisher's own


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    model = pytest.importorskip("health_multimodal.image.model.model")
    torch.manual_seed(0)
    image_model = model.ImageModel("resnet50_multi_image", joint_feature_size=128).eval()
    randomise(image_model)
    return image_model


def test_features_equal_the_publishers_image_model(tmp_path, theirs):
    torch.save(theirs.state_dict(), tmp_path / f"{NAME}.pt")
    images = torch.rand(1, 3, 448, 448)
    with torch.no_grad():
        expected = theirs(images)
    cls, patches = load_encoder(str(tmp_path)).features(images)
    assert_same(cls, expected.img_embedding)
    assert_same(in_order(patches), in_order(expected.patch_embeddings))


def test_preprocessing_equals_the_publishers(tmp_path, reference):
    data = pytest.importorskip("health_multimodal.image.data.transforms")
    transform = data.create_chest_xray_transform_for_inference(resize=512, center_crop_size=448)
    save_file(reference[1], tmp_path / f"{NAME}.safetensors")
    encoder = load_encoder(str(tmp_path))
    for pixels in gray_images():
        assert torch.equal(encoder.preprocess(pixels), transform(Image.fromarray(pixels)))
