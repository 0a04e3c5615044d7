"""A run that takes a second: 24 images of noise, the smallest encoder, crops of two patches."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from selfray.config import (
    ContrastiveConfig,
    ContrastiveLossConfig,
    CropsConfig,
    EncoderConfig,
    EngineConfig,
    HeadsConfig,
    LossConfig,
    OneCropConfig,
    PretrainConfig,
    RunConfig,
    TextConfig,
)
from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png

SPLITS = ("train",) * 14 + ("validate",) * 8 + ("test",) * 2


def write_dataset(
    out: Path,
    *,
    size: int = 56,
    seed: int = 0,
    findings: tuple[str, ...] = ("effusion", "nodule"),
    reports: Sequence[str | None] = (),
) -> RadiographDataset:
    """24 images; the first finding is a bright half, so that a probe has something to find.

    Args:
        out: Directory to make.
        size: Side of an image, pixels.
        seed: Of the noise.
        findings: Their names.
        reports: Of the images, in turn; none means no reports.
    """
    info = DatasetInfo("micro", "synthetic phantom", "CC0-1.0", True, findings, (), "noise")
    writer = DatasetWriter(out, info)
    generator = np.random.default_rng(seed)
    for index, split in enumerate(SPLITS):
        pixels = generator.integers(0, 160, (size, size)).astype(np.uint8)
        pixels[size // 2 :] += np.uint8(80 * (index % 2))
        labels = {name: (index // (k + 1)) % 2 for k, name in enumerate(findings)}
        writer.add(
            {"image": encode_png(pixels), "image_id": f"i{index}", "patient_id": f"p{index}",
             "study_id": f"s{index}", "split": split, "view": "PA", "sex": "FM"[index % 2],
             "age_years": 20.0 + index, **labels,
             **({"report": reports[index % len(reports)]} if reports else {})}
        )  # fmt: skip
    return writer.finish()


def micro_config(*data: Path, **changes: Any) -> PretrainConfig:
    """The config of a run of 8 steps.

    Args:
        data: Dataset directories.
        changes: Values by field; those of a group as `group__field`.
    """
    config = PretrainConfig(
        recipe="small",
        steps=8,
        batch_size=4,
        checkpoint_every=3,
        keep_checkpoints=20,
        evaluate_every=0,
        data=tuple(str(path) for path in data),
        encoder=EncoderConfig(arch="vit_micro", patch_size=14, image_size=28, drop_path=0.1),
        crops=CropsConfig(global_size=28, local_size=14, local_count=2),
        heads=HeadsConfig(prototypes=16, hidden=32, bottleneck=8),
        loss=LossConfig(centering="sinkhorn"),
        engine=EngineConfig(precision="float32", loader_threads=1),
    )
    for name, value in changes.items():
        config = _changed(config, name, value)
    return config


def micro_language_config(*data: Path, **changes: Any) -> ContrastiveConfig:
    """The same with reports; arguments as for `micro_config`."""
    paired = micro_config(*data)
    config = ContrastiveConfig(
        recipe="clip-small",
        steps=paired.steps,
        batch_size=paired.batch_size,
        checkpoint_every=paired.checkpoint_every,
        keep_checkpoints=paired.keep_checkpoints,
        data=paired.data,
        encoder=paired.encoder,
        crops=OneCropConfig(global_size=paired.crops.global_size),
        engine=paired.engine,
        text=TextConfig(vocabulary=300, width=16, depth=1, heads=2, max_tokens=32),
        contrastive=ContrastiveLossConfig(embedding=8),
    )
    for name, value in changes.items():
        config = _changed(config, name, value)
    return config


def command_line(config: RunConfig, out: Path) -> list[str]:
    """The words after `selfray` that begin or resume this run."""
    words = ["pretrain", config.recipe, "--out", str(out)]
    for name, value in dataclasses.asdict(config).items():
        fields = value if isinstance(value, dict) else {"": value}
        for field, inner in fields.items():
            option = f"--{name}.{field}" if field else f"--{name}"
            values = inner if isinstance(inner, tuple) else (inner,)
            if name != "recipe" and inner != "":
                shown = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
                words += [option.replace("_", "-"), *shown]
    return words


def records(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, without what differs between two equal runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chance = {"images_per_second", "memory_gib"}
    return [{k: v for k, v in line.items() if k not in chance} for line in lines]


def within_step(
    moment: int, action: Callable[[], object], loop: ModuleType, patch: pytest.MonkeyPatch
) -> None:
    """Do something within a step of a training loop.

    Args:
        moment: Of the steps from here on, the first is 1.
        action: What is done.
        loop: Module of the loop.
        patch: Undoes it.
    """
    original, calls = loop.speed, itertools.count(1)

    def speed(*arguments: Any) -> dict[str, float]:
        if next(calls) == moment:
            action()
        return original(*arguments)

    patch.setattr(loop, "speed", speed)


def terminate() -> None:
    """Send SIGTERM to this process."""
    os.kill(os.getpid(), signal.SIGTERM)


def _changed(config: Any, name: str, value: Any) -> Any:
    group, _, field = name.rpartition("__")
    if not group:
        return dataclasses.replace(config, **{field: value})
    inner = dataclasses.replace(getattr(config, group), **{field: value})
    return dataclasses.replace(config, **{group: inner})


def in_child(function: Callable[[], object]) -> int:
    """Run a function in a forked process.

    Returns:
        0, the exit status, or minus the signal that ended it.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            function()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
