"""The networks of a run before its first step, and where every tensor came from."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from selfray.config import ContrastiveConfig, PretrainConfig, RunConfig
from selfray.errors import InputError, nearest
from selfray.models.heads import DinoHead
from selfray.models.published import find_head, load_encoder
from selfray.models.text_encoder import TextEncoder
from selfray.models.vit import ARCHITECTURES, VisionTransformer, build_vit
from selfray.objectives.image_text import ImageText
from selfray.objectives.student_teacher import StudentTeacher

# Mean and standard deviation of 8-bit chest radiographs scaled to 0..1, from the published
# RAD-DINO preprocessor; used when there is no encoder to take them from.
RADIOGRAPH_MEAN, RADIOGRAPH_STD = 0.5307, 0.2583


def initialise(config: PretrainConfig) -> tuple[StudentTeacher, list[str], bool]:
    """Build student and teacher, from random weights or from an encoder.

    Args:
        config: The run. Its `init` names an encoder, or is empty.

    Returns:
        The networks; lines that say where the tensors came from; whether the DINO head is fresh
        although the encoder is not, so that it has to be warmed up.

    Raises:
        InputError: The encoder does not exist or does not fit the config, or a head's tensors
            are missing, unknown or of another shape.
    """
    encoder = _fresh_encoder(config)
    heads = {"dino_head": _fresh_head(config, encoder.width)}
    if config.heads.separate:
        heads["ibot_head"] = _fresh_head(config, encoder.width)
    mean, std, line = _begin_encoder(encoder, config)
    lines, fresh_head = [line], False
    if config.init:
        head_lines, fresh_head = _take_heads(heads, config)
        lines += head_lines
    else:
        lines += [f"{name}: {_count(h)} tensors from random weights" for name, h in heads.items()]
    lines.append("teacher: copy of the student")
    networks = StudentTeacher(
        encoder, heads["dino_head"], heads.get("ibot_head"),
        mean=mean, std=std, centering=config.loss.centering,
    )  # fmt: skip
    return networks, lines, fresh_head


class Begun(NamedTuple):
    """An image encoder before its first step.

    Attributes:
        encoder: The vision transformer.
        mean: Of its pixels, scaled to 0..1.
        std: Their standard deviation.
        origin: A line that says where its tensors came from.
    """

    encoder: VisionTransformer
    mean: float
    std: float
    origin: str


def initialise_encoder(config: RunConfig) -> Begun:
    """Build the image encoder alone, as `initialise` builds it.

    Raises:
        InputError: The encoder to continue from does not exist or does not fit the config.
    """
    encoder = _fresh_encoder(config)
    return Begun(encoder, *_begin_encoder(encoder, config))


def initialise_image_text(
    config: ContrastiveConfig, begun: Begun, text_encoder: TextEncoder
) -> tuple[ImageText, list[str]]:
    """Join both encoders by their projections.

    Args:
        config: The run.
        begun: Of `initialise_encoder`.
        text_encoder: Its weights are taken as they are.

    Returns:
        The networks, and lines that say where the tensors came from.
    """
    c = config.contrastive
    networks = ImageText(
        begun.encoder, text_encoder, mean=begun.mean, std=begun.std, embedding=c.embedding,
        loss=c.loss, scale=c.logit_scale, scale_largest=c.logit_scale_largest, bias=c.logit_bias,
    )  # fmt: skip
    source = config.text.model or "random weights"
    lines = [
        begun.origin,
        f"text encoder: {_count(text_encoder)} tensors from {source}",
        "projections: 2 tensors from random weights",
    ]
    return networks, lines


def _fresh_encoder(config: RunConfig) -> VisionTransformer:
    """The first that is drawn from the seed, so that runs of every kind begin with the same."""
    if config.encoder.arch not in ARCHITECTURES:
        allowed = nearest(config.encoder.arch, ARCHITECTURES)
        raise InputError(f"encoder.arch is {config.encoder.arch!r}. {allowed}")
    torch.manual_seed(config.seed)
    encoder = build_vit(
        config.encoder.arch,
        patch_size=config.encoder.patch_size,
        image_size=config.encoder.image_size,
        registers=config.encoder.registers,
        layerscale_init=config.encoder.layerscale_init,
        drop_path=config.encoder.drop_path,
        position_init=config.encoder.position_init,
    )
    encoder.activation_checkpointing = config.engine.activation_checkpointing
    return encoder


def _begin_encoder(encoder: VisionTransformer, config: RunConfig) -> tuple[float, float, str]:
    """Take the weights that the config names, if any; mean and standard deviation of pixels."""
    if config.init:
        source = load_encoder(config.init)
        return source.mean, source.std, _take_encoder(encoder, source.vit, config)
    line = f"encoder: {_count(encoder)} tensors from random weights, seed {config.seed}"
    return RADIOGRAPH_MEAN, RADIOGRAPH_STD, line


def _fresh_head(config: PretrainConfig, width: int) -> DinoHead:
    h = config.heads
    return DinoHead(
        width,
        prototypes=h.prototypes,
        hidden=h.hidden,
        bottleneck=h.bottleneck,
        layers=h.layers,
        batch_norm=h.batch_norm,
    )


def _take_encoder(encoder: VisionTransformer, source: VisionTransformer, config: RunConfig) -> str:
    """Copy an encoder's weights; position embeddings are resampled when the grid differs."""
    wanted, given = encoder.state_dict(), dict(source.state_dict())
    note = ""
    old, new = given["pos_embed"], wanted["pos_embed"]
    if old.shape[1] != new.shape[1] and old.shape[2] == new.shape[2]:
        # As the source's own interpolation has it, so that features begin where its were.
        side = round((new.shape[1] - 1) ** 0.5)
        given["pos_embed"] = source.positions(side, side)
        note = f"; pos_embed resampled from {old.shape[1] - 1} to {new.shape[1] - 1} patches"
    _require_match(wanted, given, f"encoder of {config.init}", "encoder")
    encoder.load_state_dict(given)
    encoder.position_interpolation = source.position_interpolation
    return f"encoder: {len(given)} of {len(wanted)} tensors from {config.init}{note}"


