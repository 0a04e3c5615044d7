"""One frozen dataclass is a pre-training run; its JSON form is `RUN/config.json`.

`PretrainConfig` is a run on images alone, `ContrastiveConfig` one with reports; what both have is
`RunConfig`. Defaults are those of the published RAD-DINO recipe. The origin of a number stands
beside it: [card] the published model card or files, [derived] a work that derives from it,
[dinov2] the default of the DINOv2 release, which RAD-DINO is believed to keep, [clip] and [siglip]
the papers of that name, [ours] chosen here, for want of a published number.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selfray.errors import InputError, nearest

Pair = tuple[float, float]


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EncoderConfig:
    """The vision transformer."""

    arch: str = _setting("vit_base", "size of the transformer")  # [card]
    patch_size: int = _setting(14, "side of a patch, pixels")  # [card]
    image_size: int = _setting(
        518, "side of the input at which features are taken, pixels"
    )  # [card]
    registers: int = _setting(0, "number of register tokens")  # [card]
    layerscale_init: float = _setting(1e-5, "initial LayerScale")  # [dinov2]
    position_init: Literal["random", "sincos"] = _setting(
        "random", "how position embeddings begin"
    )  # [dinov2]
    drop_path: float = _setting(0.3, "share of the batch that skips a residual branch")  # [dinov2]


@dataclass(frozen=True)
class GlobalCropConfig:
    """What every kind of run knows of a global crop."""

    global_size: int = _setting(518, "side of a global crop, pixels")  # [derived]
    global_scale: Pair = _setting(
        (0.5, 1.0), "area of a global crop, share of the image"
    )  # [derived]
    aspect: Pair = _setting(
        (3 / 4, 4 / 3), "width over height of a crop before resizing"
    )  # [dinov2]
    flip: float = _setting(0.5, "probability of a horizontal flip")  # [derived]
    jitter: float = _setting(0.8, "probability of a change of brightness and contrast")  # [derived]
    brightness: float = _setting(0.4, "brightness factor is drawn from 1 ± this")  # [derived]
    contrast: float = _setting(0.4, "contrast factor is drawn from 1 ± this")  # [derived]
    blur_sigma: Pair = _setting((0.1, 2.0), "standard deviation of the blur, pixels")  # [dinov2]


@dataclass(frozen=True)
class CropsConfig(GlobalCropConfig):
    """Multi-crop augmentation."""

    local_size: int = _setting(196, "side of a local crop, pixels")  # [derived]
    local_scale: Pair = _setting(
        (0.2, 0.5), "area of a local crop, share of the image"
    )  # [derived]
    local_count: int = _setting(8, "local crops an image")  # [derived]
    # [dinov2] It writes 1.0, 0.1 and 0.5, but applies 1 minus that: these are what it applies.
    blur_global_first: float = _setting(0.0, "probability of blur, first global crop")
    blur_global_second: float = _setting(0.9, "probability of blur, second global crop")
    blur_local: float = _setting(0.5, "probability of blur, local crops")


@dataclass(frozen=True)
class OneCropConfig(GlobalCropConfig):
    """One crop an image: the first global crop of multi-crop augmentation."""

    # A mirrored image contradicts every "left" and "right" of its report.
    flip: float = _setting(0.0, "probability of a horizontal flip")  # [ours]
    blur: float = _setting(0.0, "probability of blur")  # [dinov2] of its first global crop


@dataclass(frozen=True)
class MasksConfig:
    """Block masks for masked image modelling."""

    probability: float = _setting(0.5, "share of global crops that are masked")  # [dinov2]
    ratio: Pair = _setting((0.1, 0.5), "masked share of a masked crop's patches")  # [dinov2]


@dataclass(frozen=True)
class HeadsConfig:
    """Projection heads."""

    prototypes: int = _setting(65_536, "width of the head's output")  # [card]
    hidden: int = _setting(2048, "width of the hidden layers")  # [card]
    bottleneck: int = _setting(256, "width before the prototypes")  # [card]
    layers: int = _setting(3, "linear layers before the prototypes")  # [card]
    batch_norm: bool = _setting(False, "normalise hidden layers over the batch")  # [dinov2]
    separate: bool = _setting(False, "a second head for iBOT")  # [dinov2] shared


@dataclass(frozen=True)
class LossConfig:
    """Objectives."""

    dino_weight: float = _setting(1.0, "weight of the DINO loss")  # [dinov2]
    ibot_weight: float = _setting(1.0, "weight of the iBOT loss")  # [dinov2]
    koleo_weight: float = _setting(0.1, "weight of the KoLeo loss")  # [derived]
    student_temperature: float = _setting(0.1, "temperature of the student")  # [derived]
    teacher_temperature: Pair = _setting(
        (0.04, 0.07), "teacher temperature, first and last"
    )  # [derived]
    teacher_temperature_warmup: float = _setting(
        0.5, "share of the steps from the first to the last teacher temperature"
    )  # [derived]
    centering: Literal["centering", "sinkhorn"] = _setting(
        "centering", "how teacher targets are balanced"
    )  # [dinov2]


@dataclass(frozen=True)
class AdamWConfig:
    """AdamW and its schedules."""

    learning_rate: float = _setting(
        1e-3, "peak at a batch size of 1024; scaled by sqrt(batch size / 1024)"
    )  # [derived]
    learning_rate_end: float = _setting(1e-6, "learning rate at the last step")  # [derived]
    warmup: float = _setting(0.05, "share of the steps for linear warm-up")  # [derived]
    weight_decay: Pair = _setting((0.04, 0.4), "weight decay, first and last")  # [derived]
    layer_decay: float = _setting(
        0.9, "learning-rate factor from a block to the one below"
    )  # [derived]
    patch_embed_factor: float = _setting(
        0.2, "learning-rate factor of the patch embedding"
    )  # [derived]
    beta1: float = _setting(0.9, "AdamW beta 1")  # [dinov2]
    beta2: float = _setting(0.999, "AdamW beta 2")  # [dinov2]
    gradient_clip: float = _setting(
        3.0, "largest gradient norm, each submodule on its own"
    )  # [derived]


@dataclass(frozen=True)
class OptimizerConfig(AdamWConfig):
    """AdamW and its schedules."""

    freeze_last_layer: float = _setting(
        0.01, "share of the steps for which the prototypes stay as they are"
    )  # [derived]


@dataclass(frozen=True)
class TeacherConfig:
    """Exponential moving average."""

    momentum: Pair = _setting((0.992, 1.0), "teacher momentum, first and last")  # [derived]


@dataclass(frozen=True)
class EngineConfig:
    """How it is computed."""

    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "of matrix products; auto takes bfloat16 where the hardware has it"
    )
    accumulate: int = _setting(
        1,
        "parts into which a batch is cut to save memory; KoLeo and batch norm then see a part, all "
        "else the whole batch",
    )
    activation_checkpointing: bool = _setting(False, "recompute activations to save memory")
    loader_threads: int = _setting(2, "threads that make crops, each process")
    tensorboard: bool = _setting(False, "also write TensorBoard events")


@dataclass(frozen=True)
class RunConfig:
    """What every kind of pre-training run has."""

    recipe: str = _setting("base-518", "name of the recipe that this run began with")
    steps: int = _setting(100_000, "optimizer steps")  # [card]
    batch_size: int = _setting(2560, "images a step, over all ranks")  # [card]
    seed: int = _setting(0, "seed of everything random")
    checkpoint_every: int = _setting(1000, "steps between checkpoints")  # [ours]
    keep_checkpoints: int = _setting(3, "newest checkpoints kept, beside the best")  # [ours]
    evaluate_every: int = _setting(0, "steps between probes; 0: none")
    evaluate_images: int = _setting(2000, "images of each split in a probe, at most")  # [ours]
    data: tuple[str, ...] = _setting((), "dataset directories")
    init: str = _setting("", "encoder to continue from; empty: from random weights")
    guard: float = _setting(
        0.0, "stop when the probe's macro-AUROC falls this far below the start; 0: never"
    )
    encoder: EncoderConfig = EncoderConfig()
    crops: GlobalCropConfig = GlobalCropConfig()
    optimizer: AdamWConfig = AdamWConfig()
    engine: EngineConfig = EngineConfig()

    @property
    def peak_learning_rate(self) -> float:
        """The peak after scaling by sqrt(batch size / 1024)."""
        return self.optimizer.learning_rate * math.sqrt(self.batch_size / 1024)


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """A pre-training run on images alone."""

    head_warmup: int = _setting(
        500, "steps for which only a fresh head is trained, when init comes without one"
    )  # [ours]
    crops: CropsConfig = CropsConfig()
    masks: MasksConfig = MasksConfig()
    heads: HeadsConfig = HeadsConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    teacher: TeacherConfig = TeacherConfig()


@dataclass(frozen=True)
class TextConfig:
    """The reports and their encoder."""

    model: str = _setting(
        "", "Hugging Face directory of a text model; empty: a small one from random weights"
    )
    sentences: int = _setting(
        3, "sentences drawn from findings and impression a step; 0: all of them"
    )  # [ours]
    max_tokens: int = _setting(
        77, "longest text, tokens; a longer one is cut at a sentence"
    )  # [clip]
    vocabulary: int = _setting(
        8000, "tokens of the small model, learned from the reports"
    )  # [ours]
    width: int = _setting(256, "width of the small model")  # [ours]
    depth: int = _setting(4, "blocks of the small model")  # [ours]
    heads: int = _setting(4, "attention heads of the small model")  # [ours]
    learning_rate_factor: float = _setting(
        1.0, "learning rate of the text encoder over the image encoder's"
    )  # [ours]


@dataclass(frozen=True)
class ContrastiveLossConfig:
    """The objective that tells an image's own report from others'."""

    loss: Literal["clip", "siglip"] = _setting(
        "clip", "clip: softmax over the batch; siglip: sigmoid of each pair"
    )
    embedding: int = _setting(512, "width of the space that images and texts share")  # [clip]
    logit_scale: float = _setting(
        1 / 0.07, "initial factor of the cosine similarities, 1 / temperature"
    )  # [clip]
    logit_scale_largest: float = _setting(100.0, "the factor learns no larger value")  # [clip]
    logit_bias: float = _setting(
        -10.0, "initial bias of siglip's logits; clip has none"
    )  # [siglip]


@dataclass(frozen=True)
class ContrastiveConfig(RunConfig):
    """A pre-training run on images and their reports."""

    recipe: str = _setting("clip-base-518", "name of the recipe that this run began with")
    crops: OneCropConfig = OneCropConfig()
    text: TextConfig = TextConfig()
    contrastive: ContrastiveLossConfig = ContrastiveLossConfig()


def to_json(config: RunConfig) -> str:
    """The config as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(text: str, where: Path | str) -> RunConfig:
    """Read a config back: a `ContrastiveConfig` where it has that group, else a `PretrainConfig`.

    Args:
        text: What `to_json` wrote.
        where: Named in errors.

    Raises:
        InputError: Not JSON, an unknown field or a value of another type.
    """
    try:
        values = json.loads(text)
    except ValueError as cause:
        raise InputError(f"{where} is not JSON ({cause}). Restore it from a copy.") from cause
    language = isinstance(values, dict) and "contrastive" in values
    config = _build(ContrastiveConfig if language else PretrainConfig, values, str(where))
    validate(config)
    return config


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """Fields that differ, each as `group.field: before -> after`; of another kind, the recipe.

    Where the data lies is left out: a run is tied to the data's fingerprint, not to its path.
    """
    if type(before) is not type(after):
        return [f"recipe: {before.recipe} -> {after.recipe}"]
    after = dataclasses.replace(after, data=before.data)
    old, new = _flat(dataclasses.asdict(before)), _flat(dataclasses.asdict(after))
    return [f"{name}: {old[name]} -> {new[name]}" for name in old if old[name] != new[name]]


