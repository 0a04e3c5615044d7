"""Pre-training on images alone: read `pretrain` from top to bottom and you have the method."""

from __future__ import annotations

import ctypes
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from selfray import distributed
from selfray.checkpoint import load_newest, rotate, save_checkpoint
from selfray.config import PretrainConfig, validate
from selfray.data.crops import MultiCrop
from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.data.loader import BATCHES_HELD, CropBatch, CropLoader
from selfray.data.sampler import Purpose, generator_at
from selfray.errors import InputError, Interrupted, RunStopped
from selfray.initialise import initialise
from selfray.objectives.optimizer import (
    build_optimizer,
    clip_gradients,
    load_optimizer_tensors,
    optimizer_tensors,
    set_rates,
)
from selfray.objectives.schedules import cosine, linear
from selfray.objectives.student_teacher import StudentTeacher
from selfray.probe import Probe
from selfray.progress import progress_bar
from selfray.run_directory import RunDirectory
from selfray.run_encoder import write_run_encoder


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
    validate(config)
    device = distributed.start()
    datasets = open_data(config)
    run = RunDirectory(out, config, [d.fingerprint for d in datasets], resume)
    if run.done:
        _say(f"{out} is finished ({(out / 'DONE').read_text().strip()}); nothing to do.")
        return out
    slots = _slots_of_rank(config)
    _require_memory(config, slots.stop - slots.start)
    loader = build_loader(config, datasets, slots)
    networks, origins, fresh_head = initialise(config)
    networks.to(device)
    optimizer = build_run_optimizer(config, networks)
    probe = _build_probe(config, datasets, device)
    distributed.barrier()  # every rank has looked at the run directory
    if distributed.rank() == 0:
        run.begin()
    first = _restore(run, networks, optimizer, origins)
    _keep_freed_memory()
    cv2.setNumThreads(1)
    frozen_steps = config.head_warmup if fresh_head else 0
    alarm = CollapseAlarm(config.heads.prototypes)
    autocast = _autocast(config, device)

    with _signals() as interrupted, _progress(config.steps, first) as bar:
        if first == 0:
            _probe(run, probe, networks, 0)
        batches = loader.batches(first, config.steps)
        for step in range(first, config.steps):
            began = time.perf_counter()
            batch = next(batches)
            values = scheduled(config, step, frozen_steps)
            torch.manual_seed(_torch_seed(config.seed, step))
            terms = _step(networks, optimizer, _on(batch, device), config, values, autocast)
            record = {k: float(v) for k, v in terms.items()} | values.record()
            _require_finite(run, step, record, batch)
            record |= _speed(config.batch_size, time.perf_counter() - began)
            if distributed.rank() == 0:
                alarm.watch(step + 1, record)
                run.append({"kind": "step", "step": step + 1, **record,
                            "bad_images": batch.bad_images})  # fmt: skip
            _show(bar, record)

            done = step + 1
            last = done == config.steps
            probe_due = bool(config.evaluate_every) and (last or not done % config.evaluate_every)
            if probe_due:
                _probe(run, probe, networks, done)
                # Before saving: killed in between, a resumed run probes and judges this step again.
                _guard(run, config.guard)
            stop = distributed.any_rank(bool(interrupted), device)
            if probe_due or stop or last or done == 1 or not done % config.checkpoint_every:
                _save(run, done, networks, optimizer, config.keep_checkpoints)
            if stop and not last:
                raise Interrupted(f"stopped at step {done}, state saved; the same command resumes")
    return _finish(run, networks, config)


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

    Published encoders lie far from these bounds or near them: on radiographs the mean cosine is
    0.05 for RAD-DINO and 0.95 for DINOv2, which never saw one. It is an alarm, not a verdict:
    only the probe judges.

    Args:
        prototypes: Width K of the head; the entropy of uniform targets is ln K.
    """

    _PATIENCE = 50  # steps in a row
    _COSINE = 0.99
    _ENTROPY_SHARE = 0.99

    def __init__(self, prototypes: int) -> None:
        self._uniform = math.log(prototypes)
        self._streak = 0

    def watch(self, step: int, record: dict[str, float]) -> None:
        """Look at one step's record; warns once in each streak of bad steps."""
        collapsed = record["mean_cosine"] > self._COSINE
        uniform = record["teacher_entropy"] > self._ENTROPY_SHARE * self._uniform
        self._streak = self._streak + 1 if collapsed or uniform else 0
        if self._streak == self._PATIENCE:
            what = (
                f"CLS tokens of different images have mean cosine {record['mean_cosine']:.3f}"
                if collapsed
                else f"teacher targets are nearly uniform ({record['teacher_entropy']:.2f} of "
                f"{self._uniform:.2f} nats)"
            )
            _say(
                f"warning: step {step}: {what} for {self._PATIENCE} steps: the encoder may be "
                "collapsing. Compare the probe (--evaluate-every); try a lower "
                "loss.teacher-temperature, loss.centering sinkhorn or fewer heads.prototypes."
            )


