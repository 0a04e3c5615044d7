"""Reports written by a report model: in batches, with the key-value cache, greedy or by beams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from selfray.evals.report_model import ReportModel


def generate_reports(
    model: ReportModel,
    tokens: np.ndarray,
    rows: np.ndarray,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    beams: int,
    bfloat16: bool,
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Write a report for each image, batch by batch, so that the caller can keep what is done.

    Only prompts of equal length share a batch: nothing is filled up, and an image's report does
    not depend on what else is in its batch.

    Args:
        model: Trained; on the device to compute on.
        tokens: Patch tokens, [N, h, w, D], may be memory-mapped.
        rows: int [n], which image each report is for.
        prompts: n texts.
        batch_size: Reports at a time, at most.
        max_new_tokens: A report ends here if not before.
        beams: 1 is greedy.
        bfloat16: Whether matrix products are computed in bfloat16.

    Yields:
        Which of the n, int [b], and their texts.
    """
    from transformers import GenerationConfig

    model.eval()
    language = model.language
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=language.end_id,
        pad_token_id=language.pad_id,
    )
    ids = [language.after_image(prompt) for prompt in prompts]
    for batch in _equal_lengths([len(prompt) for prompt in ids], batch_size):
        with torch.inference_mode(), torch.autocast(
            model.device.type, torch.bfloat16, enabled=bfloat16
        ):  # fmt: skip
            embedded = model.embeddings(tokens[rows[batch]], [ids[i] for i in batch])
            mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
            written = model.network.generate(
                inputs_embeds=embedded, attention_mask=mask, generation_config=settings
            )
        yield batch, [language.text(report) for report in written.tolist()]


def _equal_lengths(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Places of equal lengths, at most `batch_size` at a time, in their order."""
    for length in dict.fromkeys(lengths):
        places = np.flatnonzero(np.asarray(lengths) == length)
        yield from np.split(places, range(batch_size, len(places), batch_size))