def validate(config: RunConfig) -> None:
    """Check every field against what the method can do.

    Raises:
        InputError: Names the field, its value, what is allowed.
    """
    _require_ranges(config)
    c = config
    _require_multiples(c, "encoder.image_size", c.encoder.image_size)
    _require_multiples(c, "crops.global_size", c.crops.global_size)
    if isinstance(c, PretrainConfig):
        _validate_images_alone(c)
    if isinstance(c, ContrastiveConfig):
        _validate_language(c)
    if c.batch_size % c.engine.accumulate:
        raise InputError(
            f"batch_size {c.batch_size} cannot be cut into engine.accumulate "
            f"{c.engine.accumulate} equal parts. Change one of them."
        )
    if c.guard > 0 and not c.evaluate_every:
        raise InputError(
            f"guard is {c.guard}, but evaluate_every is 0, and the guard looks at the probe. Set "
            "--evaluate-every to the steps between probes, or --guard 0."
        )


def _require_multiples(config: RunConfig, name: str, size: int) -> None:
    patch = config.encoder.patch_size
    if size < patch or size % patch:
        below = max(patch, size // patch * patch)
        raise InputError(
            f"{name} is {size}, not a multiple of encoder.patch_size {patch}. "
            f"Use {below} or {max(below, size // patch * patch) + patch}."
        )


def _validate_images_alone(c: PretrainConfig) -> None:
    _require_multiples(c, "crops.local_size", c.crops.local_size)
    if c.crops.local_scale[0] == 0:
        raise InputError("crops.local_scale must begin above 0.")
    _require_choice("loss.centering", c.loss.centering, ("centering", "sinkhorn"))
    if not (c.loss.dino_weight or c.loss.ibot_weight or c.loss.koleo_weight):
        raise InputError(
            "loss.dino_weight, loss.ibot_weight and loss.koleo_weight are all 0, which leaves "
            "nothing to learn. Set one of them above 0."
        )
    if c.loss.koleo_weight > 0 and c.batch_size // c.engine.accumulate < 2:
        raise InputError(
            "loss.koleo_weight needs at least 2 images in each part of a batch: raise batch_size, "
            "lower engine.accumulate, or set --loss.koleo-weight 0."
        )


def _validate_language(c: ContrastiveConfig) -> None:
    _require_choice("contrastive.loss", c.contrastive.loss, ("clip", "siglip"))
    if c.batch_size < 2:
        raise InputError("batch_size is 1: there is no other report to tell from. Give 2 or more.")
    if c.text.width % c.text.heads:
        raise InputError(
            f"text.width {c.text.width} cannot be shared out over text.heads {c.text.heads}. Make "
            "it a multiple."
        )
    if c.text.vocabulary < _SMALLEST_VOCABULARY:
        raise InputError(
            f"text.vocabulary is {c.text.vocabulary}. It must be at least {_SMALLEST_VOCABULARY}: "
            "every byte and the special tokens."
        )
    if c.text.max_tokens < _SMALLEST_TEXT:
        raise InputError(
            f"text.max_tokens is {c.text.max_tokens}. It must be at least {_SMALLEST_TEXT}: what "
            "begins a text, a token of it, and what ends it."
        )
    if c.contrastive.logit_scale > c.contrastive.logit_scale_largest:
        raise InputError(
            f"contrastive.logit_scale {c.contrastive.logit_scale} is above "
            f"contrastive.logit_scale_largest {c.contrastive.logit_scale_largest}. Lower it."
        )


_SMALLEST_VOCABULARY = 256 + 3
_SMALLEST_TEXT = 1 + 2
_SHARES = {
    "encoder.drop_path", "crops.flip", "crops.jitter", "crops.blur_global_first",
    "crops.blur_global_second", "crops.blur_local", "crops.brightness", "crops.contrast",
    "masks.probability", "masks.ratio", "loss.teacher_temperature_warmup", "optimizer.warmup",
    "optimizer.freeze_last_layer", "teacher.momentum", "optimizer.layer_decay", "optimizer.beta1",
    "optimizer.beta2", "crops.global_scale", "crops.local_scale", "crops.blur",
}  # fmt: skip
_RANGES = {
    "masks.ratio", "crops.global_scale", "crops.local_scale", "crops.aspect", "crops.blur_sigma",
}  # fmt: skip
_MAY_BE_ZERO = _SHARES | {
    "seed", "evaluate_every", "encoder.registers", "crops.local_count", "loss.dino_weight",
    "loss.ibot_weight", "loss.koleo_weight", "optimizer.weight_decay", "head_warmup", "guard",
    "optimizer.learning_rate_end", "optimizer.patch_embed_factor", "encoder.layerscale_init",
    "text.sentences", "text.learning_rate_factor",
}  # fmt: skip
_MAY_BE_NEGATIVE = {"contrastive.logit_bias"}


# A seed must fit torch's generators; the others are sizes beyond which only a slip can lie. [ours]
_AT_MOST = {
    "seed": 2**63 - 1, "heads.prototypes": 2**20, "heads.hidden": 2**20, "heads.bottleneck": 2**20,
    "encoder.registers": 64, "encoder.image_size": 4096, "crops.local_count": 64,
    "crops.global_size": 4096, "crops.local_size": 4096, "text.max_tokens": 8192,
    "text.vocabulary": 2**20, "text.width": 2**14, "text.depth": 256,
    "contrastive.embedding": 2**16,
}  # fmt: skip


def _require_ranges(config: RunConfig) -> None:
    for name, value in _flat(dataclasses.asdict(config)).items():
        numbers = value if isinstance(value, (tuple, list)) else (value,)
        for number in numbers:
            if isinstance(number, (str, bool)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{name} is {value}. It must be finite.")
            if name in _MAY_BE_NEGATIVE:
                continue
            if number < 0 or (number == 0 and name not in _MAY_BE_ZERO):
                least = "0 or more" if name in _MAY_BE_ZERO else "more than 0"
                raise InputError(f"{name} is {value}. It must be {least}.")
            if number > _AT_MOST.get(name, number):
                raise InputError(f"{name} is {value}. It must be at most {_AT_MOST[name]}.")
            if name in _SHARES and number > 1:
                raise InputError(f"{name} is {value}. It must lie between 0 and 1.")
        if name in _RANGES and list(numbers) != sorted(numbers):
            raise InputError(f"{name} is {value}. The first must not exceed the second.")
    if config.crops.global_scale[0] == 0:
        raise InputError("crops.global_scale must begin above 0.")
    _require_choice("encoder.position_init", config.encoder.position_init, ("random", "sincos"))
    _require_choice("engine.precision", config.engine.precision, ("auto", "float32", "bfloat16"))


def _require_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}. {nearest(value, allowed)}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def _build(kind: Any, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected fields of {kind.__name__}, found {values!r}")
    types = typing.get_type_hints(kind)
    for name in values:
        if name not in types:
            raise InputError(f"{where}: unknown field {name!r}. {nearest(name, types)}")
    built = {}
    for name, value in values.items():
        if dataclasses.is_dataclass(types[name]):
            built[name] = _build(types[name], value, f"{where}: {name}")
        else:
            built[name] = _checked(types[name], value, f"{where}: {name}")
    return kind(**built)


def _checked(kind: Any, value: Any, where: str) -> Any:
    if kind == Pair and isinstance(value, list) and len(value) == 2:
        return tuple(_checked(float, number, where) for number in value)
    if kind == tuple[str, ...] and isinstance(value, list):
        return tuple(str(v) for v in value)
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if typing.get_origin(kind) is Literal and value in typing.get_args(kind):
        return value
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise InputError(f"{where}: {value!r} is of another type than the field takes")
