"""An encoder by name or directory, with the preprocessing that it was made for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfray.errors import InputError, nearest
from selfray.models.encoder_directory import DESCRIPTION, save_encoder
from selfray.models.huggingface import WEIGHTS, read_json, read_model, read_preprocessing
from selfray.models.vit import PositionInterpolation, VisionTransformer, build_vit

__all__ = [
    "Encoder",
    "EncoderListing",
    "find_head",
    "list_encoders",
    "load_encoder",
    "save_encoder",
]

SHIPPED = Path(__file__).parent.parent / "weights"
"""Encoders within the package: selfray/NAME is the directory NAME here."""

# Chest radiographs scaled to 0..1, from the published RAD-DINO preprocessor.
_RADIOGRAPH_MEAN, _RADIOGRAPH_STD = 0.5307, 0.2583
_RANDOM_NAME = re.compile(r"random:(?P<arch>\w+)(?:/(?P<patch>\d{1,9})(?:@(?P<size>\d{1,9}))?)?")
# Largest patch, image and patches a side of random encoders: beyond, memory ends. [ours]
_RANDOM_MOST = (64, 4096, 512)
_FILES = ("config.json", "preprocessor_config.json", WEIGHTS)
_HEAD = "dino_head.safetensors"


@dataclass(frozen=True)
class EncoderListing:
    """A line of `selfray encoders`.

    Attributes:
        name: For `load_encoder`.
        publisher: Who made it.
        licence: Of the weights.
        input_size: Side of the square input, pixels.
        width: Length of a feature vector.
        files_expected: In the encoder's directory.
        available: Whether these files are on this machine.
    """

    name: str
    publisher: str
    licence: str
    input_size: int
    width: int
    files_expected: tuple[str, ...]
    available: bool


def _published() -> Iterator[EncoderListing]:
    """What others publish, as if nothing were on this machine yet."""
    microsoft = "Microsoft Health Futures"
    yield EncoderListing("microsoft/rad-dino", microsoft, "MIT", 518, 768, (*_FILES, _HEAD), False)
    yield EncoderListing(
        "microsoft/rad-dino-maira-2", microsoft, "MSRLA (research only)", 518, 768, _FILES, False
    )
    for kind in ("dinov2", "dinov2-with-registers"):
        for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)):
            name = f"facebook/{kind}-{size}"
            yield EncoderListing(name, "Meta AI", "Apache-2.0", 224, width, _FILES, False)


PUBLISHED = {listing.name: listing for listing in _published()}


class Encoder:
    """A vision transformer together with its own preprocessing.

    Args:
        name: Where it came from.
        model: Put in evaluation mode here.
        mean: Mean of the pixels, scale 0..1, of all channels or of each of three.
        std: Standard deviation, likewise.
        image_size: Side of the square input, pixels; by default that of the model.
        shortest_edge: Shorter side before the central crop, pixels; by default `image_size`.
        weights_sha256: Of the weights' file; by default of the parameters.
        synthetic: Whether it was trained on phantoms.

    Attributes:
        mean: Averaged over the channels: what one-channel training goes on with.
        std: Likewise.
    """

    def __init__(
        self,
        name: str,
        model: VisionTransformer,
        *,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        image_size: int | None = None,
        shortest_edge: int | None = None,
        weights_sha256: str | None = None,
        synthetic: bool = False,
    ) -> None:
        self.name, self.model, self.synthetic = name, model.eval(), synthetic
        self.width, self.patch_size = model.width, model.patch_size
        self.image_size = image_size or model.image_size
        self.shortest_edge = shortest_edge or self.image_size
        means, stds = np.broadcast_to(mean, 3), np.broadcast_to(std, 3)
        self.mean, self.std = float(means.mean()), float(stds.mean())
        # What each of the 256 gray values becomes: exact, and faster than arithmetic on pixels.
        gray = np.arange(256) / 255
        self._normalised = torch.from_numpy(
            ((gray - means[:, None]) / stds[:, None]).astype(np.float32)
        )
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

    def preprocess(self, pixels: np.ndarray) -> Tensor:
        """Make an image fit, as transformers' slow `BitImageProcessor` does.

        Args:
            pixels: Gray uint8 [H, W].

        Returns:
            Float32 [3, S, S]: the shorter side resized, bicubic; the centre; normalised.

        Raises:
            InputError: Not 8-bit gray.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 2 or not pixels.size:
            raise InputError(
                f"pixels are {pixels.dtype} {list(pixels.shape)}, allowed: uint8 [H, W]. "
                "Ingest the image first."
            )
        short = min(pixels.shape)
        height, width = (int(self.shortest_edge * side / short) for side in pixels.shape)
        image = Image.fromarray(pixels)
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - self.image_size) // 2, (width - self.image_size) // 2
        square = np.asarray(image)[top : top + self.image_size, left : left + self.image_size]
        return self._normalised[:, torch.from_numpy(square.astype(np.int64))]

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode preprocessed images.

        Args:
            images: [B, 3, H, W].

        Returns:
            CLS [B, D] and patches [B, D, h, w], after the final LayerNorm.
        """
        output = self.model(images)
        rows = images.shape[-2] // self.patch_size
        return output.cls, output.patches.transpose(1, 2).unflatten(2, (rows, -1))

    @torch.no_grad()
    def attention(self, images: Tensor) -> Tensor:
        """How much CLS looks at each patch in the last block: [B, heads, h*w].

        Args:
            images: [B, 3, H, W], preprocessed.
        """
        return self.model.cls_attention(images)


def load_encoder(name: str) -> Encoder:
    """Find an encoder and load it.

    Args:
        name: A directory in Hugging Face's layout; a run directory; `selfray/NAME`, shipped with
            the package; a published name, see `list_encoders`; or `random:ARCH[/PATCH[@SIZE]]`,
            always the same random weights, patch 14 and size 224 by default.

    Returns:
        The encoder on the CPU, float32.

    Raises:
        InputError: There is no such encoder on this machine, or its files are not whole.
    """
    if name.startswith("random:"):
        return _random_encoder(name)
    directory = _directory(name)
    model, weights = read_model(directory)
    shortest_edge, crop, mean, std = read_preprocessing(directory)
    if crop % model.patch_size:
        raise InputError(
            f"{directory}: crop_size is {crop}, not a multiple of patch_size {model.patch_size}. "
            "Take preprocessor_config.json and config.json from the same model."
        )
    description = _description(directory)
    if "position_interpolation" in description:
        model.position_interpolation = description["position_interpolation"]
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Encoder(
        name,
        model,
        mean=mean,
        std=std,
        image_size=crop,
        shortest_edge=shortest_edge,
        weights_sha256=digest,
        synthetic=bool(description.get("synthetic")),
    )


def find_head(name: str, head: str = "dino_head") -> Path | None:
    """The file with an encoder's projection head, or None where it has none.

    Args:
        name: As for `load_encoder`.
        head: `dino_head` or `ibot_head`.

    Raises:
        InputError: There is no such encoder on this machine.
    """
    if name.startswith("random:"):
        return None
    file = _directory(name, (f"{head}.safetensors",)) / f"{head}.safetensors"
    return file if file.is_file() else None


def list_encoders() -> list[EncoderListing]:
    """Encoders that have a name: those shipped with the package, then the published ones."""
    from huggingface_hub import try_to_load_from_cache

    listings = [_shipped_listing(directory) for directory in _shipped()]
    for listing in PUBLISHED.values():
        found = [try_to_load_from_cache(listing.name, file) for file in _FILES]
        available = all(isinstance(path, str) for path in found)
        listings.append(EncoderListing(**{**vars(listing), "available": available}))
    return listings


def _shipped() -> list[Path]:
    return sorted(file.parent for file in SHIPPED.glob("*/config.json"))


def _shipped_listing(directory: Path) -> EncoderListing:
    return EncoderListing(
        f"selfray/{directory.name}",
        "selfray",
        _description(directory).get("licence") or "not given",
        read_preprocessing(directory).crop,
        read_json(directory / "config.json")["hidden_size"],
        tuple(sorted(file.name for file in directory.iterdir())),
        available=True,
    )


def _random_encoder(name: str) -> Encoder:
    match = _RANDOM_NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"encoder {name!r}: the form is random:ARCH[/PATCH[@SIZE]]. "
            "Write for example random:vit_small/14@224."
        )
    patch_size, image_size = int(match["patch"] or 14), int(match["size"] or 224)
    patch_most, size_most, grid_most = _RANDOM_MOST
    if not 1 <= patch_size <= patch_most:
        raise InputError(f"encoder {name!r}: PATCH is {patch_size}. Use 1 to {patch_most}.")
    if image_size > (largest := min(size_most, grid_most * patch_size)):
        raise InputError(f"encoder {name!r}: SIZE is {image_size}. Use {largest} at most.")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        # LayerScale 1, because with DINOv2's 1e-5 an untrained encoder is its patch embedding.
        model = build_vit(
            match["arch"], patch_size=patch_size, image_size=image_size, layerscale_init=1.0
        )
    return Encoder(name, model, mean=_RADIOGRAPH_MEAN, std=_RADIOGRAPH_STD)


def _directory(name: str, also: tuple[str, ...] = ()) -> Path:
    """Where an encoder's files are; `also` names further files that a publisher may have."""
    path = Path(name)
    if path.is_dir():
        if (path / "checkpoints").is_dir() and not (path / "encoder").is_dir():
            raise InputError(
                f"{path} is a run without an encoder yet. Finish it with the same pretrain command."
            )
        return path / "encoder" if (path / "encoder").is_dir() else path
    if name in PUBLISHED:
        offered = PUBLISHED[name].files_expected
        return _snapshot(name, tuple(file for file in offered if file in (*_FILES, *also)))
    if name.startswith("selfray/") and (SHIPPED / path.name) in _shipped():
        return SHIPPED / path.name
    known = [*PUBLISHED, *(f"selfray/{directory.name}" for directory in _shipped())]
    raise InputError(f"encoder {name!r} is no directory and no known name. {nearest(name, known)}")


