"""Publishers' plain vision transformers equal PyTorch's own transformer, without their libraries.

The names in the files are written by hand: timm's and MAE's `VisionTransformer`, DINOv2's.
"""

import argparse
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from publisher_files import assert_same, convert, in_order, randomise, refusal, whole_object
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
