"""Small language models of several architectures with a real tokenizer, and pairs to learn."""

from __future__ import annotations

import copy
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selfray.evals.report_model import ReportExamples, ReportModel
from selfray.models.language_memory import LanguageUse
from selfray.models.language_model import LanguageModel, open_language_model
from selfray.models.small_decoder import small_decoder

TEXTS = (
    "The lungs are clear. The heart is normal in size.",
    "Small left pleural effusion. No pneumothorax.",
    "Moderate cardiomegaly. The lungs are clear.",
    "There is a large right pneumothorax.",
    "A 12 mm nodule in the right upper zone.",
    "Patchy consolidation in the left lower zone. No pleural effusion. The heart is enlarged.",
    "Normal.",
    "Left chest tube in place. Fracture of the left fifth rib.",
)
CHAT = (
    "{% for m in messages %}<user>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<reply>{% endif %}"
)
WIDTH = 32


def decoder() -> LanguageModel:
    """The small decoder with a tokenizer of `TEXTS`."""
    return copy.deepcopy(_decoder())


@cache
def _decoder() -> LanguageModel:
    return small_decoder(TEXTS, width=WIDTH, depth=2, heads=2, vocabulary=300, seed=0)


def architectures() -> dict[str, Any]:
    """Tiny configurations of transformers, by name, without sizes that depend on a tokenizer."""
    import transformers as t

    return {
        "llama": lambda **k: t.LlamaForCausalLM(
            t.LlamaConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, **k)
        ),
        "qwen2": lambda **k: t.Qwen2ForCausalLM(
            t.Qwen2Config(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, **k)
        ),
        "gpt2": lambda **k: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=WIDTH, n_layer=2, n_head=2, n_positions=256, **k)
        ),
        "opt": lambda **k: t.OPTForCausalLM(
            t.OPTConfig(hidden_size=WIDTH, ffn_dim=64, num_hidden_layers=2, dropout=0.0,
                        num_attention_heads=2, word_embed_proj_dim=WIDTH,
                        max_position_embeddings=256, **k)
        ),
    }  # fmt: skip


def model_directory(directory: Path, name: str, **tokens: Any) -> Path:
    """Write a random network of an architecture with a tokenizer of `TEXTS` as safetensors."""
    if tokens:
        return _write_model(directory, name, **tokens)
    return Path(shutil.copytree(_written_once(name).name, directory))


@cache
def _written_once(name: str) -> tempfile.TemporaryDirectory[str]:
    kept = tempfile.TemporaryDirectory()
    _write_model(Path(kept.name), name)
    return kept


def _write_model(directory: Path, name: str, **tokens: Any) -> Path:
    tokenizer = decoder().tokenizer
    for key, value in tokens.items():
        setattr(tokenizer, key, value)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0, "bos_token_id": None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Rounded up, as models do, and with room for the token that Qwen2's tokenizer adds.
        network = architectures()[name](vocab_size=320, **ids)
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def opened(directory: Path, template: str = "") -> LanguageModel:
    """A language model from disk, float32, to write."""
    return open_language_model(
        directory,
        template=template,
        cache=directory.parent / "cache",
        use=LanguageUse(torch.device("cpu"), tokens=0),
    )


def pairs(side: int = 3, width: int = 12) -> ReportExamples:
    """Eight images of random patch tokens, one text each, prompts of three lengths."""
    tokens = np.random.default_rng(0).normal(size=(8, side, side, width)).astype(np.float16)
    prompts = ["", "Cough.", "Chest pain for three days."]
    return ReportExamples(tokens, np.arange(8), [prompts[i % 3] for i in range(8)], list(TEXTS))


def report_model(language: LanguageModel, examples: ReportExamples, side: int = 0) -> ReportModel:
    """With a projector of two layers."""
    return ReportModel(
        language, examples.tokens.shape[-1], visual_side=side, projector_layers=2, seed=0
    )


def uncut(text: str, _fits: Any) -> tuple[str, bool]:
    """Targets as they are."""
    return text, False