def _take_heads(heads: dict[str, DinoHead], config: PretrainConfig) -> tuple[list[str], bool]:
    lines, fresh = [], False
    for name, head in heads.items():
        file = find_head(config.init, name)
        if file is None:
            fresh = True
            lines.append(
                f"{name}: {_count(head)} tensors from random weights ({config.init} has none); "
                f"only heads are trained for {config.head_warmup} steps"
            )
            continue
        given = _load_head(file)
        _require_match(head.state_dict(), given, str(file), "heads")
        head.load_state_dict(given)
        lines.append(f"{name}: {len(given)} of {len(given)} tensors from {file}")
    return lines, fresh


def _load_head(file: Path) -> dict[str, Tensor]:
    try:
        return {name: tensor.float() for name, tensor in load_file(file).items()}
    except (OSError, SafetensorError) as cause:
        raise InputError(f"{file} cannot be read ({cause}). Restore it from a copy.") from cause


def _require_match(
    wanted: dict[str, Tensor], given: dict[str, Tensor], where: str, group: str
) -> None:
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    shapes = [
        f"{name} is {list(given[name].shape)}, the config asks for {list(wanted[name].shape)}"
        for name in wanted
        if name in given and wanted[name].shape != given[name].shape
    ]
    if missing or extra or shapes:
        found = [f"missing {_first(missing)}"] * bool(missing)
        found += [f"unexpected {_first(extra)}"] * bool(extra) + shapes[:3]
        raise InputError(
            f"{where} does not fit the config: {'; '.join(found)}. Set the fields of the config's "
            f"group {group!r} to those of the source (--{group}.…)."
        )


def _first(names: list[str]) -> str:
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} more" if more > 0 else "")


def _count(module: torch.nn.Module) -> int:
    return len(module.state_dict())
