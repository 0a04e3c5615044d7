"""The image encoder of MRM, masked record modelling of radiographs and their reports.

Zhou, Lian, Wang and Yu, Advancing radiograph representation learning with masked record modeling,
ICLR 2023. All facts are from the authors' repository, github.com/RL4M/MRM-pytorch.
"""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from selfray.models.encoder import Encoder, Tokens
from selfray.models.plain_vit import kept, read_plain_vit
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import VisionTransformer
from selfray.models.weights_file import read_tensors, sha256_of, weights_in

# The decoders of images and reports (its model_mrm.py).
_DROPPED = ("decoder_", "mask_token", "bert_encoder.", "bert_mlp.")
_NORM_EPS = 1e-6  # its README.md
# Its NIH_ChestX-ray/utils/data_utils.py, `transform_test`: torchvision's Resize(224), bilinear, and
# CenterCrop(224), gray repeated three times.
_PREPROCESSING = Preprocessing(
    224, (0.4978,) * 3, (0.2449,) * 3, shortest_edge=224, filter="bilinear", odd_margin="even"
)


class PatchMeanEncoder(nn.Module):
    """A vision transformer whose patches speak for the image, as MRM's authors use theirs.

    Args:
        vit: The network.
    """

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tokens:
        """[B, 3, S, S] to the mean of patches [B, D] and patches [B, h*w, D].

        The mean is of what leaves the last block, normalised to mean 0 and standard deviation 1 of
        its D values: `global_pool="avg"` of the authors' README.md, where a fresh LayerNorm takes
        the place of the pre-trained one. The patches are after the pre-trained one, as both
        decoders of the pre-training have them.
        """
        tokens = self.vit.embed(images)
        for block in self.vit.blocks:
            tokens = block(tokens)
        mean = tokens[:, 1:].mean(dim=1)
        pooled = F.layer_norm(mean, (self.vit.width,), eps=_NORM_EPS)
        return Tokens(pooled, self.vit.norm(tokens)[:, 1:])


def read_mrm(name: str, directory: Path) -> Encoder:
    """Read MRM's weights, `MRM.pth` as published or `MRM.safetensors`.

    Args:
        name: What was asked for.
        directory: With the file, or the file itself.

    Raises:
        InputError: The file is missing, damaged, holds more than tensors, or its parameters are
            not exactly those of MRM.
    """
    weights = weights_in(directory, "MRM")
    vit = read_plain_vit(kept(read_tensors(weights), "", _DROPPED), weights)
    side = _PREPROCESSING.size // vit.patch_size
    return Encoder(
        name,
        PatchMeanEncoder(vit),
        _PREPROCESSING,
        width=vit.width,
        grid=(side, side),
        weights_sha256=sha256_of(weights),
        training_data=("MIMIC-CXR",),
    )
