"""Pre-training on images and their reports: read `pretrain_language` from top to bottom.

The control of `pretrain`: the same images, architecture, initialisation and number of images seen,
with the report in place of the image's other crops.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfray import distributed
from selfray.config import ContrastiveConfig
from selfray.data.crops import OneCrop
from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.data.loader import Place
from selfray.data.report_loader import PairBatch, ReportLoader, Supervised, with_reports
from selfray.errors import InputError, Interrupted
from selfray.initialise import initialise_encoder, initialise_image_text
from selfray.models.text_encoder import (
    TOKENIZER,
    TextEncoder,
    open_text_encoder,
    small_text_encoder,
    train_tokenizer,
)
from selfray.objectives.image_text import ImageText, Part
from selfray.objectives.optimizer import build_optimizer, clip_gradients, set_rates
from selfray.objectives.schedules import cosine
from selfray.progress import collected_signals
from selfray.run_directory import RunDirectory
from selfray.run_encoder import write_language_encoder
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


def pretrain_language(config: ContrastiveConfig, out: Path, *, resume: str = "auto") -> Path:
    """Pre-train an encoder on images and reports, or go on with an unfinished run.

    Args:
        config: The run. `data` names dataset directories whose images have reports.
        out: Run directory.
        resume: `auto`, `must` (never begins) or `never` (never resumes).

    Returns:
        `out`, with `encoder/` and `text_encoder/` in it.

    Raises:
        InputError: Config, data, text model or run directory are not fit for this.
        Interrupted: SIGINT or SIGTERM; the state is saved.
        RunStopped: The loss is not finite, or the guard found the probe falling.
    """
    opened = open_run(config, out, resume)
    if opened is None:
        return out
    run, datasets, device, slots = opened
    supervised = _supervised(datasets)
    given = _given_text_encoder(config)
    begun = initialise_encoder(config)
    probe = build_probe(config, datasets, device)
    begin(run)
    text_encoder = given or _own_text_encoder(run, config, supervised)
    networks, origins = initialise_image_text(config, begun, text_encoder)
    networks.to(device)
    optimizer = build_language_optimizer(config, networks)
    loader = build_report_loader(config, supervised.places, networks.text_encoder.fits, slots)
    first = restore(run, networks, optimizer, [_of_reports(supervised), *origins])
    alarm = StreakAlarm("try a lower optimizer.learning-rate or more sentences (--text.sentences).")
    precision = autocast(config, device)
    write = partial(write_language_encoder, run, networks)

    with collected_signals() as interrupted, step_progress(config.steps, first) as bar:
        if first == 0:
            probe_now(run, probe, networks, 0, write)
        batches = loader.batches(first, config.steps)
        for step in range(first, config.steps):
            began = time.perf_counter()
            batch = next(batches)
            values = scheduled(config, step)
            parts = _parts(config, networks, batch, torch_seed(config.seed, step), device)
            terms = _step(networks, optimizer, parts, config, values, precision)
            record = {k: float(v) for k, v in terms.items()} | asdict(values)
            require_finite(run, step, record, batch.image_ids)
            record |= speed(config.batch_size, time.perf_counter() - began)
            if distributed.rank() == 0:
                alarm.watch(step + 1, alike(record))
                counts = {"bad_images": batch.bad_images, "texts_cut": batch.texts_cut}
                run.append({"kind": "step", "step": step + 1, **record, **counts})
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


def scheduled(config: ContrastiveConfig, step: int) -> Scheduled:
    """The scheduled values of a step.

    Args:
        config: The run.
        step: 0 to config.steps - 1.
    """
    o, steps = config.optimizer, config.steps
    return Scheduled(
        cosine(step, steps, config.peak_learning_rate, o.learning_rate_end, int(o.warmup * steps)),
        cosine(step, steps, *o.weight_decay),
    )


def build_language_optimizer(config: ContrastiveConfig, networks: ImageText) -> torch.optim.AdamW:
    """The optimizer of both encoders, the projections and what makes logits."""
    return build_optimizer(
        networks,
        depth=networks.encoder.depth,
        layer_decay=config.optimizer.layer_decay,
        patch_embed_factor=config.optimizer.patch_embed_factor,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        text_factor=config.text.learning_rate_factor,
    )


def build_report_loader(
    config: ContrastiveConfig, places: list[Place], fits: Callable[[str], bool], slots: slice
) -> ReportLoader:
    """The loader of some slots of each global batch.

    Args:
        config: The run.
        places: Images with reports.
        fits: Whether a text is short enough.
        slots: Which images of a batch are made.
    """
    return ReportLoader(
        places,
        crop=OneCrop(**asdict(config.crops)),
        sentences=config.text.sentences,
        fits=fits,
        batch_size=config.batch_size,
        slots=slots,
        seed=config.seed,
        threads=config.engine.loader_threads,
    )


def _step(
    networks: ImageText,
    optimizer: torch.optim.Optimizer,
    parts: list[Part],
    config: ContrastiveConfig,
    values: Scheduled,
    precision: Any,
) -> dict[str, Tensor]:
    """One optimizer step; returns the loss and what is watched."""
    networks.train()
    with precision:
        watched = networks.step(parts)
    distributed.average_gradients(networks.parameters())
    norm = clip_gradients(networks, config.optimizer.gradient_clip)
    set_rates(optimizer, values.learning_rate, values.weight_decay)
    if torch.isfinite(watched["loss"]) & torch.isfinite(norm):
        optimizer.step()
        networks.logits.hold()
    optimizer.zero_grad(set_to_none=True)
    averaged = {name: distributed.mean_over_ranks(value) for name, value in watched.items()}
    return averaged | {"gradient_norm": norm}


def _parts(
    config: ContrastiveConfig,
    networks: ImageText,
    batch: PairBatch,
    seed: int,
    device: torch.device,
) -> list[Part]:
    tokens = networks.text_encoder.tokens(batch.texts)
    each = len(batch.texts) // config.engine.accumulate
    cuts = [slice(i, i + each) for i in range(0, len(batch.texts), each)]
    return [
        Part(batch.images[cut].to(device), tokens.part(cut).to(device), seed + index)
        for index, cut in enumerate(cuts)
    ]


def _supervised(datasets: list[RadiographDataset]) -> Supervised:
    """The training images that have a report; more than one, or there is none to tell it from."""
    supervised = with_reports(datasets, "train")
    if len(supervised.places) == 1:
        raise InputError(
            f"only 1 of the {supervised.left_out + 1} images in split 'train' has a report with "
            "findings or impression: there is no other report to tell from. Give data with more "
            "reports (`selfray ingest --reports`), or a recipe for images alone."
        )
    return supervised


def _given_text_encoder(config: ContrastiveConfig) -> TextEncoder | None:
    """The text model that the config names, if any."""
    if not config.text.model:
        return None
    return open_text_encoder(Path(config.text.model), config.text.max_tokens)


def _own_text_encoder(
    run: RunDirectory, config: ContrastiveConfig, supervised: Supervised
) -> TextEncoder:
    """The small text encoder; its tokenizer is learned once a run, and kept beside the config."""
    file = run.path / TOKENIZER
    if distributed.rank() == 0 and not file.exists():
        with run.needs_room():
            learned = train_tokenizer(supervised.reports(), config.text.vocabulary)
            write_atomically(file, learned.encode())
    distributed.barrier()
    return small_text_encoder(
        file.read_text(encoding="utf-8"),
        width=config.text.width,
        depth=config.text.depth,
        heads=config.text.heads,
        max_tokens=config.text.max_tokens,
        seed=config.seed,
    )


def _of_reports(supervised: Supervised) -> str:
    """How many images have a report, once a run."""
    found = f"reports: {len(supervised.places)} training images have one"
    if supervised.left_out:
        return f"{found}; {supervised.left_out} without findings or impression are left out"
    return found
