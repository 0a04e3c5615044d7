"""An encoder: a network together with the preprocessing that it was made for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.image_inputs import ImageInput, eight_bit_images
from selfray.models.vit import VisionTransformer


class Tokens(NamedTuple):
    """What a network makes of a batch: pooled or CLS [B, D], and patch tokens [B, h*w, D]."""

    cls: Tensor
    patches: Tensor


class InputPreprocessing(Protocol):
    """`Preprocessing`, or a publisher's own that does not fit into it."""

    @property
    def size(self) -> int: ...

    @property
    def mean(self) -> tuple[float, ...]: ...

    @property
    def std(self) -> tuple[float, ...]: ...

    def __call__(self, pixels: np.ndarray) -> Tensor: ...

    def square(self, pixels: np.ndarray) -> np.ndarray: ...

    def normalise(self, squares: Tensor) -> Tensor: ...

    def description(self) -> dict: ...


class Encoder:
    """A network and its own preprocessing.

    Args:
        name: Where it came from.
        model: Images [B, C, S, S] to something with `cls` [B, D] and `patches` [B, h*w, D], such
            as `Tokens`. Put in evaluation mode here.
        preprocessing: From uint8 pixels to one of the images.
        width: D.
        grid: h and w.
        weights_sha256: Of the weights' file; by default of the parameters.
        synthetic: Whether it was trained on phantoms.
        training_data: Datasets known to be in its training, by their common names.

    Attributes:
        image_size: S, pixels.
        mean: Averaged over the channels: what one-channel training goes on with.
        std: Likewise.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        preprocessing: InputPreprocessing,
        *,
        width: int,
        grid: tuple[int, int],
        weights_sha256: str | None = None,
        synthetic: bool = False,
        training_data: tuple[str, ...] = (),
    ) -> None:
        self.name, self.model, self.preprocessing = name, model.eval(), preprocessing
        self.width, self.grid, self.synthetic = width, grid, synthetic
        self.training_data = training_data
        self.image_size = preprocessing.size
        self.mean = float(np.mean(preprocessing.mean))
        self.std = float(np.mean(preprocessing.std))
        if weights_sha256 is not None:
            self.weights_sha256 = weights_sha256

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights' file, or of names and bytes of the parameters in order."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the network is; move it by `encoder.model.to(device)`."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    @torch.inference_mode()
    def __call__(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = 32
    ) -> tuple[Tensor, Tensor]:
        """Preprocess images and encode them.

        Args:
            images: One, or several of any sizes: Pillow images, uint8 pixels [H, W] or [H, W, 3]
                with 0 for black, or paths. Of a DICOM file, and of more than 8 bits, the darkest
                pixel becomes 0 and the brightest 255.
            batch_size: Images that are encoded at a time.

        Returns:
            CLS or pooled [B, D] and patches [B, D, h, w], on the network's device.

        Raises:
            InputError: No image, one that is not of 8 bits or cannot be read, or a
                `batch_size` below 1.
        """
        cls, patches = zip(*self.batches(images, batch_size), strict=True)
        return torch.cat(cls), torch.cat(patches)

    @torch.inference_mode()
    def batches(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int = 32
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same, batch by batch: the patches of many images together fill the memory.

        Args:
            images: As for a call.
            batch_size: As for a call.

        Yields:
            CLS or pooled [B, D] and patches [B, D, h, w].

        Raises:
            InputError: As for a call.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}. Give 1 or more.")
        prepared = map(self.preprocess, eight_bit_images(images))
        batch = list(islice(prepared, batch_size))
        if not batch:
            raise InputError("no image given. Give one or more.")
        while batch:
            yield self.features(torch.stack(batch).to(self.device))
            batch = list(islice(prepared, batch_size))

    @property
    def patch_size(self) -> int:
        """Pixels of the input that one row of the patch grid stands for."""
        return self.image_size // self.grid[0]

    @property
    def vit(self) -> VisionTransformer:
        """The network, where it is one that training can continue.

        Raises:
            InputError: It is of another kind.
        """
        if not isinstance(self.model, VisionTransformer):
            raise InputError(
                f"{self.name} is no DINOv2-type vision transformer; only such can be continued. "
                "Start from facebook/dinov2-base, microsoft/rad-dino or a run."
            )
        return self.model

    def preprocess(self, pixels: np.ndarray) -> Tensor:
        """Make an image fit: uint8 [H, W] or [H, W, 3] to float32 [C, S, S].

        Raises:
            InputError: Not an image of 8 bits.
        """
        return self.preprocessing(pixels)

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode preprocessed images.

        Args:
            images: [B, C, S, S].

        Returns:
            CLS or pooled [B, D] and patches [B, D, h, w].
        """
        tokens = self.model(images)
        rows = images.shape[-2] // self.patch_size
        return tokens.cls, tokens.patches.transpose(1, 2).unflatten(2, (rows, -1))

    @property
    def depth(self) -> int:
        """How many blocks `blocks` can give; 1 of a network that shows its last one only."""
        return self.model.depth if isinstance(self.model, VisionTransformer) else 1

    @torch.no_grad()
    def blocks(self, images: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
        """What the last blocks put out, each after the final norm, which is the last one's.

        Args:
            images: [B, C, S, S], preprocessed.
            n: How many blocks, 1 to `depth`.

        Returns:
            CLS [B, D] and patches [B, D, h, w] of each, the last block last; the last equals
            `features`.

        Raises:
            InputError: There are not so many.

        Reference:
            DINOv2's `get_intermediate_layers(n, reshape=True, return_class_token=True)`.
        """
        if not 1 <= n <= self.depth:
            shown = "its last block only" if self.depth == 1 else f"{self.depth} blocks"
            raise InputError(f"{n} blocks asked for; {self.name} shows {shown}. Ask for fewer.")
        if not isinstance(self.model, VisionTransformer):
            return [self.features(images)]
        vit, x = self.model, self.model.embed(images)
        rows, first_patch = images.shape[-2] // self.patch_size, 1 + self.model.registers
        outputs = []
        for index, block in enumerate(vit.blocks):
            x = block(x)
            if index >= vit.depth - n:
                tokens = vit.norm(x)
                patches = tokens[:, first_patch:].transpose(1, 2).unflatten(2, (rows, -1))
                outputs.append((tokens[:, 0], patches))
        return outputs

    @property
    def has_attention(self) -> bool:
        """Whether `attention` can say where the encoder looks."""
        return isinstance(self.model, VisionTransformer)

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """How much CLS looks at each patch in the last block: [B, heads, h*w].

        Args:
            images: [B, C, S, S], preprocessed.

        Raises:
            InputError: The network is no vision transformer of this package.
        """
        return self.vit.cls_attention(images)


def vit_encoder(
    name: str,
    model: VisionTransformer,
    preprocessing: InputPreprocessing,
    *,
    weights_sha256: str | None = None,
    synthetic: bool = False,
    training_data: tuple[str, ...] = (),
) -> Encoder:
    """An encoder around a vision transformer of this package.

    Args:
        name: Where it came from.
        model: The network.
        preprocessing: Its `size` may be any multiple of the patch.
        weights_sha256: As for `Encoder`.
        synthetic: As for `Encoder`.
        training_data: As for `Encoder`.

    Raises:
        InputError: The input is no multiple of the patch.
    """
    if preprocessing.size % model.patch_size:
        raise InputError(
            f"crop_size is {preprocessing.size}, not a multiple of patch_size {model.patch_size}. "
            "Take preprocessor_config.json and config.json from the same model."
        )
    side = preprocessing.size // model.patch_size
    return Encoder(
        name,
        model,
        preprocessing,
        width=model.width,
        grid=(side, side),
        weights_sha256=weights_sha256,
        synthetic=synthetic,
        training_data=training_data,
    )