def open_data(config: PretrainConfig) -> list[RadiographDataset]:
    """Open the run's datasets, and refuse images that are smaller than a global crop.

    Raises:
        InputError: No data, not a dataset, the same twice, or images too small.
    """
    if not config.data:
        raise InputError("no data. Give --data DIR, made by `selfray ingest` or `selfray phantom`.")
    datasets = [RadiographDataset(path) for path in config.data]
    if len({dataset.fingerprint for dataset in datasets}) < len(datasets):
        raise InputError("--data names the same dataset twice. Name each once.")
    for dataset in datasets:
        sides = [min(dataset.pixels(row).shape) for row in range(min(16, len(dataset)))]
        if min(sides) < config.crops.global_size:
            raise InputError(
                f"{dataset.directory} has images of {min(sides)} pixels, smaller than "
                f"crops.global_size {config.crops.global_size}. Make the dataset with --size "
                f"{config.crops.global_size} or more, or set a smaller --crops.global-size."
            )
    return datasets


def build_run_optimizer(config: PretrainConfig, networks: StudentTeacher) -> torch.optim.AdamW:
    """The optimizer of a run's student."""
    return build_optimizer(
        networks.student,
        depth=networks.depth,
        layer_decay=config.optimizer.layer_decay,
        patch_embed_factor=config.optimizer.patch_embed_factor,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
    )


def _build_probe(
    config: PretrainConfig, datasets: list[RadiographDataset], device: torch.device
) -> Probe:
    probe = Probe(datasets, config, device)
    if config.guard and not probe.judges_findings:
        raise InputError(
            "guard needs findings labelled in splits train and validate, and the data has none. "
            "Give data that has, or set --guard 0."
        )
    return probe


def _slots_of_rank(config: PretrainConfig) -> slice:
    slots = distributed.slice_of_batch(config.batch_size)
    if (slots.stop - slots.start) % config.engine.accumulate:
        raise InputError(
            f"a rank's {slots.stop - slots.start} images of batch_size {config.batch_size} cannot "
            f"be cut into engine.accumulate {config.engine.accumulate} equal parts. Change one of "
            "them, or the number of ranks."
        )
    return slots


def _require_memory(config: PretrainConfig, images: int) -> None:
    """Refuse crops that cannot be held, before the system begins to swap."""
    c = config.crops
    pixels = images * (2 * c.global_size**2 + c.local_count * c.local_size**2)
    needed, free = pixels * BATCHES_HELD, psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"the crops of batch_size {config.batch_size} take {needed / 2**30:,.0f} GiB on a rank "
            f"(8 bit, {BATCHES_HELD} batches at a time), and {free / 2**30:,.0f} GiB of memory are "
            "free. Lower batch_size or crops.local_count."
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
    autocast: Any,
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
    with autocast:
        targets, watched = networks.teacher_targets(parts, values.teacher_temperature)
    sums: dict[str, Tensor] = {}
    for part, target in zip(parts, targets, strict=True):
        with autocast:
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


def _restore(
    run: RunDirectory,
    networks: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    origins: list[str],
) -> int:
    """Take up the newest whole checkpoint, or say where fresh tensors came from; steps done."""
    checkpoint, damaged = load_newest(run.checkpoints)
    for line in damaged:
        _say(f"warning: {line}; the one before is used")
    if checkpoint is None:
        for line in origins:
            _say(line)
        if distributed.rank() == 0:
            run.truncate_metrics(-1)
        return 0
    put_back(networks, optimizer, checkpoint.tensors)
    if distributed.rank() == 0:
        run.truncate_metrics(checkpoint.step)
    _say(f"resuming {run.path} at step {checkpoint.step}")
    return checkpoint.step


