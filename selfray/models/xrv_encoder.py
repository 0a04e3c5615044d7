"""The DenseNets of the library torchxrayvision, by its names.

Cohen et al., TorchXRayVision: a library of chest X-ray datasets and models, MIDL 2022.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.errors import InputError, nearest
from selfray.models.encoder import Encoder, Tokens
from selfray.models.plain_vit import kept
from selfray.models.preprocessing import require_eight_bits
from selfray.models.weights_file import load_exactly, read_tensors, sha256_of

# By the names of the weights in its models.py, and the common names of the datasets in them.
_NIH, _PADCHEST, _CHEXPERT = "NIH ChestX-ray14", "PadChest", "CheXpert"
_MIMIC, _OPEN_I, _RSNA = "MIMIC-CXR", "OpenI", "RSNA"
TRAINING_DATA = {
    "densenet121-res224-all": (_NIH, _PADCHEST, _CHEXPERT, _MIMIC, _OPEN_I, _RSNA),
    "densenet121-res224-chex": (_CHEXPERT,),
    "densenet121-res224-mimic_ch": (_MIMIC,),
    "densenet121-res224-mimic_nb": (_MIMIC,),
    "densenet121-res224-nih": (_NIH,),
    "densenet121-res224-pc": (_PADCHEST,),
    "densenet121-res224-rsna": (_RSNA,),
}

_SIZE, _WIDTH, _GRID = 224, 1024, (7, 7)
# The findings' classifier, and the thresholds that it is calibrated with.
_DROPPED = ("classifier.", "op_threshs")


class XrvPreprocessing:
    """What torchxrayvision does with an image: its own functions, called here.

    Args:
        xrv: The library.

    Attributes:
        size: Side of the square input, pixels.
        mean: Of the one channel, taken off the values 0..1: what its `normalize` amounts to.
        std: Of the one channel, divided by then; values become -1024 to 1024.
    """

    size = _SIZE
    mean = (0.5,)
    std = (1 / 2048,)

    def __init__(self, xrv: ModuleType) -> None:
        self._version, self._scale = xrv.__version__, xrv.utils.normalize
        self._crop, self._resize = xrv.datasets.XRayCenterCrop(), xrv.datasets.XRayResizer(_SIZE)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W] to float32 [1, 224, 224], -1024 for black to 1024 for white.

        Raises:
            InputError: Not a gray image of 8 bits.
        """
        return self.normalise(torch.from_numpy(self.square(pixels)))

    def square(self, pixels: np.ndarray) -> np.ndarray:
        """All there is to do, since torchxrayvision scales the values before it resizes.

        Raises:
            InputError: Not a gray image of 8 bits.
        """
        require_eight_bits(pixels)
        if pixels.ndim == 3:
            raise InputError("pixels are colour, allowed: gray. Convert the image first.")
        scaled = self._scale(pixels, 255, reshape=True)
        return self._resize(self._crop(scaled))

    def normalise(self, squares: Tensor) -> Tensor:
        """Nothing: `square` scaled them already."""
        return squares

    def description(self) -> dict[str, Any]:
        """What must be equal for inputs to be equal; can be written as JSON."""
        steps = ["normalize(255)", "XRayCenterCrop", f"XRayResizer({_SIZE})"]
        return {"torchxrayvision": self._version, "size": _SIZE, "steps": steps}


class XrvFeatures(nn.Module):
    """A DenseNet of torchxrayvision without its classifier.

    Args:
        features: Of its `DenseNet`: everything up to the last normalisation.
    """

    def __init__(self, features: nn.Module) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tokens:
        """[B, 1, 224, 224] of -1024..1024 to the mean [B, 1024] and patches [B, 49, 1024].

        The mean is torchxrayvision's `features2`, which its classifier is given: of the last
        feature map's values above 0. The patches are that map, so that the mean is theirs.
        """
        maps = F.relu(self.features(images))
        return Tokens(maps.mean(dim=(2, 3)), maps.flatten(2).transpose(1, 2))


def load_xrv(name: str) -> Encoder:
    """Make an encoder of torchxrayvision's, with weights from a file of tensors.

    torchxrayvision publishes whole pickled networks, which can run any code when they are opened.
    They are not opened here; a file that was converted is taken, from beside the published one.

    Args:
        name: `xrv:NAME`, such as `xrv:densenet121-res224-all`.

    Raises:
        InputError: torchxrayvision is not installed, does not know the name, or the weights are
            not on this machine, still pickled, or not exactly those of the network.
    """
    weights = name.removeprefix("xrv:")
    if weights not in TRAINING_DATA:
        raise InputError(f"encoder {name!r} is unknown. {nearest(weights, TRAINING_DATA)}")
    xrv = _library(name)
    file = _file(name, xrv, xrv.models.model_urls[weights]["weights_url"])
    model = XrvFeatures(xrv.models.DenseNet().features)
    load_exactly(model, kept(read_tensors(file), "", _DROPPED), file)
    return Encoder(
        name,
        model,
        XrvPreprocessing(xrv),
        width=_WIDTH,
        grid=_GRID,
        weights_sha256=sha256_of(file),
        training_data=TRAINING_DATA[weights],
    )


def _library(name: str) -> ModuleType:
    try:
        import torchxrayvision  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as cause:  # RuntimeError: torchvision of another build
        raise InputError(
            f"encoder {name!r} needs torchxrayvision, which cannot be imported ({cause}). Run pip "
            "install 'selfray[xrv]', with torchvision of the same build (CPU or CUDA) as torch."
        ) from None
    return torchxrayvision


def _file(name: str, xrv: ModuleType, url: str) -> Path:
    """The converted file where there is one, else the published one."""
    published = Path(xrv.utils.get_cache_dir(), url.rsplit("/", 1)[-1])
    converted = published.with_suffix(".safetensors")
    if converted.is_file():
        return converted
    if not published.is_file():
        address = url.removeprefix("https://")
        raise InputError(
            f"encoder {name!r}: {published} is not on this machine. Download it from {address}; "
            "what to do next is said when it is there."
        )
    return published
