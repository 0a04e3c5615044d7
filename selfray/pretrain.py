"""Pre-training on images alone: read `pretrain` from top to bottom and you have the method."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfray import distributed
from selfray.config import PretrainConfig
from selfray.data.crops import MultiCrop
from selfray.data.dataset import RadiographDataset
from selfray.data.loader import CropBatch, CropLoader
from selfray.errors import Interrupted
from selfray.initialise import initialise
from selfray.objectives.optimizer import (
    build_optimizer,
    clip_gradients,
    set_rates,
)
from selfray.objectives.schedules import cosine, linear
from selfray.objectives.student_teacher import StudentTeacher
from selfray.progress import collected_signals
from selfray.run_encoder import write_run_encoder
from selfray.run_loop import (
    StreakAlarm,
    alike,
    autocast,
    begin,
    build_probe,
    finish,
    open_run,
    probe_now,
    require_finite,
    restore,
    save,
    show_step,
    speed,
    step_progress,
    stop_if_fallen,
    torch_seed,
)


def pretrain(config: PretrainConfig, out: Path, *, resume: str = "auto") -> Path:
    """Pre-train an encoder, or go on with an unfinished run.

    Args:
        config: The run. `data` names dataset directories.
        out: Run directory.
        resume: `auto`, `must` (never begins) or `never` (never resumes).

    Returns:
        `out`, with `encoder/` in it.

    Raises:
        InputError: Config, data or run directory are not fit for this.
        Interrupted: SIGINT or SIGTERM; the state is saved.
        RunStopped: The loss is not finite, or the guard found the probe falling.
    """
    opened = open_run(config, out, resume)
    if opened is None:
        return out
    run, datasets, device, slots = opened
    loader = build_loader(config, datasets, slots)
    networks, origins, fresh_head = initialise(config)
    networks.to(device)
    optimizer = build_run_optimizer(config, networks)
    probe = build_probe(config, datasets, device)
    begin(run)
    first = restore(run, networks, optimizer, origins)
    frozen_steps = config.head_warmup if fresh_head else 0
    alarm = CollapseAlarm(config.heads.prototypes)
    precision = autocast(config, device)
    write = partial(write_run_encoder, run, networks)

    with collected_signals() as interrupted, step_progress(config.steps, first) as bar:
        if first == 0:
            probe_now(run, probe, networks, 0, write)
        batches = loader.batches(first, config.steps)
        for step in range(first, config.steps):
            began = time.perf_counter()
            batch = next(batches)
            values = scheduled(config, step, frozen_steps)
            torch.manual_seed(torch_seed(config.seed, step))
            terms = _step(networks, optimizer, _on(batch, device), config, values, precision)
            record = {k: float(v) for k, v in terms.items()} | values.record()
            require_finite(run, step, record, batch.image_ids)
            record |= speed(config.batch_size, time.perf_counter() - began)
            if distributed.rank() == 0:
                alarm.watch(step + 1, record)
                run.append({"kind": "step", "step": step + 1, **record,
                            "bad_images": batch.bad_images})  # fmt: skip
            show_step(bar, record)

            done = step + 1
            last = done == config.steps
            probe_due = bool(config.evaluate_every) and (last or not done % config.evaluate_every)
            if probe_due:
                probe_now(run, probe, networks, done, write)
                # Before saving: killed in between, a resumed run probes and judges this step again.
                stop_if_fallen(run, config.guard)
            stop = distributed.any_rank(bool(interrupted), device)
            if probe_due or stop or last or done == 1 or not done % config.checkpoint_every:
                save(run, done, networks, optimizer, config.keep_checkpoints)
            if stop and not last:
                raise Interrupted(f"stopped at step {done}, state saved; the same command resumes")
    return finish(run, write)


@dataclass(frozen=True)
class Scheduled:
    """The scheduled values of one step."""

    learning_rate: float
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    student_temperature: float
    frozen: tuple[str, ...]

    def record(self) -> dict[str, float]:
        """What goes into the metrics."""
        return {k: v for k, v in asdict(self).items() if k != "frozen"}


def scheduled(config: PretrainConfig, step: int, frozen_steps: int) -> Scheduled:
    """The scheduled values of a step.

    Args:
        config: The run.
        step: 0 to config.steps - 1.
        frozen_steps: Steps at the beginning in which the encoder stays as it is.
    """
    o, steps = config.optimizer, config.steps
    frozen = []
    if step < o.freeze_last_layer * steps:
        frozen.append("prototypes")
    if step < frozen_steps:
        frozen = ["encoder"]  # a fresh head has to learn all of itself
    return Scheduled(
        learning_rate=cosine(
            step, steps, config.peak_learning_rate, o.learning_rate_end, int(o.warmup * steps)
        ),
        weight_decay=cosine(step, steps, *o.weight_decay),
        teacher_momentum=cosine(step, steps, *config.teacher.momentum),
        teacher_temperature=linear(
            step,
            int(config.loss.teacher_temperature_warmup * steps),
            *config.loss.teacher_temperature,
        ),
        student_temperature=config.loss.student_temperature,
        frozen=tuple(frozen),
    )


class CollapseAlarm:
    """Warns when features stop telling images apart, or targets stop saying anything.

    Args:
        prototypes: Width K of the head; the entropy of uniform targets is ln K.
    """

    _ENTROPY_SHARE = 0.99

    def __init__(self, prototypes: int) -> None:
        self._uniform = math.log(prototypes)
        self._alarm = StreakAlarm(
            "try a lower loss.teacher-temperature, loss.centering sinkhorn or fewer "
            "heads.prototypes."
        )

    def watch(self, step: int, record: dict[str, float]) -> None:
        """Look at one step's record; warns once in each streak of bad steps."""
        entropy = record["teacher_entropy"]
        uniform = (
            f"teacher targets are nearly uniform ({entropy:.2f} of {self._uniform:.2f} nats)"
            if entropy > self._ENTROPY_SHARE * self._uniform
            else None
        )
        self._alarm.watch(step, alike(record) or uniform)