def state_tensors(networks: StudentTeacher, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a step changes, by name."""
    state = {f"networks.{name}": tensor for name, tensor in networks.state_dict().items()}
    for name, tensor in optimizer_tensors(optimizer, networks.student).items():
        state[f"optimizer.{name}"] = tensor
    return state


def put_back(
    networks: StudentTeacher, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Undo `state_tensors`."""
    of = lambda prefix: {  # noqa: E731
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    networks.load_state_dict(of("networks."))
    load_optimizer_tensors(optimizer, networks.student, of("optimizer."))


def _save(
    run: RunDirectory,
    step: int,
    networks: StudentTeacher,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Write a checkpoint; the first one is read back, so that a bad save shows at step 1."""
    if distributed.rank() == 0:
        run.sync_metrics()
        save_checkpoint(run.checkpoints, step, state_tensors(networks, optimizer))
        if step == 1:
            load_newest(run.checkpoints)
        best = run.mark_best()
        rotate(run.checkpoints, keep, set() if best is None else {best})
    distributed.barrier()


def _probe(run: RunDirectory, probe: Probe, networks: StudentTeacher, step: int) -> None:
    """Judge the teacher with frozen features, and export it when it is the best so far."""
    if probe.possible and run.config.evaluate_every and distributed.rank() == 0:
        scores = probe(networks)
        run.append({"kind": "probe", "step": step, **scores})
        best = run.mark_best()
        if best == step:
            write_run_encoder(run, networks, step)
        if scores["macro_auroc"] is not None:
            score = f"step {step}: validation macro-AUROC {scores['macro_auroc']:.3f}"
            _say(score if best is None else f"{score}, best at step {best}")
    distributed.barrier()


def _guard(run: RunDirectory, margin: float) -> None:
    """Finish the run here when the probe fell below the start by more than the margin, if any."""
    probes = run.probes()
    if margin and probes and probes[0]["macro_auroc"] - probes[-1]["macro_auroc"] > margin:
        fell = (
            f"guard: the probe fell from {probes[0]['macro_auroc']:.3f} at step 0 to "
            f"{probes[-1]['macro_auroc']:.3f} at step {probes[-1]['step']}, more than the margin "
            f"{margin}; encoder of step {run.mark_best()}, the best"
        )
        if distributed.rank() == 0:
            run.finish(fell)
        distributed.barrier()
        raise RunStopped(
            f"{fell}, is in {run.path / 'encoder'}. To try again, lower the learning rate or raise "
            "--guard, with a new --out."
        )


def _finish(run: RunDirectory, networks: StudentTeacher, config: PretrainConfig) -> Path:
    if distributed.rank() == 0:
        best = run.mark_best()
        if best is None:
            write_run_encoder(run, networks, config.steps)
        which = f"of step {best}, the best probe" if best is not None else "of the last step"
        run.finish(f"{config.steps} steps; encoder {which}")
        _say(f"{run.path / 'encoder'} holds the encoder {which}")
    distributed.barrier()
    return run.path


def _require_finite(
    run: RunDirectory, step: int, record: dict[str, float], batch: CropBatch
) -> None:
    """Stop at a number that is none, and leave behind which step and images gave it."""
    if math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"]):
        return
    where = run.path / f"not_finite_step_{step + 1:08d}_rank_{distributed.rank()}.json"
    content = {"step": step + 1, "values": {k: str(v) for k, v in record.items()},
               "image_ids": batch.image_ids}  # fmt: skip
    write_atomically(where, json.dumps(content, indent=2).encode())
    terms = [name for name, value in record.items() if not math.isfinite(value)]
    raise RunStopped(
        f"step {step + 1}: {', '.join(terms)} not finite. The weights before this step are in the "
        f"newest checkpoint, the images' ids in {where}. Lower optimizer.learning_rate or use "
        "engine.precision float32."
    )


def _on(batch: CropBatch, device: torch.device) -> CropBatch:
    if device.type == "cpu":
        return batch
    move = lambda t: t.pin_memory().to(device, non_blocking=True)  # noqa: E731
    return CropBatch(
        move(batch.global_crops), move(batch.local_crops), move(batch.masks),
        batch.image_ids, batch.bad_images,
    )  # fmt: skip


def _autocast(config: PretrainConfig, device: torch.device) -> Any:
    precision = config.engine.precision
    if precision == "auto":
        fast = (
            torch.cuda.is_bf16_supported()
            if device.type == "cuda"
            else torch.cpu._is_avx512_bf16_supported()
        )
        precision = "bfloat16" if fast else "float32"
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def _torch_seed(seed: int, step: int) -> int:
    """Seed of drop path in one step; ranks differ, since they hold different images."""
    generator = generator_at(seed, Purpose.TORCH, step, distributed.rank())
    return int(generator.integers(0, 2**62))


def _speed(batch_size: int, seconds: float) -> dict[str, float]:
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = psutil.Process().memory_info().rss
    return {"images_per_second": batch_size / seconds, "memory_gib": memory / 2**30}


def _keep_freed_memory() -> None:
    """Let glibc keep freed blocks: returning them to the kernel costs a CPU step a fifth."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
            libc.mallopt(m_mmap_threshold, 2**30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
        except (OSError, AttributeError):
            pass  # another C library: slower, not wrong


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying in the middle of a step."""
    caught: list[int] = []
    old = {
        s: signal.signal(s, lambda number, _: caught.append(number))
        for s in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _progress(steps: int, first: int) -> tqdm:
    return progress_bar(total=steps, initial=first, disable=distributed.rank() != 0,
                        bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}"
                " [{elapsed}, {remaining} left{postfix}]")  # fmt: skip


def _show(bar: tqdm, record: dict[str, float]) -> None:
    bar.set_postfix_str(
        f"loss {record['loss']:.3f}, cosine {record['mean_cosine']:.2f}, "
        f"{record['images_per_second']:.0f} images/s",
        refresh=False,
    )
    bar.update()


def _say(line: str) -> None:
    if distributed.rank() == 0:
        tqdm.write(line, file=sys.stderr)
