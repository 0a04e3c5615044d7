"""A projector that says which words a report has, before a language model reads it.

How a finding is worded is most of a report's entropy, and a language model learns that first, and
images last. Which words occur at all is a smaller problem, which fewer images settle.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.evals.report_model import EncodedExamples, ReportModel
from selfray.evals.stepwise import batch_places

# Chosen on the phantom's validate split.
_BATCH, _CHECK, _LEARNING_RATE, _WEIGHT_DECAY, _DROPOUT = 128, 25, 1e-3, 0.1, 0.3
_SHARE = 0.02  # words of fewer reports, or of all but these, teach nothing


def learn_words(
    model: ReportModel, train: EncodedExamples, validate: EncodedExamples, steps: int, seed: int
) -> float:
    """Train the projector so that the mean of its visual tokens tells the words of the report.

    The projector ends with the weights of the lowest validation loss.

    Args:
        model: With patch tokens scaled (`ReportModel.scale_by`); its projector changes.
        train: At least one.
        validate: At least one.
        steps: >= 25.
        seed: Of order and dropout.

    Returns:
        What the words of a validation report lose of their cross-entropy by the image, nats.

    Reference:
        Joulin et al., Learning visual features from large weakly supervised data, ECCV 2016.
    """
    vocabulary = len(model.language.tokenizer)
    words = [_words(of, vocabulary) for of in (train, validate)]
    rate = words[0].mean(dim=0)
    kept = (rate > _SHARE) & (rate < 1 - _SHARE)
    wanted, held_out = (of[:, kept].to(model.device) for of in words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hidden = model.projector.no_image.shape[0]
        head = nn.Linear(hidden, int(kept.sum())).to(model.device)
        nn.init.zeros_(head.weight)
        head.bias.data.copy_(torch.logit(rate[kept]))
        weights = [*model.projector.layers.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
        none = best = _loss(model, head, validate, held_out)
        best_weights = copy.deepcopy(model.projector.state_dict())
        for step in range(steps):
            batch = batch_places(step, min(_BATCH, len(train.rows)), len(train.rows), seed)
            visual = F.dropout(_means(model, train.tokens[train.rows[batch]]), _DROPOUT)
            loss = _cross_entropy(head(visual), wanted[batch])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if (step + 1) % _CHECK == 0:
                now = _loss(model, head, validate, held_out)
                if now < best:
                    best, best_weights = now, copy.deepcopy(model.projector.state_dict())
        optimizer.zero_grad(set_to_none=True)
    model.projector.load_state_dict(best_weights)
    return none - best


def _words(examples: EncodedExamples, vocabulary: int) -> Tensor:
    found = torch.zeros(len(examples.targets), vocabulary)
    for row, target in enumerate(examples.targets):
        found[row, target] = 1
    return found


def _means(model: ReportModel, tokens: np.ndarray) -> Tensor:
    seen = torch.ones(len(tokens), dtype=torch.bool, device=model.device)
    return model.visual(tokens, seen).mean(dim=1)


def _cross_entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    """Of all words of a report, mean over reports."""
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum(dim=1).mean()


@torch.no_grad()
def _loss(model: ReportModel, head: nn.Linear, examples: EncodedExamples, wanted: Tensor) -> float:
    total = 0.0
    for rows in np.array_split(np.arange(len(examples.rows)), -(-len(examples.rows) // _BATCH)):
        logits = head(_means(model, examples.tokens[examples.rows[rows]]))
        total += float(_cross_entropy(logits, wanted[rows])) * len(rows)
    return total / len(examples.rows)
