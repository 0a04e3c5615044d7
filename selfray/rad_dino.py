"""The class of the package rad_dino, by this package's encoder and preprocessing.

Methods, arguments, shapes and values are those of `rad_dino.RadDino` 0.1.1 (microsoft/rad-dino,
MIT); transformers is not needed.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable
from os import PathLike

import torch
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.image_inputs import ImageInput, eight_bit_images
from selfray.models.published import load_encoder


class PreprocessedImages(UserDict[str, Tensor]):
    """`pixel_values`, float32 [B, 3, S, S], by key or as an attribute."""

    @property
    def pixel_values(self) -> Tensor:
        """Images that were preprocessed, float32 [B, 3, S, S]."""
        return self["pixel_values"]

    def to(self, *args, **kwargs) -> PreprocessedImages:
        """Move or convert the tensors, as `torch.Tensor.to`; changes and returns this object."""
        self.data = {name: tensor.to(*args, **kwargs) for name, tensor in self.data.items()}
        return self


class RadDino(nn.Module):
    """RAD-DINO, or any other encoder of DINOv2's kind, for images of any size.

    Where rad_dino takes Pillow images, this takes also paths, arrays and tensors of 8 bits; and it
    refuses what rad_dino clips silently, images of 16 bits. Parameters have this package's names.

    Args:
        repository: The published name, or a directory with its files.

    Raises:
        InputError: The files are not on this machine and cannot be had, are not whole, or are of
            an encoder of another kind.
    """

    def __init__(self, repository: str | PathLike[str] = "microsoft/rad-dino") -> None:
        super().__init__()
        encoder = load_encoder(repository)
        self.model, self._preprocessing = encoder.vit, encoder.preprocessing

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.model.parameters()).device

    def preprocess(self, image_or_images: ImageInput | Iterable[ImageInput]) -> PreprocessedImages:
        """Resize, crop and normalise one image or several, on the CPU.

        Raises:
            InputError: No image, one that is not of 8 bits, or cannot be read.
        """
        prepared = [self._preprocessing(pixels) for pixels in eight_bit_images(image_or_images)]
        if not prepared:
            raise InputError("no image given. Give one or more.")
        return PreprocessedImages(pixel_values=torch.stack(prepared))

    def encode(self, inputs: PreprocessedImages) -> tuple[Tensor, Tensor]:
        """CLS [B, D] and patch tokens [B, h*w, D], with gradients."""
        tokens = self.model(inputs["pixel_values"])
        return tokens.cls, tokens.patches

    def reshape_patch_tokens(self, patch_tokens_flat: Tensor) -> Tensor:
        """[B, h*w, D] to [B, D, h, w]."""
        rows = self._preprocessing.size // self.model.patch_size
        return patch_tokens_flat.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)

    @torch.inference_mode()
    def extract_features(
        self, image_or_images: ImageInput | Iterable[ImageInput]
    ) -> tuple[Tensor, Tensor]:
        """CLS [B, D] and patch tokens [B, D, h, w], without gradients.

        Raises:
            InputError: As for `preprocess`.
        """
        cls, patches = self.encode(self.preprocess(image_or_images).to(self.device))
        return cls, self.reshape_patch_tokens(patches)

    def extract_cls_token(self, image_or_images: ImageInput | Iterable[ImageInput]) -> Tensor:
        """CLS [B, D], as `extract_features`."""
        return self.extract_features(image_or_images)[0]

    def extract_patch_tokens(self, image_or_images: ImageInput | Iterable[ImageInput]) -> Tensor:
        """Patch tokens [B, D, h, w], as `extract_features`."""
        return self.extract_features(image_or_images)[1]

    def forward(self, image_or_images: ImageInput | Iterable[ImageInput]) -> tuple[Tensor, Tensor]:
        """The same as `extract_features`."""
        return self.extract_features(image_or_images)
