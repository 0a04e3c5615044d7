"""The image encoder of BioViL-T, for one image.

Bannur et al., Learning to exploit temporal structure for biomedical vision-language processing,
CVPR 2023. All facts are from its package hi-ml-multimodal 0.2.2, `health_multimodal/image`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.models.encoder import Encoder, Tokens
from selfray.models.plain_vit import kept
from selfray.models.preprocessing import Preprocessing
from selfray.models.weights_file import load_exactly, read_tensors, sha256_of, weights_in

WEIGHTS = "biovil_t_image_model_proj_size_128"

_BLOCKS = (3, 4, 6, 3)  # of the four stages of a ResNet-50, whose widths double from 64
_EXPANSION = 4  # of a block's width at its end
_WIDTH = 256  # of the tokens of one image
_GRID = (14, 14)
# Without an image before it, the transformer that compares two has nothing to do. Neither does the
# classifier of ImageNet that torchvision's ResNet brings along, nor the projection to the 128
# values that are compared with text.
_DROPPED = ("encoder.vit_pooler.", "encoder.encoder.fc.", "projector.", "classifier.")
# `create_chest_xray_transform_for_inference(resize=512, center_crop_size=448)`: torchvision's
# Resize, bilinear, CenterCrop and ToTensor; nothing is normalised.
_PREPROCESSING = Preprocessing(
    448, (0.0,) * 3, (1.0,) * 3, shortest_edge=512, filter="bilinear", odd_margin="even"
)


class Bottleneck(nn.Module):
    """Three convolutions and a way past them, with torchvision's parameter names."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = width * _EXPANSION
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        # torchvision's ResNet has the stride here, not in conv1 as He et al. had.
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] to [B, 4 * width, h / stride, w / stride]."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        return F.relu(self.bn3(self.conv3(branch)) + self.downsample(x))


class ResNet50(nn.Module):
    """He et al., Deep residual learning, CVPR 2016, up to the last feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, blocks in enumerate(_BLOCKS):
            width, stride = 64 * 2**stage, 2 if stage else 1
            layer = [Bottleneck(channels, width, stride)]
            channels = width * _EXPANSION
            layer += [Bottleneck(channels, width, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.width = channels

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, 2048, S / 32, S / 32]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.max_pool2d(x, kernel_size=3, stride=2, padding=1)
        for stage in range(len(_BLOCKS)):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return x


class BioVilT(nn.Module):
    """The image encoder of BioViL-T where no earlier image is known."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = ResNet50()
        self.backbone_to_vit = nn.Conv2d(self.encoder.width, _WIDTH, 1, bias=False)
        self.missing_previous_emb = nn.Parameter(torch.empty(1, _WIDTH, 1, 1))

    def forward(self, images: Tensor) -> Tokens:
        """Encode images.

        Args:
            images: [B, 3, 448, 448], values 0..1, three equal channels.

        Returns:
            The image [B, 512], which is the mean of its patches, and the patches [B, 196, 512]:
            `img_embedding` and `patch_embeddings` of the publisher's `ImageModel`.
        """
        patches = self.backbone_to_vit(self.encoder(images))
        fused = torch.cat([patches, self.missing_previous_emb.expand_as(patches)], dim=1)
        return Tokens(fused.mean(dim=(2, 3)), fused.flatten(2).transpose(1, 2))


def read_biovil_t(name: str, directory: Path) -> Encoder:
    """Read BioViL-T's image model, for single images.

    `cls` is the image embedding of 512 values before the projection, which the publisher's
    downstream classifiers take, and patches have the same 512. The last 256 of them stand for the
    change since an earlier image; without one they are the same learned values in every image.

    The publisher's `load_image` stretches each image's values to 0..255 first; here images have 8
    bits already, and are taken as they are.

    Args:
        name: What was asked for.
        directory: With `biovil_t_image_model_proj_size_128.pt` as published, or .safetensors; or
            the file itself.

    Raises:
        InputError: The file is missing, damaged, holds more than tensors, or its parameters are
            not exactly those of BioViL-T.
    """
    weights = weights_in(directory, WEIGHTS)
    with torch.device("meta"):
        model = BioVilT()
    load_exactly(model, kept(read_tensors(weights), "encoder.", _DROPPED), weights)
    return Encoder(
        name,
        model,
        _PREPROCESSING,
        width=2 * _WIDTH,
        grid=_GRID,
        weights_sha256=sha256_of(weights),
        training_data=("MIMIC-CXR",),
    )
