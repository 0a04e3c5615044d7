"""Patch tokens of a frozen encoder → projector → causal language model → report.

LLaVA's layout: the projected patch tokens stand among the embeddings of the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SCALED_BY = 1000  # images, spread evenly over the training images

FitTarget = Callable[[str, Callable[[str], bool]], tuple[str, bool]]
"""From a text and `fits(part of it)` to the longest part that fits, and whether it was cut."""


@dataclass(frozen=True)
class ReportExamples:
    """Images with the prompt and the text that belong to each.

    Attributes:
        tokens: Patch tokens of all images, [N, h, w, D], may be memory-mapped.
        rows: int [n], which image each example has; an image may come several times.
        prompts: n texts, what is known before the image is read; may be empty.
        targets: n texts, what is to be written.
    """

    tokens: np.ndarray
    rows: np.ndarray
    prompts: Sequence[str]
    targets: Sequence[str]


@dataclass(frozen=True)
class EncodedExamples:
    """Examples as tokens of the language model.

    Attributes:
        tokens: As in `ReportExamples`.
        rows: As in `ReportExamples`.
        prompts: Token ids from the visual tokens to the report, n lists.
        targets: Token ids of the report with the end token, n lists, none empty.
        cut: How many targets were too long and end early.
        cut_prompts: How many prompts were too long and end early.
    """

    tokens: np.ndarray
    rows: np.ndarray
    prompts: list[list[int]]
    targets: list[list[int]]
    cut: int
    cut_prompts: int = 0

    def lengths(self) -> np.ndarray:
        """Tokens of prompt and target, int [n]."""
        pairs = zip(self.prompts, self.targets, strict=True)
        return np.array([len(prompt) + len(target) for prompt, target in pairs])


class Projector(nn.Module):
    """From patch tokens to the embeddings of a language model.

    Args:
        width: D of the patch tokens.
        hidden: H of the language model's embeddings.
        depth: Linear layers, >= 1, with GELU between them.
    """

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.zeros(1, width))
        self.std = nn.Buffer(torch.ones(width))
        layers: list[nn.Module] = [nn.Linear(width, hidden)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden, hidden)]
        self.layers = nn.Sequential(*layers)
        self.no_image = nn.Parameter(torch.zeros(hidden))

    def scale_by(self, patches: Tensor) -> None:
        """Take the mean of each place and channel, and the spread around it of each channel.

        Radiographs look alike: what differs between them is a small part of a patch token, and
        is what the language model must read.

        Args:
            patches: Of training images, [N, V, D].
        """
        self.mean = patches.mean(dim=0)
        # A channel that never changes must not be divided by 0.
        self.std = (patches - self.mean).square().mean(dim=(0, 1)).sqrt().clamp_min(1e-6)

    def forward(self, patches: Tensor, seen: Tensor) -> Tensor:
        """Patch tokens [B, V, D] to [B, V, H]; where not `seen`, bool [B], no image instead."""
        scaled = (patches - self.mean) / self.std
        return torch.where(seen[:, None, None], self.layers(scaled), self.no_image)


class ReportModel(nn.Module):
    """A projector in front of a language model.

    Args:
        language: The language model, whose network becomes part of this module.
        width: D of the patch tokens.
        visual_side: Patch tokens are averaged to a grid of this side; 0 keeps all.
        projector_layers: Linear layers, >= 1, with GELU between them.
        seed: Of the projector's fresh weights.
    """

    def __init__(
        self,
        language: LanguageModel,
        width: int,
        *,
        visual_side: int,
        projector_layers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.language, self.width, self.visual_side = language, width, visual_side
        self.projector_layers, self.fully_trained = projector_layers, False
        self.network: Any = language.network
        hidden = int(self.network.get_input_embeddings().weight.shape[1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = Projector(width, hidden, projector_layers)

    @property
    def device(self) -> torch.device:
        """Where the projector is."""
        return next(self.projector.parameters()).device

    def visual(self, tokens: np.ndarray, seen: Tensor) -> Tensor:
        """Projected patch tokens.

        Args:
            tokens: [B, h, w, D].
            seen: bool [B], whether the image is shown.

        Returns:
            [B, V, H], V = visual_side² or h w, row by row.
        """
        return self.projector(self._patches(tokens), seen)

    def scale_by(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        """Scale patch tokens as those of training images are, of `_SCALED_BY` at most.

        Args:
            tokens: [N, h, w, D].
            rows: Training images, int [n].
        """
        spread = np.unique(rows)[:: -(-len(np.unique(rows)) // _SCALED_BY)]
        self.projector.scale_by(self._patches(tokens[spread]))

    def _patches(self, tokens: np.ndarray) -> Tensor:
        patches = torch.from_numpy(np.asarray(tokens)).to(self.device).float()
        if self.visual_side:
            side = (self.visual_side, self.visual_side)
            patches = F.adaptive_avg_pool2d(patches.movedim(-1, 1), side).movedim(1, -1)
        return patches.flatten(1, 2)

    def image_keys(self, tokens: np.ndarray) -> list[int]:
        """A number for each image that depends on its content alone, for what is drawn at random.

        Bits say on which side of the training images' mean 64 channels lie, on average over
        the places, so that rounding by another batch or machine next to never changes them.

        Args:
            tokens: [B, h, w, D].

        Returns:
            B numbers, 0 to 2**64 - 1.
        """
        apart = (self._patches(tokens) - self.projector.mean).mean(dim=1)[:, :64]
        above = (apart > 0).cpu().numpy()
        return [int("".join("1" if bit else "0" for bit in row), 2) for row in above]

    def visual_count(self, tokens: np.ndarray) -> int:
        """How many visual tokens an image of [N, h, w, D] has."""
        return self.visual_side**2 or tokens.shape[1] * tokens.shape[2]

    def embeddings(self, tokens: np.ndarray, texts: list[list[int]], seen: Tensor) -> Tensor:
        """What the language model reads: start, visual tokens, text; filled up on the right.

        Nothing looks back at what is filled up, since attention is causal.

        Args:
            tokens: [B, h, w, D].
            texts: B lists of token ids after the visual tokens.
            seen: bool [B], whether the image is shown.

        Returns:
            [B, L, H].
        """
        longest = max(len(ids) for ids in texts)
        filled = [ids + [self.language.pad_id] * (longest - len(ids)) for ids in texts]
        before = self.language.before_image()
        ids = torch.tensor([before + row for row in filled], device=self.device)
        embedded = self.network.get_input_embeddings()(ids)
        visual = self.visual(tokens, seen).to(embedded.dtype)
        return torch.cat([embedded[:, : len(before)], visual, embedded[:, len(before) :]], dim=1)

    def add_lora(
        self, *, rank: int, alpha: float, dropout: float, targets: tuple[str, ...], seed: int
    ) -> None:
        """Give the language model low-rank adapters, which alone of it are trained.

        Args:
            rank: >= 1.
            alpha: The adapters' part is scaled by alpha / rank.
            dropout: Before the adapters, 0 to 1.
            targets: Names of linear layers, or `all-linear` alone.
            seed: Of the adapters' fresh weights.

        Reference:
            Hu et al., LoRA, ICLR 2022.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]
            lora_dropout=dropout,
            target_modules="all-linear" if targets == ("all-linear",) else list(targets),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = get_peft_model(self.network, config)  # type: ignore[arg-type]

    def open_lora(self, directory: Path) -> None:
        """Put adapters that were saved on the language model."""
        from peft import PeftModel

        self.network = PeftModel.from_pretrained(self.network, str(directory))  # type: ignore

    def merged_network(self) -> PreTrainedModel:
        """A copy of the language model with its adapters merged into its weights."""
        return copy.deepcopy(self.network).merge_and_unload()  # type: ignore[operator]

    def loss_sum(
        self, examples: EncodedExamples, chosen: np.ndarray, image_dropout: float = 0.0
    ) -> tuple[Tensor, int]:
        """Cross-entropy of the targets' tokens, summed.

        Args:
            examples: All examples.
            chosen: Which of them, int [B].
            image_dropout: Probability that an image is not shown.

        Returns:
            The sum, scalar float32, and how many tokens it is over.
        """
        targets = [examples.targets[i] for i in chosen]
        seen = (torch.rand(len(chosen)) >= image_dropout).to(self.device)
        tokens = examples.tokens[examples.rows[chosen]]
        losses = self.losses(tokens, [examples.prompts[i] for i in chosen], targets, seen)
        return losses.sum(), sum(len(target) for target in targets)

    def losses(
        self, tokens: np.ndarray, prompts: list[list[int]], targets: list[list[int]], seen: Tensor
    ) -> Tensor:
        """Cross-entropy of each target, summed over its tokens.

        Logits are computed only where some target of the batch has a token.

        Args:
            tokens: [B, h, w, D].
            prompts: B lists of token ids.
            targets: B lists of token ids, none empty.
            seen: bool [B], whether the image is shown.

        Returns:
            float32 [B], nats.
        """
        # The last token is only predicted, never read.
        texts = [prompt + target[:-1] for prompt, target in zip(prompts, targets, strict=True)]
        embedded = self.embeddings(tokens, texts, seen)
        start = embedded.shape[1] - max(len(ids) for ids in texts)
        first = start + min(len(prompt) for prompt in prompts) - 1
        places = torch.arange(first, embedded.shape[1], device=self.device)
        logits = self.network(inputs_embeds=embedded, use_cache=False, logits_to_keep=places).logits
        labels = torch.full(logits.shape[:2], -100)
        for row, (prompt, target) in enumerate(zip(prompts, targets, strict=True)):
            begin = start + len(prompt) - 1 - first
            labels[row, begin : begin + len(target)] = torch.tensor(target)
        labels = labels.to(self.device)
        wanted = labels >= 0
        each = F.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none")
        rows = wanted.nonzero()[:, 0]
        return torch.zeros(len(tokens), device=self.device).index_add(0, rows, each)


