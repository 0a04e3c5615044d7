"""What training loops share: set-up, resuming, probing, saving, speed."""

from __future__ import annotations

import ctypes
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from selfray import distributed
from selfray.checkpoint import load_newest, rotate, save_checkpoint
from selfray.config import CropsConfig, RunConfig, validate
from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.data.loader import BATCHES_HELD
from selfray.data.sampler import Purpose, generator_at
from selfray.errors import InputError, RunStopped
from selfray.models.precision import computes_in_bfloat16
from selfray.objectives.optimizer import load_optimizer_tensors, optimizer_tensors
from selfray.probe import Probe, Trained
from selfray.progress import progress_bar
from selfray.run_directory import RunDirectory


class Networks(Trained, Protocol):
    """What a run trains."""

    @property
    def trained(self) -> nn.Module:
        """Holds the parameters that the optimizer moves."""
        ...

    def state_dict(self) -> Mapping[str, Tensor]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any], /) -> Any: ...


class Opened(NamedTuple):
    """What a run is made with.

    Attributes:
        run: Its directory; nothing is written yet.
        datasets: Its data.
        device: Where this rank computes.
        slots: The images of each global batch that this rank makes.
    """

    run: RunDirectory
    datasets: list[RadiographDataset]
    device: torch.device
    slots: slice


def open_run(config: RunConfig, out: Path, resume: str) -> Opened | None:
    """Look at what every run needs, before anything is written.

    Args:
        config: The run.
        out: Run directory.
        resume: As for `RunDirectory`.

    Returns:
        None when the run finished before, which is said.

    Raises:
        InputError: Config, data, memory or run directory are not fit for this.
    """
    validate(config)
    device = distributed.start()
    datasets = open_data(config)
    run = RunDirectory(out, config, [d.fingerprint for d in datasets], resume)
    if run.done:
        say(f"{out} is finished ({(out / 'DONE').read_text().strip()}); nothing to do.")
        return None
    slots = slots_of_rank(config)
    _require_memory(config, slots.stop - slots.start)
    return Opened(run, datasets, device, slots)


def begin(run: RunDirectory) -> None:
    """Write what the run is, once every rank has looked at its directory, and begin to train."""
    distributed.barrier()
    if distributed.rank() == 0:
        run.begin()
    keep_freed_memory()
    cv2.setNumThreads(1)


def open_data(config: RunConfig) -> list[RadiographDataset]:
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


def build_probe(
    config: RunConfig, datasets: list[RadiographDataset], device: torch.device
) -> Probe:
    """The probe of a run.

    Raises:
        InputError: The guard is on, and there is no finding to probe for.
    """
    probe = Probe(datasets, config, device)
    if config.guard and not probe.judges_findings:
        raise InputError(
            "guard needs findings labelled in splits train and validate, and the data has none. "
            "Give data that has, or set --guard 0."
        )
    return probe


def slots_of_rank(config: RunConfig) -> slice:
    """The slots of each global batch that this rank makes.

    Raises:
        InputError: The batch cannot be shared out over ranks, or a rank's share not cut into parts.
    """
    slots = distributed.slice_of_batch(config.batch_size)
    if (slots.stop - slots.start) % config.engine.accumulate:
        raise InputError(
            f"a rank's {slots.stop - slots.start} images of batch_size {config.batch_size} cannot "
            f"be cut into engine.accumulate {config.engine.accumulate} equal parts. Change one of "
            "them, or the number of ranks."
        )
    return slots


def _require_memory(config: RunConfig, images: int) -> None:
    """Refuse crops that cannot be held, before the system begins to swap."""
    c, lower = config.crops, "batch_size"
    pixels = c.global_size**2
    if isinstance(c, CropsConfig):
        pixels = 2 * pixels + c.local_count * c.local_size**2
        lower = "batch_size or crops.local_count"
    needed, free = images * pixels * BATCHES_HELD, psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"the crops of batch_size {config.batch_size} take {needed / 2**30:,.0f} GiB on a rank "
            f"(8 bit, {BATCHES_HELD} batches at a time), and {free / 2**30:,.0f} GiB of memory are "
            f"free. Lower {lower}."
        )


def restore(
    run: RunDirectory,
    networks: Networks,
    optimizer: torch.optim.Optimizer,
    origins: Sequence[str],
) -> int:
    """Take up the newest whole checkpoint, or say where fresh tensors came from; steps done."""
    checkpoint, damaged = load_newest(run.checkpoints)
    for line in damaged:
        say(f"warning: {line}; the one before is used")
    if checkpoint is None:
        for line in origins:
            say(line)
        if distributed.rank() == 0:
            run.truncate_metrics(-1)
        return 0
    put_back(networks, optimizer, checkpoint.tensors)
    if distributed.rank() == 0:
        run.truncate_metrics(checkpoint.step)
    say(f"resuming {run.path} at step {checkpoint.step}")
    return checkpoint.step


def state_tensors(networks: Networks, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that a step changes, by name."""
    state = {f"networks.{name}": tensor for name, tensor in networks.state_dict().items()}
    for name, tensor in optimizer_tensors(optimizer, networks.trained).items():
        state[f"optimizer.{name}"] = tensor
    return state


def put_back(
    networks: Networks, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Undo `state_tensors`."""
    of = lambda prefix: {  # noqa: E731
        name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)
    }
    networks.load_state_dict(of("networks."))
    load_optimizer_tensors(optimizer, networks.trained, of("optimizer."))


