"""Encoders of the library timm, by its names."""

from __future__ import annotations

import difflib
import math
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.encoder import Encoder, Tokens
from selfray.models.huggingface import WEIGHTS
from selfray.models.preprocessing import require_eight_bits
from selfray.models.weights_file import read_tensors, sha256_of

_SHOWN = 400  # characters of a complaint of timm's, which may hold hundreds of names


class TimmPreprocessing:
    """What timm does with an image for inference.

    Args:
        timm: The library.
        config: Of `timm.data.resolve_model_data_config`.

    Attributes:
        size: Side of the square input, pixels.
        mean: Of the three channels, taken off the values 0..1.
        std: Of the three channels, divided by then.
    """

    def __init__(self, timm: ModuleType, config: dict[str, Any]) -> None:
        self.size: int = config["input_size"][-1]
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        self._description = {**config, "mean": list(self.mean), "std": list(self.std)}
        self._description["input_size"] = list(config["input_size"])
        self._crop = timm.data.create_transform(**config, is_training=False, normalize=False)

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """uint8 [H, W] or [H, W, 3] to float32 [3, S, S].

        Raises:
            InputError: Not an image of 8 bits.
        """
        return self.normalise(torch.from_numpy(self.square(pixels)))

    def square(self, pixels: np.ndarray) -> np.ndarray:
        """Resize and crop by timm's transform: to uint8 [3, S, S].

        Raises:
            InputError: Not an image of 8 bits.
        """
        require_eight_bits(pixels)
        return self._crop(Image.fromarray(pixels).convert("RGB")).numpy()

    def normalise(self, squares: Tensor) -> Tensor:
        """From what `square` gives, [..., 3, S, S], to float32 of that shape."""
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=squares.device)[:, None, None]
            for values in (self.mean, self.std)
        )
        return (squares.float() / 255 - mean) / std

    def description(self) -> dict[str, Any]:
        """timm's own settings; can be written as JSON."""
        return self._description


class TimmFeatures(nn.Module):
    """A network of timm without its classifier.

    Args:
        model: Made by `timm.create_model`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tokens:
        """[B, 3, S, S] to what timm's classifier is given [B, D], and patches [B, h*w, D].

        The patches of a transformer are its tokens without the first, which stand for no patch;
        those of a convolutional network are the places of its last feature map.
        """
        features = self.model.forward_features(images)  # pyright: ignore[reportCallIssue]
        pooled = self.model.forward_head(  # pyright: ignore[reportCallIssue]
            features, pre_logits=True
        )
        if features.ndim == 3:
            return Tokens(pooled, features[:, getattr(self.model, "num_prefix_tokens", 0) :])
        if getattr(self.model, "output_fmt", "NCHW") == "NHWC":  # Swin and its kin
            return Tokens(pooled, features.flatten(1, 2))
        return Tokens(pooled, features.flatten(2).transpose(1, 2))


def load_timm(name: str) -> Encoder:
    """Make an encoder of timm's, with weights from the hub or from a file.

    Args:
        name: `timm:NAME`, whose weights are a safetensors file in Hugging Face's cache or on the
            hub; or `timm:NAME=FILE`, with weights in timm's names, with or without a classifier.

    Raises:
        InputError: timm is not installed, does not know the name, or the weights cannot be had or
            are not exactly those of the network.
    """
    timm = _library(name)
    model_name, _, given = name.removeprefix("timm:").partition("=")
    config = _known_config(timm, name, model_name)
    file = Path(given) if given else _from_hub(name, config)
    tensors = read_tensors(file)
    classes = _classes(config.classifier, tensors) if given else config.num_classes
    overlay = {"state_dict": tensors, "num_classes": classes}
    try:  # as many classes as in the file: with other numbers timm forgives missing parameters
        model = timm.create_model(
            model_name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay
        )
    except (RuntimeError, KeyError) as cause:
        said = textwrap.shorten(" ".join(str(cause).split()), _SHOWN)
        raise InputError(f"{file} does not fit {model_name}: {said}") from None
    settings = timm.data.resolve_model_data_config(model)
    del model.pretrained_cfg["state_dict"]  # a second copy of all weights
    channels, height, width = settings["input_size"]
    if channels != 3 or height != width:
        raise InputError(
            f"encoder {name!r} takes {channels} channels of {height} x {width} pixels, "
            "allowed: three, of a square. Give another name."
        )
    return _encoder(name, TimmFeatures(model), TimmPreprocessing(timm, settings), file)


def _encoder(
    name: str, model: TimmFeatures, preprocessing: TimmPreprocessing, file: Path
) -> Encoder:
    side = preprocessing.size
    with torch.no_grad():
        pooled, patches = model.eval()(torch.zeros(1, 3, side, side))
    if patches.shape[2] != pooled.shape[1]:
        raise InputError(
            f"encoder {name!r} has {pooled.shape[1]} values an image and {patches.shape[2]} a "
            "patch, allowed: as many. Give another name."
        )
    grid = math.isqrt(patches.shape[1])
    return Encoder(
        name,
        model,
        preprocessing,
        width=pooled.shape[1],
        grid=(grid, grid),
        weights_sha256=sha256_of(file),
    )


def _library(name: str) -> ModuleType:
    try:
        import timm  # pyright: ignore[reportMissingImports]
        import timm.data  # pyright: ignore[reportMissingImports]
    except (ImportError, RuntimeError) as cause:  # RuntimeError: torchvision of another build
        raise InputError(
            f"encoder {name!r} needs timm, which cannot be imported ({cause}). Run pip install "
            "'selfray[timm]', with torchvision of the same build (CPU or CUDA) as torch."
        ) from None
    return timm


def _known_config(timm: ModuleType, name: str, model_name: str) -> Any:
    """timm's record of a name: where its weights are, how many classes they tell apart."""
    architecture, _, tag = model_name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See timm.list_models()."
        raise InputError(f"encoder {name!r}: timm has no {architecture!r}. {hint}")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and model_name not in known:
        raise InputError(
            f"encoder {name!r}: timm has no weights {tag!r} of {architecture}. Allowed: "
            f"{', '.join(known) or 'none'}."
        )
    return timm.get_pretrained_cfg(model_name)


def _classes(classifiers: str | tuple[str, ...] | None, tensors: dict[str, Tensor]) -> int:
    """How many classes the classifier in a file tells apart; 0 where it has none."""
    first = classifiers if isinstance(classifiers, str) else (classifiers or ("",))[0]
    weight = tensors.get(f"{first}.weight")
    return 0 if weight is None else weight.shape[0]


def _from_hub(name: str, config: Any) -> Path:
    """The file of weights in Hugging Face's cache, or from the hub."""
    from huggingface_hub import hf_hub_download

    file = config.hf_hub_filename or WEIGHTS
    if not config.hf_hub_id or not file.endswith(".safetensors"):
        raise InputError(
            f"encoder {name!r}: there is no safetensors file of it on the hub. Give {name}=FILE, "
            "with its weights."
        )
    try:
        return Path(hf_hub_download(config.hf_hub_id, file, etag_timeout=5))
    except OSError as cause:  # no way to the hub, or refused there
        raise InputError(
            f"encoder {name!r} is not on this machine and cannot be had from the hub "
            f"({type(cause).__name__}). Download {file} from huggingface.co/{config.hf_hub_id} on "
            f"another machine, and give {name}=FILE, with the path of that file here."
        ) from None
