"""DINOv2's own files: features equal timm's reading of them, preprocessing DINOv2's evaluation."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from publisher_files import assert_same, gray_images, in_order, randomise

from selfray.models.published import load_encoder
from selfray.models.vit import Shape, VisionTransformer

vision_transformer = pytest.importorskip("timm.models.vision_transformer")
transforms = pytest.importorskip("torchvision.transforms")

KINDS = {
    "dinov2_vits14_pretrain.pth": "vit_small_patch14_dinov2",
    "dinov2_vits14_reg4_pretrain.pth": "vit_small_patch14_reg4_dinov2",
    "dinov2_vitg14_pretrain.pth": "vit_giant_patch14_dinov2",
}


@pytest.fixture(scope="module", params=KINDS)
def file(request, tmp_path_factory):
    """A file with the names and shapes of that one, narrower: timm's own filter takes them all."""
    torch.manual_seed(0)
    shape = Shape(192, 6, 3, "swiglu" if "vitg" in request.param else "mlp")
    registers = 4 if "reg4" in request.param else 0
    model = VisionTransformer(shape, patch_size=14, image_size=518, registers=registers)
    randomise(model)
    file = tmp_path_factory.mktemp("dinov2") / request.param
    torch.save(model.state_dict(), file)
    return file


def test_features_equal_timms(file):
    tensors = torch.load(file)
    if "reg4" not in file.name:  # timm antialiases, DINOv2's own code adds 0.1 patch instead
        positions = tensors["pos_embed"][:, 1:].unflatten(1, (37, 37)).permute(0, 3, 1, 2)
        scale = (float((16 + 0.1) / 37),) * 2
        positions = F.interpolate(positions, scale_factor=scale, mode="bicubic")
        positions = positions.flatten(2).transpose(1, 2)
        tensors["pos_embed"] = torch.cat([tensors["pos_embed"][:, :1], positions], dim=1)
    theirs = getattr(vision_transformer, KINDS[file.name])(
        num_classes=0, img_size=224, embed_dim=192, depth=6, num_heads=3
    ).eval()
    filtered = vision_transformer.checkpoint_filter_fn(tensors, theirs)
    theirs.load_state_dict(filtered, strict=True)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.forward_features(images)
    encoder = load_encoder(str(file))
    cls, patches = encoder.features(images)
    assert_same(cls, expected[:, 0])
    assert_same(in_order(patches), expected[:, theirs.num_prefix_tokens :])


def test_preprocessing_equals_that_of_its_evaluation(file):
    theirs = transforms.Compose(
        [
            transforms.Resize(256, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]
    )
    encoder = load_encoder(str(file))
    for pixels in gray_images():
        expected = theirs(Image.fromarray(pixels).convert("RGB"))
        assert (encoder.preprocess(pixels) - expected).abs().max() < 1e-5