def save(
    run: RunDirectory,
    step: int,
    networks: Networks,
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


def probe_now(
    run: RunDirectory, probe: Probe, networks: Trained, step: int, write: Callable[[int], None]
) -> None:
    """Judge the encoder with frozen features, and export it when it is the best so far.

    Args:
        run: To which the scores are added.
        probe: By which it is judged.
        networks: Hold the encoder.
        step: Steps done.
        write: Exports the encoder of a step into the run directory.
    """
    if probe.possible and run.config.evaluate_every and distributed.rank() == 0:
        scores = probe(networks)
        run.append({"kind": "probe", "step": step, **scores})
        best = run.mark_best()
        if best == step:
            write(step)
        if scores["macro_auroc"] is not None:
            score = f"step {step}: validation macro-AUROC {scores['macro_auroc']:.3f}"
            say(score if best is None else f"{score}, best at step {best}")
    distributed.barrier()


def stop_if_fallen(run: RunDirectory, margin: float) -> None:
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


def finish(run: RunDirectory, write: Callable[[int], None]) -> Path:
    """Export the last encoder where no probe has chosen one, and mark the run as done.

    Args:
        run: Whose last step was done.
        write: Exports the encoder of a step into the run directory.

    Returns:
        The run directory.
    """
    if distributed.rank() == 0:
        best = run.mark_best()
        if best is None:
            write(run.config.steps)
        which = f"of step {best}, the best probe" if best is not None else "of the last step"
        run.finish(f"{run.config.steps} steps; encoder {which}")
        say(f"{run.path / 'encoder'} holds the encoder {which}")
    distributed.barrier()
    return run.path


def require_finite(
    run: RunDirectory, step: int, record: dict[str, float], image_ids: Sequence[str]
) -> None:
    """Stop at a number that is none, and leave behind which step and images gave it."""
    if math.isfinite(record["loss"]) and math.isfinite(record["gradient_norm"]):
        return
    where = run.path / f"not_finite_step_{step + 1:08d}_rank_{distributed.rank()}.json"
    content = {"step": step + 1, "values": {k: str(v) for k, v in record.items()},
               "image_ids": list(image_ids)}  # fmt: skip
    write_atomically(where, json.dumps(content, indent=2).encode())
    terms = [name for name, value in record.items() if not math.isfinite(value)]
    raise RunStopped(
        f"step {step + 1}: {', '.join(terms)} not finite. The weights before this step are in the "
        f"newest checkpoint, the images' ids in {where}. Lower optimizer.learning_rate or use "
        "engine.precision float32."
    )


class StreakAlarm:
    """Warns when something has been wrong for many steps in a row, once in each streak.

    Args:
        advice: What to do, behind what is wrong.
    """

    _PATIENCE = 50  # steps in a row

    def __init__(self, advice: str) -> None:
        self._advice = advice
        self._streak = 0

    def watch(self, step: int, wrong: str | None) -> None:
        """Look at one step.

        Args:
            step: For the warning.
            wrong: What is wrong with it, or None.
        """
        self._streak = self._streak + 1 if wrong else 0
        if self._streak == self._PATIENCE:
            say(
                f"warning: step {step}: {wrong} for {self._PATIENCE} steps: the encoder may be "
                f"collapsing. Compare the probe (--evaluate-every); {self._advice}"
            )


ALIKE = 0.99
"""Mean cosine of different images' CLS tokens above which features hardly tell images apart.

Published encoders lie far from it or near it: on radiographs the mean cosine is 0.05 for RAD-DINO
and 0.95 for DINOv2, which never saw one. It is an alarm, not a verdict: only the probe judges.
"""


def alike(record: dict[str, float]) -> str | None:
    """What is wrong when the CLS tokens of a step are nearly the same for all images."""
    if record["mean_cosine"] > ALIKE:
        return f"CLS tokens of different images have mean cosine {record['mean_cosine']:.3f}"
    return None


def autocast(config: RunConfig, device: torch.device) -> Any:
    """The context of matrix products in the precision that the config asks for."""
    if not computes_in_bfloat16(config.engine.precision, device):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def torch_seed(seed: int, step: int) -> int:
    """Seed of drop path and dropout in one step; ranks differ, since they hold different images."""
    generator = generator_at(seed, Purpose.TORCH, step, distributed.rank())
    return int(generator.integers(0, 2**62))


def speed(batch_size: int, seconds: float) -> dict[str, float]:
    """Images a second over all ranks, and memory in use by this one, GiB."""
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = psutil.Process().memory_info().rss
    return {"images_per_second": batch_size / seconds, "memory_gib": memory / 2**30}


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: returning them to the kernel costs a CPU step a fifth."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
            libc.mallopt(m_mmap_threshold, 2**30)
            libc.mallopt(m_trim_threshold, 2**31 - 1)
        except (OSError, AttributeError):
            pass  # another C library: slower, not wrong


def step_progress(steps: int, first: int) -> tqdm:
    """A bar of the steps of a run that begins or goes on at one of them."""
    return progress_bar(total=steps, initial=first, disable=distributed.rank() != 0,
                        bar_format="{percentage:3.0f}%|{bar}| step {n_fmt}/{total_fmt}"
                " [{elapsed}, {remaining} left{postfix}]")  # fmt: skip


def show_step(bar: tqdm, record: dict[str, float]) -> None:
    """Move the bar by one step, with its loss, the likeness of its images and its speed."""
    bar.set_postfix_str(
        f"loss {record['loss']:.3f}, cosine {record['mean_cosine']:.2f}, "
        f"{record['images_per_second']:.0f} images/s",
        refresh=False,
    )
    bar.update()


def say(line: str) -> None:
    """Write a line to stderr, on rank 0, beside the progress bar."""
    if distributed.rank() == 0:
        tqdm.write(line, file=sys.stderr)
