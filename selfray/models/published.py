"""An encoder by name or directory, with the preprocessing that it was made for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import torch

from selfray.errors import InputError, nearest
from selfray.models.encoder import Encoder, vit_encoder
from selfray.models.encoder_directory import DESCRIPTION
from selfray.models.huggingface import (
    PICKLED_WEIGHTS,
    WEIGHTS,
    is_dinov2,
    read_json,
    read_model,
    read_preprocessing,
)
from selfray.models.preprocessing import Preprocessing
from selfray.models.vit import PositionInterpolation, build_vit
from selfray.models.weights_file import name_of_tensors, sha256_of

SHIPPED = Path(__file__).parent.parent / "weights"
"""Encoders within the package: selfray/NAME is the directory NAME here."""
ENCODERS_VARIABLE = "SELFRAY_ENCODERS"
"""Environment variable with a folder of encoders: PUBLISHER/NAME is looked for there first."""

# Chest radiographs scaled to 0..1, from the published RAD-DINO preprocessor.
_RADIOGRAPH_MEAN, _RADIOGRAPH_STD = 0.5307, 0.2583
_RANDOM_NAME = re.compile(r"random:(?P<arch>\w+)(?:/(?P<patch>\d{1,9})(?:@(?P<size>\d{1,9}))?)?")
# Largest patch, image and patches a side of random encoders: beyond, memory ends. [ours]
_RANDOM_MOST = (64, 4096, 512)
_FILES = ("config.json", "preprocessor_config.json", WEIGHTS)
_HEAD = "dino_head.safetensors"


@dataclass(frozen=True)
class PublishedEncoder:
    """A row of the table: what is known of an encoder before any of its files is here.

    Attributes:
        name: For `load_encoder`.
        publisher: Who made it.
        licence: Of the weights.
        input_size: Side of the square input, pixels.
        width: Length of a feature vector.
        grid: Rows and columns of patch tokens.
        preprocessing: In words.
        files: In the encoder's directory.
        home: Where they can be downloaded.
        training_data: Datasets known to be in its training, by their common names.
        optional_files: May be there too.
        available: Whether the files are on this machine.
    """

    name: str
    publisher: str
    licence: str
    input_size: int
    width: int
    grid: tuple[int, int]
    preprocessing: str
    files: tuple[str, ...]
    home: str
    training_data: tuple[str, ...] = ()
    optional_files: tuple[str, ...] = ()
    available: bool = False


_RAD_DINO_DATA = ("MIMIC-CXR", "CheXpert", "NIH ChestX-ray14", "PadChest", "BRAX")


def _hub(
    name: str, publisher: str, licence: str, size: int, width: int, patch: int, preprocessing: str,
    **more: Any,
) -> PublishedEncoder:  # fmt: skip
    """A row whose files lie on the Hugging Face hub in transformers' layout."""
    grid = (size // patch, size // patch)
    row = PublishedEncoder(
        name, publisher, licence, size, width, grid, preprocessing, _FILES, f"huggingface.co/{name}"
    )
    return replace(row, **more)


def _published() -> Iterator[PublishedEncoder]:
    """What others publish, as if nothing were on this machine yet."""
    microsoft, meta = "Microsoft Health Futures", "Meta AI"
    rad_dino = "shorter side 518, bicubic; crop 518"
    yield _hub(
        "microsoft/rad-dino", microsoft, "MIT", 518, 768, 14, rad_dino,
        training_data=_RAD_DINO_DATA, optional_files=(_HEAD,),
    )  # fmt: skip
    yield _hub(
        "microsoft/rad-dino-maira-2", microsoft, "MSRLA (research only)", 518, 768, 14, rad_dino,
        training_data=_RAD_DINO_DATA,
    )  # fmt: skip
    for kind in ("dinov2", "dinov2-with-registers"):
        for size, width in (("small", 384), ("base", 768), ("large", 1024), ("giant", 1536)):
            yield _hub(
                f"facebook/{kind}-{size}", meta, "Apache-2.0", 224, width, 14,
                "shorter side 256, bicubic; crop 224",
            )  # fmt: skip
    yield _hub(
        "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", "Microsoft Research", "MIT",
        224, 768, 16, "shorter side 224, bicubic; crop 224", training_data=("PMC-15M",),
        files=("open_clip_config.json", "open_clip_pytorch_model.bin"),
    )  # fmt: skip
    yield _hub(
        "microsoft/BiomedVLP-BioViL-T", microsoft, "MIT", 448, 512, 32,
        "shorter side 512, bilinear; crop 448; not normalised", training_data=("MIMIC-CXR",),
        files=("biovil_t_image_model_proj_size_128.pt",),
    )  # fmt: skip
    yield _hub(
        "RL4M/MRM", "Zhou et al., ICLR 2023", "MIT", 224, 768, 16,
        "shorter side 224, bilinear; crop 224", training_data=("MIMIC-CXR",), files=("MRM.pth",),
        home="github.com/RL4M/MRM-pytorch",
    )  # fmt: skip
    yield from _published_for_transformers()


def _published_for_transformers() -> Iterator[PublishedEncoder]:
    """What the transformers library builds, from the model cards and papers of the publishers.

    Where OpenAI and Google put both files into a repository, or only the older, its name stands
    here; the newer takes its place. DINOv3 is given out to those who accept its licence on the
    hub, logged in.
    """
    older = {"files": (*_FILES[:2], PICKLED_WEIGHTS)}
    for name, size, width, patch, files in (
        ("base-patch32", 224, 768, 32, older),
        ("base-patch16", 224, 768, 16, older),
        ("large-patch14", 224, 1024, 14, {}),
        ("large-patch14-336", 336, 1024, 14, older),
    ):
        yield _hub(
            f"openai/clip-vit-{name}", "OpenAI", "MIT", size, width, patch,
            f"shorter side {size}, bicubic; crop {size}", training_data=("WIT-400M (private)",),
            **files,
        )  # fmt: skip
    for name, size, width, patch in (
        ("base-patch16-224", 224, 768, 16), ("so400m-patch14-384", 384, 1152, 14),
    ):  # fmt: skip
        for kind, kernel in (("siglip", "bicubic"), ("siglip2", "bilinear")):
            yield _hub(
                f"google/{kind}-{name}", "Google", "Apache-2.0", size, width, patch,
                f"both sides {size}, {kernel}", training_data=("WebLI (private)",),
            )  # fmt: skip
    for name, width in (("vits16", 384), ("vitb16", 768), ("vitl16", 1024)):
        yield _hub(
            f"facebook/dinov3-{name}-pretrain-lvd1689m", "Meta AI",
            "DINOv3 License (accept it on the hub)", 224, width, 16,
            "both sides 224, bilinear, not rounded", training_data=("LVD-1689M (private)",),
        )  # fmt: skip
    yield _hub(
        "google/vit-base-patch16-224-in21k", "Google", "Apache-2.0", 224, 768, 16,
        "both sides 224, bilinear", training_data=("ImageNet-21k",), **older,
    )  # fmt: skip


PUBLISHED = {row.name: row for row in _published()}

_FORMATS = (
    # File that only this format has, and the function that reads its directory.
    ("open_clip_config.json", "selfray.models.open_clip_encoder", "read_open_clip"),
    ("biovil_t_image_model_proj_size_128.*", "selfray.models.biovil_t", "read_biovil_t"),
    ("MRM.*", "selfray.models.mrm", "read_mrm"),
    ("dinov2_vit*.*", "selfray.models.original_dinov2", "read_original"),
)
_LIBRARIES = {
    "timm": ("selfray.models.timm_encoder", "load_timm"),
    "xrv": ("selfray.models.xrv_encoder", "load_xrv"),
}


def load_encoder(name: str | os.PathLike[str]) -> Encoder:
    """Find an encoder and load it.

    Args:
        name: A directory in Hugging Face's layout or a publisher's; a publisher's file of weights
            that says by its name what it is; a run directory;
            `selfray/NAME`, shipped with the package; a published name, see `list_encoders`;
            `timm:NAME` or `xrv:NAME` of these libraries; or `random:ARCH[/PATCH[@SIZE]]`, always
            the same random weights, patch 14 and size 224 by default.

    Returns:
        The encoder on the CPU, float32.

    Raises:
        InputError: There is no such encoder on this machine, or its files are not whole.
    """
    name = os.fspath(name)
    library = name.partition(":")[0]
    if library == "random":
        return _random_encoder(name)
    if library in _LIBRARIES:
        module, function = _LIBRARIES[library]
        return getattr(import_module(module), function)(name)
    directory = find_directory(name)
    encoder = _read_directory(name, directory)
    if not encoder.training_data:
        encoder.training_data = _training_data(name)
    return encoder


def _training_data(name: str) -> tuple[str, ...]:
    """Of a published name, or of a folder that is named as one."""
    last = Path(name).resolve().name if Path(name).exists() else ""
    rows = [row for row in PUBLISHED.values() if row.name == name or Path(row.name).name == last]
    return rows[0].training_data if rows else ()


def _read_directory(name: str, directory: Path) -> Encoder:
    found = [
        (marker, module, function)
        for marker, module, function in _FORMATS
        if (directory.match(marker) if directory.is_file() else any(directory.glob(marker)))
    ]
    if len(found) > 1:
        raise InputError(
            f"{directory} has files of several encoders, {' and '.join(m for m, *_ in found)}. "
            "Put each into a folder of its own."
        )
    if found:
        _, module, function = found[0]
        return getattr(import_module(module), function)(name, directory)
    if not is_dinov2(read_json(directory / "config.json")):
        module = import_module("selfray.models.transformers_encoder")
        return module.read_transformers(name, directory)
    model, weights = read_model(directory)
    description = _description(directory)
    if "position_interpolation" in description:
        model.position_interpolation = description["position_interpolation"]
    preprocessing = read_preprocessing(directory)
    try:
        return vit_encoder(
            name,
            model,
            preprocessing,
            weights_sha256=sha256_of(weights),
            synthetic=bool(description.get("synthetic")),
        )
    except InputError as cause:
        raise InputError(f"{directory}: {cause}") from None


def find_head(name: str, head: str = "dino_head") -> Path | None:
    """The file with an encoder's projection head, or None where it has none.

    Args:
        name: As for `load_encoder`.
        head: `dino_head` or `ibot_head`.

    Raises:
        InputError: There is no such encoder on this machine.
    """
    if ":" in name and not Path(name).is_dir():
        return None
    file = find_directory(name, (f"{head}.safetensors",)) / f"{head}.safetensors"
    return file if file.is_file() else None


def recorded_card(name: str) -> dict[str, Any]:
    """What `save_encoder` noted of an encoder's data, recipe and results; nothing of others'.

    Args:
        name: As for `load_encoder`.

    Raises:
        InputError: There is no such encoder on this machine.
    """
    if ":" in name and not Path(name).is_dir():
        return {}
    return _description(find_directory(name))


def list_encoders() -> list[PublishedEncoder]:
    """Encoders that have a name: those shipped with the package, then the published ones."""
    shipped = [_shipped_row(directory) for directory in _shipped()]
    return shipped + [
        replace(row, available=_cached(row.name, row.files) is not None)
        for row in PUBLISHED.values()
    ]


def _shipped() -> list[Path]:
    return sorted(file.parent for file in SHIPPED.glob("*/config.json"))


def _shipped_row(directory: Path) -> PublishedEncoder:
    config, preprocessing = read_json(directory / "config.json"), read_preprocessing(directory)
    side = preprocessing.size // config["patch_size"]
    return PublishedEncoder(
        f"selfray/{directory.name}",
        "selfray",
        _description(directory).get("licence") or "not given",
        preprocessing.size,
        config["hidden_size"],
        (side, side),
        f"shorter side {preprocessing.shortest_edge}, bicubic; crop {preprocessing.size}",
        tuple(sorted(file.name for file in directory.iterdir())),
        "within the package",
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
    mean, std = (_RADIOGRAPH_MEAN,) * 3, (_RADIOGRAPH_STD,) * 3
    return vit_encoder(name, model, Preprocessing(image_size, mean, std, image_size))


def find_directory(name: str, also: tuple[str, ...] = ()) -> Path:
    """Where an encoder's files are, or its only file.

    Args:
        name: A directory, a publisher's file, a run directory, a shipped or a published name.
        also: Files that a publisher may have besides those needed.

    Raises:
        InputError: It is not on this machine and cannot be had; the message says which files to
            put where.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "checkpoints").is_dir() and not (path / "encoder").is_dir():
            raise InputError(
                f"{path} is a run without an encoder yet. Finish it with the same pretrain command."
            )
        return path / "encoder" if (path / "encoder").is_dir() else path
    if path.is_file():
        return path
    if name in PUBLISHED:
        row = PUBLISHED[name]
        wanted = [*row.files, *(file for file in row.optional_files if file in also)]
        return _cached(name, wanted) or _downloaded(row, wanted)
    if name.startswith("selfray/") and (SHIPPED / path.name) in _shipped():
        return SHIPPED / path.name
    known = [*PUBLISHED, *(f"selfray/{directory.name}" for directory in _shipped())]
    raise InputError(f"encoder {name!r} is no directory and no known name. {nearest(name, known)}")


def _cached(name: str, files: Sequence[str]) -> Path | None:
    """The folder with a published encoder's files on this machine, if they are all there."""
    from huggingface_hub import try_to_load_from_cache

    for wanted in (files, [name_of_tensors(file) for file in files]):
        if os.environ.get(ENCODERS_VARIABLE):
            folder = Path(os.environ[ENCODERS_VARIABLE]) / name
            if all((folder / file).is_file() for file in wanted):
                return folder
        found = [try_to_load_from_cache(name, file) for file in wanted]
        if all(isinstance(file, str) for file in found):
            return Path(str(found[0])).parent
    return None


def _downloaded(row: PublishedEncoder, files: Sequence[str]) -> Path:
    """The files of a published encoder from the hub."""
    from huggingface_hub import snapshot_download

    reason = "it is not published there"
    if row.home == f"huggingface.co/{row.name}":
        try:
            folder = Path(snapshot_download(row.name, allow_patterns=list(files), etag_timeout=5))
            if all((folder / file).is_file() for file in files):
                return folder
            reason = "files are missing there"
        except OSError as cause:  # no way to the hub, or refused there
            reason = type(cause).__name__
    raise InputError(
        f"encoder {row.name} is not on this machine and cannot be had from the hub ({reason}). "
        f"Download {', '.join(files)} from {row.home} on another machine into one folder, and "
        f"give that folder as the encoder; or put it at ${ENCODERS_VARIABLE}/{row.name}."
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
