"""MRM: features equal those of the class in its README, preprocessing that of its evaluation."""

from functools import partial

import pytest
import torch
from PIL import Image
from publisher_files import assert_same, gray_images, in_order, randomise
from torch import nn

from selfray.models.published import load_encoder

vision_transformer = pytest.importorskip("timm.models.vision_transformer")
transforms = pytest.importorskip("torchvision.transforms")

SIZE = {"embed_dim": 256, "depth": 3, "num_heads": 4}


def readmes_class(**changes):
    """`vit_base_patch16` of its README.md, narrower."""
    return vision_transformer.VisionTransformer(
        norm_layer=partial(nn.LayerNorm, eps=1e-6), **SIZE, **changes
    ).eval()


@pytest.fixture(scope="module")
def theirs_and_file(tmp_path_factory):
    """What the README loads, the encoder of the pre-training, and the published file."""
    torch.manual_seed(0)
    pretrained = readmes_class(num_classes=0)
    randomise(pretrained)
    model = {**pretrained.state_dict(), "mask_token": torch.zeros(1, 1, 8)}
    model["decoder_blocks.0.norm1.weight"] = torch.ones(8)
    file = tmp_path_factory.mktemp("mrm") / "MRM.pth"
    torch.save({"model": model}, file)
    theirs = readmes_class(num_classes=14, drop_path_rate=0.1, global_pool="avg")
    found = theirs.load_state_dict(torch.load(file)["model"], strict=False)
    assert {name.split(".")[0] for name in found.missing_keys} == {"fc_norm", "head"}
    return theirs, pretrained, file


def test_pooled_features_are_what_the_readmes_class_gives_its_classifier(theirs_and_file):
    theirs, pretrained, file = theirs_and_file
    encoder = load_encoder(str(file))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(images), pre_logits=True)
        tokens = pretrained.forward_features(images)
    cls, patches = encoder.features(images)
    assert_same(cls, expected)
    assert_same(in_order(patches), tokens[:, 1:])


def test_preprocessing_equals_that_of_its_evaluation(theirs_and_file):
    encoder = load_encoder(str(theirs_and_file[2]))
    theirs = transforms.Compose(
        [
            transforms.Resize(224),
            transforms.CenterCrop((224, 224)),
            transforms.Grayscale(num_output_channels=3),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.4978], std=[0.2449]),
        ]
    )
    for pixels in gray_images():
        expected = theirs(Image.fromarray(pixels).convert("RGB"))
        # Its Grayscale of three equal channels may round a gray value down by one.
        assert (encoder.preprocess(pixels) - expected).abs().max() <= 1 / 255 / 0.2449 + 1e-5
