"""Images a second of one pre-training step, and what each choice of the engine brings.

Prints images/s and ratios to the plain step, taken in one run, variants interleaved:
minimum, median and maximum over the repeats. Crops are random bytes: the loader is not measured.

    python benchmarks/pretrain_step.py [--recipe demo] [--repeats 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from selfray import pretrain, run_loop
from selfray.config import PretrainConfig
from selfray.data.block_masks import block_mask, masked_counts
from selfray.data.loader import CropBatch
from selfray.initialise import initialise
from selfray.models import vit
from selfray.recipes import recipe


def random_batch(config: PretrainConfig) -> CropBatch:
    """A batch of noise with masks as in training."""
    generator = np.random.default_rng(0)
    grid = config.crops.global_size // config.encoder.patch_size
    counts = masked_counts(
        2 * config.batch_size, grid**2, config.masks.probability, config.masks.ratio, generator
    )
    masks = np.stack([block_mask(grid, grid, int(count), generator) for count in counts])

    def noise(crops: int, side: int) -> torch.Tensor:
        return torch.randint(0, 256, (crops, config.batch_size, side, side), dtype=torch.uint8)

    return CropBatch(
        noise(2, config.crops.global_size),
        noise(config.crops.local_count, config.crops.local_size),
        torch.from_numpy(masks).view(2, config.batch_size, grid**2),
        ("noise",) * config.batch_size,
        0,
    )


def stepper(config: PretrainConfig, batch: CropBatch) -> Callable[[], object]:
    """A function that does one step."""
    networks = initialise(config)[0]
    optimizer = pretrain.build_run_optimizer(config, networks)
    values = pretrain.scheduled(config, config.steps // 2, 0)
    autocast = pretrain.autocast(config, torch.device("cpu"))
    return lambda: pretrain._step(networks, optimizer, batch, config, values, autocast)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run_loop.keep_freed_memory()
    config = recipe(arguments.recipe)
    batch = random_batch(config)

    def with_precision(precision: str) -> PretrainConfig:
        engine = dataclasses.replace(config.engine, precision=precision)
        return dataclasses.replace(config, engine=engine)

    own_attention = vit.attend
    variants = {
        "float32": (stepper(with_precision("float32"), batch), own_attention),
        "bfloat16, fused attention": (
            stepper(with_precision("bfloat16"), batch),
            F.scaled_dot_product_attention,
        ),
        "bfloat16": (stepper(with_precision("bfloat16"), batch), own_attention),
    }
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(arguments.repeats + 1):
        for name, (step, attention) in variants.items():
            vit.attend = attention
            began = time.perf_counter()
            step()
            if repeat:  # the first is a warm-up
                speeds[name].append(config.batch_size / (time.perf_counter() - began))
    vit.attend = own_attention
    print(f"recipe {arguments.recipe}, {arguments.threads} threads, {arguments.repeats} repeats")
    for name, values in speeds.items():
        ratios = [v / base for v, base in zip(values, speeds["float32"], strict=True)]
        print(
            f"{name:28} {statistics.median(values):7.1f} images/s × {statistics.median(ratios):.2f}"
            f" ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
