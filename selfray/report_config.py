"""One frozen dataclass is a report model: its language model, its training, its decoding.

The origin of a number stands beside it: [llava] the scripts `scripts/v1_5/pretrain.sh`,
`finetune.sh` and `finetune_lora.sh` of LLaVA v1.5, [maira] Hyland et al., MAIRA-1, arXiv
2311.13668, which RAD-DINO's evaluation follows (not verified), [ours] chosen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from selfray.errors import InputError, nearest

Trained = Literal["none", "lora", "full"]
Target = Literal["findings", "impression", "report"]


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ProjectorStage:
    """First stage: the projector alone, the language model frozen."""

    steps: int = _setting(0, "optimizer steps; 0: leave the stage out")
    learning_rate: float = _setting(1e-3, "peak learning rate")  # [llava]
    warmup: float = _setting(0.03, "share of the steps for linear warm-up")  # [llava]


@dataclass(frozen=True)
class LanguageStage:
    """Second stage: the projector with the language model, in whole or by low-rank adapters."""

    trained: Trained = _setting("full", "of the language model: none, lora or full")
    steps: int = _setting(0, "optimizer steps; 0: leave the stage out")
    learning_rate: float = _setting(2e-5, "peak learning rate")  # [llava] 2e-4 with LoRA
    warmup: float = _setting(0.03, "share of the steps for linear warm-up")  # [llava]
    projector: bool = _setting(True, "train the projector, too")
    weight_decay: float = _setting(0.0, "AdamW's weight decay of matrices")  # [llava]
    lora_rank: int = _setting(128, "rank of the adapters")  # [llava]
    lora_alpha: float = _setting(256.0, "adapters are scaled by alpha / rank")  # [llava]
    lora_dropout: float = _setting(0.05, "dropout before the adapters")  # [llava] its default
    lora_targets: tuple[str, ...] = _setting(
        ("all-linear",), "names of the linear layers with adapters, or all-linear"
    )  # [llava]


@dataclass(frozen=True)
class DecoderConfig:
    """The small decoder that is trained from scratch where no language model is named."""

    width: int = _setting(192, "width of the small decoder")  # [ours]
    depth: int = _setting(4, "blocks of the small decoder")  # [ours]
    heads: int = _setting(6, "attention heads of the small decoder")  # [ours]
    vocabulary: int = _setting(1000, "byte pairs that are learned from the training reports")


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
        ("indication", "technique", "comparison"), "sections that the prompt gives, where present"
    )  # [maira] the indication
    visual_tokens: int = _setting(
        0, "side of the grid that patch tokens are averaged to; 0: every patch"
    )
    word_steps: int = _setting(
        0, "steps for which the projector first learns which words a report has"
    )
    projector_layers: int = _setting(2, "linear layers of the projector")  # [llava]
    batch_size: int = _setting(16, "examples a step")
    micro_batch: int = _setting(16, "examples that are computed at a time, to save memory")
    activation_checkpointing: bool = _setting(
        False, "compute the language model's activations twice, to save memory"
    )
    image_dropout: float = _setting(
        0.0, "probability that an example is learned without its image; guidance needs it"
    )
    max_target_tokens: int = _setting(256, "longer targets are cut at a sentence")
    max_new_tokens: int = _setting(256, "of a generated report, at most")
    beams: int = _setting(1, "beams of the search; 1: greedy")
    guidance: float = _setting(
        0.0, "how much words count for being likelier with the image than without; 0: not at all"
    )
    candidates: int = _setting(
        1, "reports drawn at random, of which the image's likeliest against none is taken; 1: none"
    )
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "of matrix products; auto takes bfloat16 where the hardware has it"
    )
    checkpoint_every: int = _setting(200, "steps between validation losses and checkpoints")
    seed: int = _setting(0, "seed of everything random")
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
    (`conv_vicuna_v1`): LLaVA v1.5. Four layers, batch 128, 150 tokens at most and three passes,
    here over 150,000 studies, are MAIRA-1's as far as known, not verified. Name the model with
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