def _snapshot(name: str, files: tuple[str, ...]) -> Path:
    """The files of a published encoder: from Hugging Face's cache, else from the hub."""
    from huggingface_hub import snapshot_download

    reason = "files are missing there"
    for cached_only in (True, False):
        try:
            folder = Path(
                snapshot_download(
                    name,
                    allow_patterns=list(files),
                    local_files_only=cached_only,
                    etag_timeout=5,
                )
            )
        except OSError as cause:  # not in the cache, no way to the hub, refused there
            reason = type(cause).__name__
            continue
        if all((folder / file).is_file() for file in files):
            return folder
    raise InputError(
        f"encoder {name} is not in Hugging Face's cache and cannot be had from the hub ({reason}). "
        f"Download {', '.join(files)} from huggingface.co/{name} on another machine into one "
        "folder, and give that folder as the encoder."
    )


def _description(directory: Path) -> dict[str, Any]:
    """What `save_encoder` noted beside Hugging Face's files; nothing in others' directories."""
    file = directory / DESCRIPTION
    if not file.is_file():
        return {}
    description = read_json(file)
    kind = description.get("position_interpolation", "bicubic")
    if kind not in get_args(PositionInterpolation):
        raise InputError(
            f"{file}: position_interpolation is {kind!r}, allowed: "
            f"{', '.join(get_args(PositionInterpolation))}. Copy the file anew."
        )
    return description
