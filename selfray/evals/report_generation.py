"""Reports written by a report model: in batches, with the key-value cache, greedy or by beams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from selfray.evals.report_model import ReportModel

# Words less likely, with the image, than this share of the likeliest are never favoured: guidance
# would else pick words that fit nowhere. Leng et al. take 0.1.
_PLAUSIBLE = 0.1


def generate_reports(
    model: ReportModel,
    tokens: np.ndarray,
    rows: np.ndarray,
    prompts: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    beams: int,
    guidance: float,
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
        guidance: How much words count for being likelier with the image than without one, >= 0;
            above 0 the model must have been trained with image dropout.
        bfloat16: Whether matrix products are computed in bfloat16.

    Yields:
        Which of the n, int [b], and their texts.
    """
    from transformers import GenerationConfig, LogitsProcessorList

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
        texts = [ids[i] for i in batch]
        seen = torch.ones(len(batch), dtype=torch.bool, device=model.device)
        rules = LogitsProcessorList([_Guided(guidance)] if guidance else [])
        with torch.inference_mode(), torch.autocast(
            model.device.type, torch.bfloat16, enabled=bfloat16
        ):  # fmt: skip
            embedded = model.embeddings(tokens[rows[batch]], texts, seen)
            if guidance:
                unseen = model.embeddings(tokens[rows[batch]], texts, ~seen)
                embedded = torch.cat([embedded, unseen])
            mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
            written = model.network.generate(
                inputs_embeds=embedded,
                attention_mask=mask,
                generation_config=settings,
                logits_processor=rules,
            )
        yield batch, [language.text(report) for report in written[: len(batch)].tolist()]


class _Guided:
    """Favours words for being likelier with the image than without.

    Of a batch, the second half are the same reports without their images; both halves get the same
    scores, so that they stay the same reports.

    Args:
        guidance: > 0.

    Reference:
        Sanchez et al., Stay on topic with classifier-free guidance, ICML 2024, eq. 7; what words
        may be favoured at all: Leng et al., Visual contrastive decoding, CVPR 2024, eq. 4.
    """

    def __init__(self, guidance: float) -> None:
        self._guidance = guidance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [2 B, vocabulary] of either kind to equal ones for both."""
        seen, unseen = scores.float().log_softmax(dim=-1).chunk(2)
        guided = seen + self._guidance * (seen - unseen)
        unlikely = seen < seen.amax(dim=-1, keepdim=True) + math.log(_PLAUSIBLE)
        return guided.masked_fill(unlikely, -math.inf).log_softmax(dim=-1).repeat(2, 1)


def _equal_lengths(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Places of equal lengths, at most `batch_size` at a time, in their order."""
    for length in dict.fromkeys(lengths):
        places = np.flatnonzero(np.asarray(lengths) == length)
        yield from np.split(places, range(batch_size, len(places), batch_size))
