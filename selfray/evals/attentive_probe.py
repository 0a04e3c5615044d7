"""Attentive pooling: a learnt query looks over an encoder's frozen tokens, then a linear layer.

The pooling is AIM's (El-Nouby et al., Scalable pre-training of large autoregressive image models,
ICML 2024; `AttentionPoolingClassifier` of the published code), with a bias in its linear layer,
since findings are rare; the training is V-JEPA's (Bardes et al., Revisiting feature prediction for
learning visual representations from video, TMLR 2024; the published `configs/evals`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selfray.evals.stepwise import (
    LabelledSplits,
    Purpose,
    TargetScale,
    TrainedProbe,
    batch_places,
    choose,
    chosen_outputs,
    cosine_factor,
    generator_at,
    known_losses,
    validation_scores,
)
from selfray.progress import progress_bar

# V-JEPA's is 1e-3; a decade to each side of it.
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHT_DECAY = 1e-3  # V-JEPA's vitl16_in1k.yaml, of matrices
PASSES = 20  # V-JEPA's, over the training images
FEWEST_STEPS = 1000  # ours: 20 passes over few images are too few steps
BATCH_SIZE = 128  # ours; V-JEPA's 1,024 are many passes' worth of a hospital's labelled images
QUERY_STD = 0.02  # AIM's, like the next
_NORM_EPS = 1e-6
_HEAD_WIDTH = 64  # of AIM-0.6B's and of every ViT's attention

_TESTED_AT_ONCE = 128


def head_count(width: int) -> int:
    """Heads of about 64 values: the largest number that divides the width, at most width / 64."""
    most = max(1, width // _HEAD_WIDTH)
    return next(heads for heads in range(most, 0, -1) if width % heads == 0)


class AttentivePools(nn.Module):
    """One attentive pooling with a linear layer for each candidate, all of the same start.

    Args:
        width: D of the tokens.
        outputs: K.
        candidates: R.
        seed: Of the initial weights.
    """

    def __init__(self, width: int, outputs: int, candidates: int, seed: int) -> None:
        super().__init__()
        self.heads = head_count(width)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=_NORM_EPS)
        generator = generator_at(seed, Purpose.WEIGHTS)
        bound = 1 / math.sqrt(width)  # of `nn.Linear`, which AIM leaves as it is
        drawn = {
            "query": generator.normal(0, QUERY_STD, width),
            "key": generator.uniform(-bound, bound, (width, width)),
            "value": generator.uniform(-bound, bound, (width, width)),
            "weight": generator.uniform(-bound, bound, (outputs, width)),
            "bias": np.zeros(outputs),
        }
        self.parts = nn.ModuleList(
            nn.ParameterDict(
                {name: nn.Parameter(torch.from_numpy(v).float()) for name, v in drawn.items()}
            )
            for _ in range(candidates)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, N, D] to outputs [R, B, K].

        As there is one query, keys and values need not be computed for every token: the query is
        taken back through the keys' matrix, and values are made of tokens that are pooled already.
        """
        x = self.norm(tokens.transpose(1, 2)).transpose(1, 2)
        query = self._all("query").unflatten(1, (self.heads, -1))  # [R, H, d]
        key, value = (self._all(n).unflatten(1, (self.heads, -1)) for n in ("key", "value"))
        looks_for = torch.einsum("rhd,rhde->rhe", query, key) / math.sqrt(query.shape[-1])
        attention = (x @ looks_for.flatten(0, 1).T).softmax(dim=1)  # [B, N, R * H]
        pooled = (attention.transpose(1, 2) @ x).unflatten(1, query.shape[:2])  # [B, R, H, D]
        values = torch.einsum("brhe,rhde->rbhd", pooled, value).flatten(2)  # [R, B, D]
        return torch.baddbmm(self._all("bias")[:, None], values, self._all("weight").mT)

    def _all(self, name: str) -> Tensor:
        """One parameter of every candidate, [R, ...]."""
        return torch.stack([part.get_parameter(name) for part in self.parts])