def build_run_optimizer(config: PretrainConfig, networks: StudentTeacher) -> torch.optim.AdamW:
    """The optimizer of a run's student."""
    return build_optimizer(
        networks.student,
        depth=networks.depth,
        layer_decay=config.optimizer.layer_decay,
        patch_embed_factor=config.optimizer.patch_embed_factor,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
    )


def build_loader(
    config: PretrainConfig, datasets: list[RadiographDataset], slots: slice
) -> CropLoader:
    """The loader of some slots of each global batch.

    Args:
        config: The run.
        datasets: Its data.
        slots: Which images of a batch are made.

    Raises:
        InputError: No image is for training.
    """
    return CropLoader(
        datasets,
        "train",
        multi_crop=MultiCrop(**asdict(config.crops)),
        grid=config.crops.global_size // config.encoder.patch_size,
        mask_probability=config.masks.probability,
        mask_ratio=config.masks.ratio,
        batch_size=config.batch_size,
        slots=slots,
        seed=config.seed,
        threads=config.engine.loader_threads,
    )


def _step(
    networks: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    batch: CropBatch,
    config: PretrainConfig,
    values: Scheduled,
    precision: Any,
) -> dict[str, Tensor]:
    """One optimizer step; returns the mean of each loss term and what is watched."""
    parts = batch.parts(config.engine.accumulate)
    weights = {
        "dino_global": config.loss.dino_weight,
        "dino_local": config.loss.dino_weight,
        "ibot": config.loss.ibot_weight,
        "koleo": config.loss.koleo_weight,
    }
    networks.student.train()
    with precision:
        targets, watched = networks.teacher_targets(parts, values.teacher_temperature)
    sums: dict[str, Tensor] = {}
    for part, target in zip(parts, targets, strict=True):
        with precision:
            terms = networks.losses(part, target, values.student_temperature, weights)
        loss = torch.stack([weights[name] * term for name, term in terms.items()]).sum() / len(
            parts
        )
        loss.backward()
        for name, term in {**terms, "total": loss.detach() * len(parts)}.items():
            sums[name] = sums.get(name, torch.zeros_like(term)) + term.detach() / len(parts)
    distributed.average_gradients(networks.student.parameters())
    norm = clip_gradients(networks.student, config.optimizer.gradient_clip)
    set_rates(optimizer, values.learning_rate, values.weight_decay, values.frozen)
    finite = torch.isfinite(sums["total"]) & torch.isfinite(norm)
    if finite:
        optimizer.step()
        networks.update_teacher(values.teacher_momentum)
    optimizer.zero_grad(set_to_none=True)
    averaged = {name: distributed.mean_over_ranks(value) for name, value in sums.items()}
    return {
        "loss": averaged.pop("total"),
        **{f"loss_{name}": value for name, value in averaged.items()},
        **{name: distributed.mean_over_ranks(value) for name, value in watched.items()},
        "gradient_norm": norm,
    }


def _on(batch: CropBatch, device: torch.device) -> CropBatch:
    if device.type == "cpu":
        return batch
    move = lambda t: t.pin_memory().to(device, non_blocking=True)  # noqa: E731
    return CropBatch(
        move(batch.global_crops), move(batch.local_crops), move(batch.masks),
        batch.image_ids, batch.bad_images,
    )  # fmt: skip
