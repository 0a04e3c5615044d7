"""Training steps of a report model against the padded way, in one run, in turn.

    python benchmarks/report_training.py

Target lengths are drawn from the quantiles of OpenI's 3,425 findings sections and prompt lengths
from those of its indications, in tokens of SmolLM2's tokenizer. The padded way is what LLaVA's
layout gives with transformers: batches in random order, filled up to their longest example, an
attention mask, and the library's loss over the logits of every place. Ours has batches of similar
lengths and logits where targets are. Both are told to do the same examples; tokens are counted
without what is filled up: visual ones, prompt and target.

Models: the small decoder, and a Llama with SmolLM2-135M's vocabulary and a fifth of its blocks, so
that the run stays short.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
import transformers

from selfray.evals.report_model import EncodedExamples, ReportModel
from selfray.evals.report_training import length_buckets
from selfray.models.language_model import LanguageModel
from selfray.models.small_decoder import small_decoder

PERCENTILES = (0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 100)
TARGETS = (1, 23, 27, 33, 37, 42, 46, 51, 56, 64, 77, 88, 115, 222)
PROMPTS = (1, 2, 3, 4, 5, 7, 9, 10, 11, 13, 16, 20, 31, 67)
SIDE, WIDTH = 4, 192  # of the grid and of the patch tokens
REPEATS, THREADS = 5, 2


def examples(count: int, vocabulary: int) -> EncodedExamples:
    """Random tokens of the stated lengths."""
    rng = np.random.default_rng(0)
    prompts, targets = (
        [
            rng.integers(2, vocabulary, size=int(length)).tolist()
            for length in np.interp(rng.uniform(0, 100, count), PERCENTILES, quantiles)
        ]
        for quantiles in (PROMPTS, TARGETS)
    )
    tokens = rng.normal(size=(count, SIDE, SIDE, WIDTH)).astype(np.float16)
    return EncodedExamples(tokens, np.arange(count), prompts, targets, 0)


def report_model(kind: str) -> ReportModel:
    if kind == "small decoder":
        language = small_decoder(["a b c"], width=192, depth=4, heads=6, vocabulary=300, seed=0)
        language.network.resize_token_embeddings(1000)
    else:
        config = transformers.LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=6,
            num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        )  # fmt: skip
        tokenizer = small_decoder(
            ["a b c"], width=32, depth=1, heads=1, vocabulary=300, seed=0
        ).tokenizer
        network = transformers.LlamaForCausalLM(config)
        language = LanguageModel(network, tokenizer, "{image}{prompt}", 1, 0)
    return ReportModel(language, WIDTH, visual_side=0, projector_layers=2, seed=0)


def ours(model: ReportModel, data: EncodedExamples, batches: list[np.ndarray]) -> None:
    for batch in batches:
        loss, count = model.loss_sum(data, batch)
        (loss / count).backward()
        model.zero_grad()


def padded(model: ReportModel, data: EncodedExamples, batches: list[np.ndarray]) -> None:
    for batch in batches:
        texts = [data.prompts[i] + data.targets[i] for i in batch]
        seen = torch.ones(len(batch), dtype=torch.bool)
        embedded = model.embeddings(data.tokens[data.rows[batch]], texts, seen)
        start = embedded.shape[1] - max(map(len, texts))
        labels = torch.full(embedded.shape[:2], -100)
        mask = torch.zeros_like(labels)
        for row, i in enumerate(batch):
            end = start + len(texts[row])
            labels[row, end - len(data.targets[i]) : end] = torch.tensor(data.targets[i])
            mask[row, :end] = 1
        model.network(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss.backward()
        model.zero_grad()


def compare(kind: str, count: int, batch_size: int) -> dict[str, Any]:
    model = report_model(kind)
    vocabulary = model.network.config.vocab_size
    data = examples(count, vocabulary)
    tokens = int(data.lengths().sum()) + count * SIDE**2
    shuffled = np.random.default_rng(1).permutation(count).reshape(-1, batch_size)
    ways = {
        "ours": (ours, length_buckets(data.lengths(), batch_size, 0, 0)),
        "padded": (padded, list(shuffled)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way, batches in ways.values():
        way(model, data, batches[:1])
    for _ in range(REPEATS):
        for name, (way, batches) in ways.items():
            began = time.process_time()
            way(model, data, batches)
            seconds[name].append(time.process_time() - began)
    ratios = [p / o for o, p in zip(seconds["ours"], seconds["padded"], strict=True)]
    return {
        "model": kind,
        "tokens": tokens,
        **{f"{name}_tokens_per_cpu_second": round(tokens / float(np.median(s)))
           for name, s in seconds.items()},
        "ratio": round(float(np.median(ratios)), 2),
        "ratios": [round(r, 2) for r in ratios],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=256, help="a repeat, multiple of the batch")
    parser.add_argument("--batch-size", type=int, default=16)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    print(
        json.dumps(compare("small decoder", arguments.examples, arguments.batch_size)), flush=True
    )
    print(json.dumps(compare("SmolLM2's vocabulary", 64, arguments.batch_size)), flush=True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, CPU seconds")


if __name__ == "__main__":
    main()
