"""Training of a report model in stages: the projector alone, then with the language model.

What a step does is a function of (seed, stage, step): an interrupted training resumes exactly.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from selfray.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    rotate,
    save_checkpoint,
)
from selfray.data.dataset import write_atomically
from selfray.errors import InputError, RunStopped
from selfray.evals.report_model import EncodedExamples, ReportModel
from selfray.evals.report_words import learn_words
from selfray.evals.stepwise import Purpose, cosine_factor, generator_at
from selfray.progress import progress_bar

# Batches whose examples are sorted by length together, so that a batch has texts of about one
# length while the order stays random beyond that; transformers' group_by_length takes up to 50.
_WINDOW = 16
_CLIP = 1.0  # largest gradient norm: the default of transformers' Trainer, with which LLaVA trains
_BETAS = (0.9, 0.999)  # likewise


@dataclass(frozen=True)
class TrainingStage:
    """One stage of a training.

    Attributes:
        trained: Of the language model, beside the projector: none, lora or full.
        steps: > 0.
        learning_rate: Peak of the cosine.
        warmup: Share of the steps for linear warm-up.
        weight_decay: Of matrices.
        lora: Rank, alpha, dropout and targets of the adapters, by peft's names; empty without.
        projector: Whether the projector is trained, too.
    """

    trained: Literal["none", "lora", "full"]
    steps: int
    learning_rate: float
    warmup: float = 0.03
    weight_decay: float = 0.0
    lora: dict[str, Any] | None = None
    projector: bool = True


@dataclass(frozen=True)
class TrainedReportModel:
    """What came of a training.

    Attributes:
        step: Of the lowest validation loss within the last stage, whose weights the model has.
        checks: A record of each check: `step`, `stage`, `loss` (mean over the steps since the last
            check), `validation_loss` (nats a token) and `tokens_per_second`.
    """

    step: int
    checks: list[dict[str, Any]]


def length_buckets(
    lengths: np.ndarray, batch_size: int, seed: int, which_pass: int
) -> list[np.ndarray]:
    """One pass over the examples in batches of similar lengths.

    Args:
        lengths: int [n].
        batch_size: >= 1; n where there are fewer examples.
        seed: Of the training.
        which_pass: >= 0; each has an order of its own.

    Returns:
        n // batch_size batches, int [batch_size] each; the rest of n waits for another pass.
    """
    generator = generator_at(seed, Purpose.ORDER, which_pass)
    batch_size = min(batch_size, len(lengths))
    order = generator.permutation(len(lengths))[: len(lengths) // batch_size * batch_size]
    batches = []
    for start in range(0, len(order), batch_size * _WINDOW):
        window = order[start : start + batch_size * _WINDOW]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += list(window.reshape(-1, batch_size))
    return [batches[i] for i in generator.permutation(len(batches))]


def train_report_model(
    model: ReportModel,
    train: EncodedExamples,
    validate: EncodedExamples,
    stages: list[TrainingStage],
    *,
    batch_size: int,
    micro_batch: int,
    check_every: int,
    image_dropout: float,
    bfloat16: bool,
    activation_checkpointing: bool,
    seed: int,
    out: Path,
    word_steps: int,
) -> TrainedReportModel:
    """Train; the model ends with the weights of the lowest validation loss in the last stage.

    Patch tokens are scaled by the training images first.

    Args:
        model: On the device to compute on; changed in place.
        train: At least one.
        validate: At least one.
        stages: At least one, in their order.
        batch_size: Examples a step.
        micro_batch: Examples at a time; a batch is computed in parts of this size.
        check_every: Steps between validation losses and checkpoints.
        image_dropout: Probability that an example is learned without its image, which candidates
            of `generate_reports` need.
        bfloat16: Whether matrix products are computed in bfloat16.
        activation_checkpointing: Whether the language model's activations are computed twice, to
            save memory.
        seed: Of order and dropout.
        out: Directory for checkpoints; the same call goes on from the newest one.
        word_steps: Steps for which the projector learns which words a report has, before anything
            else (`learn_words`).

    Raises:
        InputError: `out` belongs to a training with other settings, or the disk is full.
        RunStopped: The loss is not finite.
    """
    _require_examples(train, validate)
    described = _described(train, validate, stages, batch_size, image_dropout, seed)
    record = _Record(out, described | {"word_steps": word_steps})
    if activation_checkpointing:
        model.network.gradient_checkpointing_enable({"use_reentrant": False})
    model.scale_by(train.tokens, train.rows)
    if word_steps:  # also when resuming: a projector that stays is in no checkpoint
        learn_words(model, train, validate, word_steps, seed)
    training = _Training(
        model,
        stages,
        _Computing(model, train, micro_batch, image_dropout, bfloat16),
        _Batches(train.lengths(), batch_size, seed),
        validate,
        record,
        check_every,
        seed,
    )
    training.run()
    return _with_best_weights(model, record)


@dataclass
class _Computing:
    """Losses and gradients of batches."""

    model: ReportModel
    train: EncodedExamples
    micro_batch: int
    image_dropout: float
    bfloat16: bool

    def gradients(self, batch: np.ndarray, step: int, seed: int) -> tuple[float, int]:
        """Fill gradients of the mean loss a target token of a batch.

        Returns:
            That mean, and how many tokens were read and written, visual ones included.
        """
        total = sum(len(self.train.targets[i]) for i in batch)
        mean = 0.0
        with torch.random.fork_rng(devices=self._devices()):
            torch.manual_seed(int(generator_at(seed, Purpose.AUGMENTATION, step).integers(2**63)))
            for start in range(0, len(batch), self.micro_batch):
                part = batch[start : start + self.micro_batch]
                with self._autocast():
                    loss, _ = self.model.loss_sum(self.train, part, self.image_dropout)
                (loss / total).backward()
                mean += float(loss.detach()) / total
        visual = self.model.visual_count(self.train.tokens)
        texts = sum(len(self.train.prompts[i]) for i in batch) + total
        return mean, texts + visual * len(batch)

    @torch.inference_mode()
    def mean_loss(self, examples: EncodedExamples) -> float:
        """Mean loss a target token, without dropout."""
        training = self.model.training
        self.model.eval()
        order = np.argsort(examples.lengths(), kind="stable")
        loss, tokens = 0.0, 0
        for start in range(0, len(order), self.micro_batch):
            with self._autocast():
                part, count = self.model.loss_sum(examples, order[start : start + self.micro_batch])
            loss, tokens = loss + float(part), tokens + count
        self.model.train(training)
        return loss / tokens

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16)

    def _devices(self) -> list[torch.device]:
        return [self.model.device] if self.model.device.type == "cuda" else []


@dataclass
class _Batches:
    """Which examples a step sees."""

    lengths: np.ndarray
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        self._pass, self._batches = -1, []

    def at(self, step: int) -> np.ndarray:
        a_pass = len(self.lengths) // min(self.batch_size, len(self.lengths))
        which, place = divmod(step, a_pass)
        if which != self._pass:
            self._pass = which
            self._batches = length_buckets(self.lengths, self.batch_size, self.seed, which)
        return self._batches[place]


class _StageState:
    """What a stage trains, and its optimizer."""

    def __init__(self, model: ReportModel, stage: TrainingStage, which: int, seed: int) -> None:
        self.stage, self.which = stage, which
        model.network.requires_grad_(stage.trained == "full")
        model.projector.layers.requires_grad_(stage.projector)
        model.fully_trained |= stage.trained == "full"
        if stage.trained == "lora":
            model.add_lora(seed=seed, **(stage.lora or {}))
        model.train()
        model.network.train(stage.trained != "none")
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        matrices = [p for p in self.weights.values() if p.ndim > 1]
        others = [p for p in self.weights.values() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": stage.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=_BETAS)

    def optimizer_at(self, step: int) -> None:
        """Set the learning rate of a step of this stage."""
        warmup = round(self.stage.warmup * self.stage.steps)
        factor = cosine_factor(step, self.stage.steps, warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.learning_rate * factor

    def apply(self) -> None:
        torch.nn.utils.clip_grad_norm_(list(self.weights.values()), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Weights by `weights.NAME`, the optimizer's by `optimizer.KEY.NAME`."""
        kept: dict[str, Tensor] = {
            f"weights.{name}": weight for name, weight in self.weights.items()
        }
        for name, weight in self.weights.items():
            for key, value in self.optimizer.state[weight].items():
                kept[f"optimizer.{key}.{name}"] = value
        return kept

    def put_back(self, tensors: dict[str, Tensor]) -> None:
        put_weights_back(self.weights, tensors)
        for name, weight in self.weights.items():
            # The optimizer counts steps on the CPU, wherever the weights are.
            self.optimizer.state[weight] = {
                key: value if key == "step" else value.to(weight.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if (value := tensors.get(f"optimizer.{key}.{name}")) is not None
            }


@dataclass
class _Training:
    """The steps of all stages, from the newest checkpoint on."""

    model: ReportModel
    stages: list[TrainingStage]
    computing: _Computing
    batches: _Batches
    validate: EncodedExamples
    record: _Record
    check_every: int
    seed: int

    def __post_init__(self) -> None:
        self._ends = np.cumsum([stage.steps for stage in self.stages]).tolist()
        self._state, self._step = self._resumed()
        self._forget()

    def run(self) -> None:
        last = self._ends[-1]
        with progress_bar(total=last, initial=self._step, unit="step", desc="report model") as bar:
            while self._step < last:
                self._learn()
                bar.update()
                if self._step % self.check_every == 0 or self._step in self._ends:
                    bar.set_postfix(validation=f"{self._check():.3f}")

    def _learn(self) -> None:
        """One step; a stage begins with a fresh optimizer."""
        which = self._stage_of(self._step)
        if self._state is None or self._state.which != which:
            self._state = _StageState(self.model, self.stages[which], which, self.seed)
        self._state.optimizer_at(self._step - (self._ends[which - 1] if which else 0))
        batch = self.batches.at(self._step)
        loss, count = self.computing.gradients(batch, self._step, self.seed)
        if not math.isfinite(loss):
            raise RunStopped(
                f"the loss of the report model is {loss} at step {self._step}. Lower the learning "
                "rate, or set --report.precision float32."
            )
        self._state.apply()
        self._losses.append(loss)
        self._tokens += count
        self._step += 1

    def _check(self) -> float:
        """Keep the weights with their validation loss, which is returned."""
        assert self._state is not None
        check = {
            "step": self._step,
            "stage": self._state.which,
            "loss": float(np.mean(self._losses)),
            "validation_loss": self.computing.mean_loss(self.validate),
            "tokens_per_second": self._tokens / (perf_counter() - self._began),
        }
        self.record.keep(check, self._state.tensors())
        self._forget()
        return check["validation_loss"]

    def _forget(self) -> None:
        """Begin the means of the next check."""
        self._losses: list[float] = []
        self._tokens, self._began = 0, perf_counter()

    def _resumed(self) -> tuple[_StageState | None, int]:
        checkpoint = self.record.newest()
        if checkpoint is None:
            return None, 0
        which = self._stage_of(checkpoint.step - 1)
        state = _StageState(self.model, self.stages[which], which, self.seed)
        state.put_back(checkpoint.tensors)
        return state, checkpoint.step

    def _stage_of(self, step: int) -> int:
        return next(which for which, end in enumerate(self._ends) if step < end)


@dataclass
class _Record:
    """The directory of a training: its checkpoints and its checks."""

    out: Path
    described: dict[str, Any]

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.checks: list[dict[str, Any]] = []
        file = self.out / "training.json"
        # As it will be read back, in which tuples are lists.
        self.described = json.loads(json.dumps(self.described))
        if not file.exists():
            write_atomically(file, json.dumps(self.described, indent=2).encode())
        found = json.loads(file.read_bytes())
        differing = sorted(k for k in self.described if found.get(k) != self.described[k])
        if differing:
            raise InputError(
                f"{self.out} has the training of a report model with other {', '.join(differing)}. "
                "Give another output, or remove it to begin anew."
            )

    def newest(self) -> Checkpoint | None:
        checkpoint, damaged = load_newest(self.out / "checkpoints")
        for line in damaged:
            print(line, file=sys.stderr)
        if checkpoint is not None:
            checks = json.loads((self.out / "checks.json").read_bytes())
            self.checks = [check for check in checks if check["step"] <= checkpoint.step]
        return checkpoint

    def keep(self, check: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Write the checks, then the checkpoint; older ones go, but the best."""
        self.checks.append(check)
        write_atomically(self.out / "checks.json", json.dumps(self.checks, indent=2).encode())
        save_checkpoint(self.out / "checkpoints", check["step"], tensors)
        rotate(self.out / "checkpoints", 1, {self.best_step()})

    def best_step(self) -> int:
        """Of the lowest validation loss of the newest stage, of equals the first."""
        stage = self.checks[-1]["stage"]
        finite = [c for c in self.checks if c["stage"] == stage]
        return min(finite, key=lambda check: check["validation_loss"])["step"]


def put_weights_back(weights: dict[str, torch.nn.Parameter], tensors: dict[str, Tensor]) -> None:
    """Give parameters the values that a checkpoint has under `weights.NAME`."""
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[f"weights.{name}"])


def _require_examples(train: EncodedExamples, validate: EncodedExamples) -> None:
    for name, count in (("train", len(train.rows)), ("validate", len(validate.rows))):
        if not count:
            raise InputError(
                f"the {name} split has no image with a report, and a report model needs them in "
                "train and validate. Give the dataset reports, or another split."
            )


def _with_best_weights(model: ReportModel, record: _Record) -> TrainedReportModel:
    best = record.best_step()
    directory = next(p for s, p in list_checkpoints(record.out / "checkpoints") if s == best)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    put_weights_back(trained, load_checkpoint(directory).tensors)
    model.eval()
    return TrainedReportModel(best, record.checks)


def _described(
    train: EncodedExamples,
    validate: EncodedExamples,
    stages: list[TrainingStage],
    batch_size: int,
    image_dropout: float,
    seed: int,
) -> dict[str, Any]:
    """What must be equal for a training to be gone on with."""
    texts = hashlib.sha256()
    for examples in (train, validate):
        texts.update(json.dumps([examples.prompts, examples.targets]).encode())
        texts.update(examples.rows.astype(np.int64).tobytes())
    return {
        "stages": [asdict(stage) for stage in stages],
        "batch_size": batch_size,
        "image_dropout": image_dropout,
        "seed": seed,
        "examples": texts.hexdigest(),
    }
