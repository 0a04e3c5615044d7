"""Reports written by a report model: in batches, with the key-value cache, greedy or by beams."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from selfray.evals.report_model import ReportModel
from selfray.evals.stepwise import Purpose, generator_at

if TYPE_CHECKING:
    from transformers import GenerationConfig

_NUCLEUS = 0.95  # share of the likeliest words from which is drawn


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
    candidates: int,
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
        candidates: Above 1, so many reports are drawn at random, the same ones in every run, and
            the one is taken that the image makes likeliest against no image (Li et al., A
            diversity-promoting objective function, NAACL 2016); the model must have been trained
            with image dropout. `beams` is 1 then.

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
        texts = [ids[i] for i in batch]
        images = tokens[rows[batch]]
        with torch.inference_mode(), torch.autocast(
            model.device.type, torch.bfloat16, enabled=bfloat16
        ):  # fmt: skip
            if candidates > 1:
                found = _most_informative(model, images, texts, settings, candidates)
            else:
                found = _likeliest(model, images, texts, settings)
        yield batch, [language.text(report) for report in found]


def _likeliest(
    model: ReportModel, images: np.ndarray, texts: list[list[int]], settings: GenerationConfig
) -> list[list[int]]:
    seen = torch.ones(len(texts), dtype=torch.bool, device=model.device)
    return _generated(model, model.embeddings(images, texts, seen), settings, [])


def _most_informative(
    model: ReportModel,
    images: np.ndarray,
    texts: list[list[int]],
    settings: GenerationConfig,
    candidates: int,
) -> list[list[int]]:
    """Of reports drawn at random, those of the highest log p(report | image) - log p(report)."""
    seen = torch.ones(len(texts), dtype=torch.bool, device=model.device)
    embedded = model.embeddings(images, texts, seen)
    keys = model.image_keys(images)
    best, scores = [[] for _ in texts], torch.full((len(texts),), -math.inf)
    for candidate in range(candidates):
        reports = [
            model.language.ended(report)
            for report in _generated(model, embedded, settings, [_Drawn(keys, candidate)])
        ]
        unseen = model.losses(images, texts, reports, ~seen)
        score = (unseen - model.losses(images, texts, reports, seen)).cpu()
        for row in torch.nonzero(score > scores)[:, 0].tolist():
            best[row], scores[row] = reports[row], score[row]
    return best


def _generated(
    model: ReportModel, embedded: Tensor, settings: GenerationConfig, rules: list[Any]
) -> list[list[int]]:
    mask = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
    return model.network.generate(
        inputs_embeds=embedded,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=rules,
    ).tolist()


class _Drawn:
    """Makes the likeliest word a random one, drawn from the scores: the Gumbel-max trick.

    Args:
        keys: Of the image of each report, [B], 0 to 2**64 - 1: what is drawn for it depends on
            nothing else.
        candidate: Which draw.

    Reference:
        Nucleus: Holtzman et al., The curious case of neural text degeneration, ICLR 2020.
    """

    def __init__(self, keys: Sequence[int], candidate: int) -> None:
        self._keys, self._candidate, self._step = keys, candidate, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, vocabulary] with noise, and none outside the nucleus."""
        shares, order = scores.float().softmax(dim=-1).sort(dim=-1, descending=True)
        outside = shares.cumsum(dim=-1) - shares > _NUCLEUS
        noise = np.stack(
            [
                generator_at(self._candidate, Purpose.AUGMENTATION, self._step, key).gumbel(
                    size=scores.shape[-1]
                )
                for key in self._keys
            ]
        )
        self._step += 1
        noisy = scores.float().log_softmax(dim=-1) + torch.from_numpy(noise).to(scores)
        return noisy.masked_fill(outside.gather(-1, order.argsort(dim=-1)), -math.inf)


def _equal_lengths(lengths: Sequence[int], batch_size: int) -> Iterator[np.ndarray]:
    """Places of equal lengths, at most `batch_size` at a time, in their order."""
    for length in dict.fromkeys(lengths):
        places = np.flatnonzero(np.asarray(lengths) == length)
        yield from np.split(places, range(batch_size, len(places), batch_size))