def default_steps(images: int) -> int:
    """Steps for so many training images."""
    return max(FEWEST_STEPS, math.ceil(PASSES * images / BATCH_SIZE))


def attentive_probe(
    cls: np.ndarray,
    patch_tokens: np.ndarray,
    splits: LabelledSplits,
    *,
    steps: int,
    seed: int,
    device: torch.device,
) -> TrainedProbe:
    """Train on an encoder's tokens, choose the learning rate on validate, predict test.

    Args:
        cls: Of every image of the dataset, [N, D]; may be memory-mapped, as may the next.
        patch_tokens: [N, h, w, D].
        splits: Rows of the two, and targets.
        steps: Of training.
        seed: Of order and initial weights.
        device: Where to train.
    """
    train, scale = splits.train, TargetScale.of(splits.train.targets, splits.real)
    targets = scale.standardised(train.targets).to(device)
    real = torch.from_numpy(splits.real).to(device)
    pools = AttentivePools(cls.shape[1], len(real), len(LEARNING_RATES), seed).to(device)
    optimizer = _optimizer(pools)
    batch_size = min(BATCH_SIZE, len(train.rows))
    with progress_bar(total=steps, unit="step", desc="attentive") as bar:
        for step in range(steps):
            places = batch_places(step, batch_size, len(train.rows), seed)
            tokens = _tokens(cls, patch_tokens, train.rows[places]).to(device)
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * cosine_factor(step, steps)
            losses = known_losses(pools(tokens), targets[torch.from_numpy(places)], real)
            optimizer.zero_grad()
            # The sum over candidates, so that each has its own gradient.
            losses.mean(dim=1).sum().backward()
            optimizer.step()
            bar.update()
    pools.eval()
    judged = _outputs(pools, cls, patch_tokens, splits.validate.rows, device)
    known = scale.standardised(splits.validate.targets).numpy()
    scores = np.stack([validation_scores(known, outputs, splits.real) for outputs in judged])
    chosen = choose(scores, splits.real)
    tested = _outputs(pools, cls, patch_tokens, splits.test_rows, device)
    settings: dict[str, Any] = {
        "chosen": {kind: {"learning_rate": LEARNING_RATES[c]} for kind, c in chosen.items()},
        "heads": pools.heads,
        "steps": steps,
        "batch_size": batch_size,
    }
    return TrainedProbe(scale.predictions(chosen_outputs(tested, chosen, splits.real)), settings)


def _optimizer(pools: AttentivePools) -> torch.optim.AdamW:
    groups = [
        {
            "params": [p for p in part.parameters() if (p.ndim > 1) == decays],
            "weight_decay": WEIGHT_DECAY if decays else 0.0,
            "rate": rate,
        }
        for part, rate in zip(pools.parts, LEARNING_RATES, strict=True)
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups)


def _tokens(cls: np.ndarray, patch_tokens: np.ndarray, rows: np.ndarray) -> Tensor:
    """CLS and patch tokens, float32 [B, 1 + h*w, D]."""
    patches = patch_tokens[rows].reshape(len(rows), -1, cls.shape[1]).astype(np.float32)
    return torch.from_numpy(np.concatenate([cls[rows][:, None].astype(np.float32), patches], 1))


@torch.no_grad()
def _outputs(
    pools: AttentivePools,
    cls: np.ndarray,
    patch_tokens: np.ndarray,
    rows: np.ndarray,
    device: torch.device,
) -> np.ndarray:
    """Outputs of every candidate, [R, n, K]."""
    parts = []
    for start in range(0, len(rows), _TESTED_AT_ONCE):
        tokens = _tokens(cls, patch_tokens, rows[start : start + _TESTED_AT_ONCE])
        parts.append(pools(tokens.to(device)).cpu().numpy())
    return np.concatenate(parts, axis=1)