def encode_examples(
    model: ReportModel, examples: ReportExamples, max_target_tokens: int, fit_target: FitTarget
) -> EncodedExamples:
    """Turn texts into tokens.

    Args:
        model: Whose tokenizer is taken.
        examples: Every target has text.
        max_target_tokens: Of a target, its end token included, >= 2.
        fit_target: Cuts a target that is longer; what it returns is cut once more, by tokens, if
            it still does not fit. Cuts a prompt for which the positions do not suffice, too.

    Raises:
        InputError: An empty target; or an example that is longer than the language model's
            positions.
    """
    language = model.language
    texts, cut_prompts = fit_prompts(
        model, examples.prompts, model.visual_count(examples.tokens), max_target_tokens, fit_target
    )
    prompts = [language.after_image(prompt) for prompt in texts]
    targets, cut = [], 0

    def fits(text: str) -> bool:
        return len(language.text_ids(text)) < max_target_tokens

    for place, text in enumerate(examples.targets):
        if not text.strip():
            raise InputError(
                f"example {place} of the reports has an empty target. Leave images without one out."
            )
        ids = language.text_ids(text)
        if len(ids) >= max_target_tokens:
            ids = language.text_ids(fit_target(text, fits)[0])[: max_target_tokens - 1]
            cut += 1
        targets.append([*ids, language.end_id])
    encoded = EncodedExamples(examples.tokens, examples.rows, prompts, targets, cut, cut_prompts)
    _require_positions(model, encoded)
    return encoded


