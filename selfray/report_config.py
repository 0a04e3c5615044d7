"""One frozen dataclass is a report model: its language model, its training, its decoding.

The origin of a number stands beside it: [llava] the scripts `scripts/v1_5/pretrain.sh`,
`finetune.sh` and `finetune_lora.sh` of LLaVA v1.5, [maira] Hyland et al., MAIRA-1, arXiv
2311.13668, which RAD-DINO's evaluation follows (not verified), [ours] chosen here.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from selfray.errors import InputError, nearest

Trained = Literal["none", "lora", "full"]
Target = Literal["findings", "impression", "report"]

PROMPT_SECTIONS = ("indication", "technique", "comparison")
"""Sections of a report that are known before the image is read."""

ALL_LINEAR = "all-linear"
_FEWEST_WORD_STEPS = 25  # after which the loss of words is first looked at
_SMALLEST_VOCABULARY = 258  # the bytes, padding and the end
_LONGEST = 4096  # tokens that the small decoder can place
_MOST_STEPS = 10**8  # the largest numbers are sizes beyond which only a slip can lie [ours]
_RATES = (1e-9, 1.0)
_SHARES = (0.0, 1.0)
# Where all is dropped, nothing is learned.
_DROPPED = (0.0, 0.9)


def _setting(default: Any, help: str, between: tuple[float, float] | None = None) -> Any:
    """A field with its help and, of a number, the least and the largest value."""
    return field(default=default, metadata={"help": help, "between": between})


@dataclass(frozen=True)
class ProjectorStage:
    """First stage: the projector alone, the language model frozen."""

    steps: int = _setting(0, "optimizer steps; 0: leave the stage out", (0, _MOST_STEPS))
    learning_rate: float = _setting(1e-3, "peak learning rate", _RATES)  # [llava]
    warmup: float = _setting(0.03, "share of the steps for linear warm-up", _SHARES)  # [llava]


@dataclass(frozen=True)
class LanguageStage:
    """Second stage: the projector with the language model, in whole or by low-rank adapters."""

    trained: Trained = _setting("full", "of the language model: none, lora or full")
    steps: int = _setting(0, "optimizer steps; 0: leave the stage out", (0, _MOST_STEPS))
    learning_rate: float = _setting(2e-5, "peak learning rate", _RATES)  # [llava] 2e-4 with LoRA
    warmup: float = _setting(0.03, "share of the steps for linear warm-up", _SHARES)  # [llava]
    projector: bool = _setting(True, "train the projector, too")
    weight_decay: float = _setting(0.0, "AdamW's weight decay of matrices", (0, 10))  # [llava]
    lora_rank: int = _setting(128, "rank of the adapters", (1, 4096))  # [llava]
    lora_alpha: float = _setting(
        256.0, "adapters are scaled by alpha / rank", (1e-3, 1e5)
    )  # [llava]
    lora_dropout: float = _setting(0.05, "dropout before the adapters", _DROPPED)  # [llava]
    lora_targets: tuple[str, ...] = _setting(
        (ALL_LINEAR,), "names of the linear layers with adapters, or all-linear"
    )  # [llava]


@dataclass(frozen=True)
class DecoderConfig:
    """The small decoder that is trained from scratch where no language model is named."""

    width: int = _setting(192, "width of the small decoder", (2, 2**14))  # [ours]
    depth: int = _setting(4, "blocks of the small decoder", (1, 256))  # [ours]
    heads: int = _setting(6, "attention heads of the small decoder", (1, 256))  # [ours]
    vocabulary: int = _setting(
        1000,
        "byte pairs that are learned from the training reports",
        (_SMALLEST_VOCABULARY, 2**20),
    )


@dataclass(frozen=True)
class ReportConfig:
    """A report model."""

    recipe: str = _setting("tiny", "name of the recipe that this began with")
    language_model: str = _setting(
        "", "directory of a Hugging Face causal language model, or a GGUF file; empty: the small "
        "decoder"
    )  # fmt: skip
    prompt_template: str = _setting(
        "", "text with {image} and {prompt}; empty: the language model's chat template"
    )
    target: Target = _setting("findings", "what is written: findings, impression or the report")
    prompt_sections: tuple[str, ...] = _setting(
        PROMPT_SECTIONS, "sections that the prompt gives, where present; no value: no prompt"
    )  # [maira] the indication
    visual_tokens: int = _setting(
        0, "side of the grid that patch tokens are averaged to; 0: every patch", (0, 256)
    )
    word_steps: int = _setting(
        0, "steps for which the projector first learns which words a report has", (0, _MOST_STEPS)
    )
    projector_layers: int = _setting(2, "linear layers of the projector", (1, 64))  # [llava]
    batch_size: int = _setting(16, "examples a step", (1, 2**16))
    micro_batch: int = _setting(
        16, "examples that are computed at a time, to save memory", (1, 2**16)
    )
    activation_checkpointing: bool = _setting(
        False, "compute the language model's activations twice, to save memory"
    )
    image_dropout: float = _setting(
        0.0,
        "probability that an example is learned without its image, for candidates above 1 alone, "
        "which are compared with what is said of no image",
        _DROPPED,
    )
    max_target_tokens: int = _setting(256, "longer targets are cut at a sentence", (2, _LONGEST))
    max_new_tokens: int = _setting(256, "of a generated report, at most", (1, _LONGEST))
    beams: int = _setting(1, "beams of the search; 1: greedy", (1, 64))
    candidates: int = _setting(
        1,
        "reports drawn at random, of which the image's likeliest against none is taken; 1: none",
        (1, 1000),
    )
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "of matrix products; auto takes bfloat16 where the hardware has it"
    )
    checkpoint_every: int = _setting(
        200, "steps between validation losses and checkpoints", (1, _MOST_STEPS)
    )
    seed: int = _setting(0, "seed of everything random", (0, 2**32 - 1))
    projector: ProjectorStage = ProjectorStage()
    language: LanguageStage = LanguageStage()
    decoder: DecoderConfig = DecoderConfig()


def tiny() -> ReportConfig:
    """Two CPU cores and about a minute: a small decoder, after its projector learned words.

    Found on 1,910 images of the phantom: a wider or deeper decoder, or more visual tokens, has no
    lower validation loss and takes longer. Trained at once with the projector, it learns wordings
    by heart before it looks at images; and the likeliest report is nearly always a normal one.
    """
    return ReportConfig(
        recipe="tiny",
        visual_tokens=4,
        batch_size=32,
        micro_batch=32,
        image_dropout=0.1,
        word_steps=300,
        candidates=10,
        max_target_tokens=160,
        max_new_tokens=160,
        precision="float32",
        checkpoint_every=50,
        language=LanguageStage(
            steps=500,
            learning_rate=3e-3,
            warmup=0.1,
            weight_decay=0.05,
            trained="full",
            projector=False,
        ),
        decoder=DecoderConfig(width=128, depth=2, heads=4),
    )


def smollm2() -> ReportConfig:
    """A language model of about 135 million parameters on a GPU, or overnight on a CPU.

    Name the model with `language_model`. Numbers are LLaVA's, but for fewer examples; never run to
    the end.
    """
    return ReportConfig(
        recipe="smollm2",
        visual_tokens=8,
        batch_size=32,
        micro_batch=8,
        projector=ProjectorStage(steps=500),
        language=LanguageStage(
            trained="lora", steps=2000, learning_rate=2e-4, lora_rank=16, lora_alpha=32.0
        ),
    )


def vicuna_7b() -> ReportConfig:
    """Vicuna-7B v1.5 fine-tuned in full with every patch token, as RAD-DINO's reports were written.

    Frozen encoder, projector from scratch, language model in full: model card of MAIRA-2. One stage
    for both: MAIRA at RRG24 (BioNLP 2024), abstract. Learning rate, warm-up and the template
    (`conv_vicuna_v1`): LLaVA v1.5. Four layers: MAIRA-1 as bio.rodeo/models/maira-1 describes it.
    Batch 128, 150 tokens at most and three passes, here over 150,000 studies, are MAIRA-1's as far
    as known, not verified. Name the model with
    `language_model`. Never run to the end.
    """
    return ReportConfig(
        recipe="vicuna-7b",
        prompt_template=(
            "<s>A chat between a curious user and an artificial intelligence assistant. The "
            "assistant gives detailed, helpful, and polite answers to the user's questions. "
            "USER: {image}\n{prompt} ASSISTANT: "
        ),
        projector_layers=4,
        batch_size=128,
        micro_batch=4,
        activation_checkpointing=True,
        max_new_tokens=150,
        precision="bfloat16",
        checkpoint_every=500,
        language=LanguageStage(trained="full", steps=3516),
    )


RECIPES: dict[str, Callable[[], ReportConfig]] = {
    "tiny": tiny,
    "smollm2": smollm2,
    "vicuna-7b": vicuna_7b,
}


def report_recipe(name: str) -> ReportConfig:
    """The config of a named recipe.

    Raises:
        InputError: No such recipe; the nearest name is suggested.
    """
    if name not in RECIPES:
        raise InputError(f"recipe {name!r} is not known. {nearest(name, RECIPES)}")
    return RECIPES[name]()


def validate_report_config(config: ReportConfig) -> None:
    """Check every field against what can be trained and written.

    Raises:
        InputError: Names the field as the command line does, its value, what is allowed.
    """
    _require_values(config, "--report.")
    language = config.language
    if not config.projector.steps + language.steps:
        raise InputError(
            "--report.projector.steps and --report.language.steps are both 0, which trains "
            "nothing. Set one of them above 0."
        )
    if 0 < config.word_steps < _FEWEST_WORD_STEPS:
        raise InputError(
            f"--report.word-steps is {config.word_steps}. It must be 0, or {_FEWEST_WORD_STEPS} "
            "or more: only then is the projector looked at."
        )
    if language.steps and language.trained == "none" and not language.projector:
        raise InputError(
            "--report.language.trained is none and --report.language.projector is false, which "
            "leaves nothing to learn. Change one, or set --report.language.steps 0."
        )
    _require_targets_of_adapters(language.lora_targets)
    _require_sections(config.prompt_sections)
    _require_decoding(config)
    _require_language_model(config)


def _require_values(config: Any, prefix: str) -> None:
    """Kind and range of every field."""
    kinds = typing.get_type_hints(type(config))
    for one in fields(config):
        value, kind = getattr(config, one.name), kinds[one.name]
        name = prefix + one.name.replace("_", "-")
        if is_dataclass(kind):
            _require_values(value, f"{name}.")
        elif typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
            raise InputError(f"{name} is {value!r}. {nearest(str(value), typing.get_args(kind))}")
        elif kind in (int, float):
            _require_number(name, value, kind, *one.metadata["between"])


def _require_number(name: str, value: Any, kind: type, least: float, most: float) -> None:
    kinds = (int,) if kind is int else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}. It must be a number of kind {kind.__name__}.")
    if not math.isfinite(value) or not least <= value <= most:
        raise InputError(f"{name} is {value}. It must lie between {least:,} and {most:,}.")


def _require_targets_of_adapters(targets: tuple[str, ...]) -> None:
    mixed = ALL_LINEAR in targets and len(targets) > 1
    if not targets or mixed or not all(name.strip() for name in targets):
        raise InputError(
            f"--report.language.lora-targets is {' '.join(targets)!r}. Give {ALL_LINEAR} alone, or "
            "names of linear layers such as q_proj v_proj."
        )


def _require_sections(names: tuple[str, ...]) -> None:
    for name in names:
        if name not in PROMPT_SECTIONS:
            raise InputError(
                f"--report.prompt-sections has {name!r}. {nearest(name, PROMPT_SECTIONS)} For no "
                "prompt, give the option without a value."
            )


def _require_decoding(config: ReportConfig) -> None:
    if config.candidates == 1:
        return
    if config.beams > 1:
        raise InputError(
            f"--report.beams is {config.beams} and --report.candidates is {config.candidates}: "
            "reports are either searched for or drawn. Set one of them to 1."
        )
    if not config.image_dropout:
        raise InputError(
            f"--report.candidates is {config.candidates}, and --report.image-dropout is 0: what is "
            "said of no image would not be learned. Set --report.image-dropout 0.1, or "
            "--report.candidates 1."
        )


def _require_language_model(config: ReportConfig) -> None:
    """What a named language model is told, and what the small decoder is."""
    decoder, template = config.decoder, config.prompt_template
    if template and (
        (template.count("{image}"), template.count("{prompt}")) != (1, 1)
        or template.index("{image}") > template.index("{prompt}")
    ):
        raise InputError(
            f"--report.prompt-template is {template[:60]!r}. It must have {{image}} once and, "
            "after it, {prompt} once."
        )
    if decoder.width % (2 * decoder.heads):
        raise InputError(
            f"--report.decoder.width is {decoder.width}, no multiple of 2 * "
            f"--report.decoder.heads {decoder.heads}. Change one."
        )
    if config.language_model:
        return
    if template or (config.language.steps and config.language.trained != "full"):
        needs = (
            "--report.prompt-template is given"
            if template
            else f"--report.language.trained is {config.language.trained}"
        )
        raise InputError(
            f"{needs}, and --report.language-model names no language model: the small decoder has "
            "no template, and begins from random weights, all of which must be learned. Name one."
        )