def fit_prompts(
    model: ReportModel, prompts: Sequence[str], visual: int, report: int, fit: FitTarget
) -> tuple[list[str], int]:
    """Cut the prompts for which the language model's positions do not suffice.

    Args:
        model: Whose tokenizer and positions count.
        prompts: Texts, of any length.
        visual: Visual tokens of an image.
        report: Tokens of a report, at most.
        fit: Cuts a prompt.

    Returns:
        The prompts, and how many were cut.
    """
    language = model.language
    room = language.prompt_room(visual, report)

    def fits(text: str) -> bool:
        return room is None or len(language.text_ids(text)) <= room

    found = [(text, False) if fits(text) else fit(text, fits) for text in prompts]
    return [text for text, _ in found], sum(cut for _, cut in found)


def _require_positions(model: ReportModel, examples: EncodedExamples) -> None:
    known = getattr(model.network.config, "max_position_embeddings", None)
    texts = int(examples.lengths().max(initial=0))
    visual = model.visual_count(examples.tokens)
    needed = len(model.language.before_image()) + visual + texts
    if known is not None and needed > known:
        raise InputError(
            f"the language model knows {known} positions, and the longest example has {needed}: "
            f"{visual} visual tokens, {needed - visual} of text. Lower --report.visual-tokens or "
            "--report.max-target-tokens."
        )
