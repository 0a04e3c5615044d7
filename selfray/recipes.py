"""Named recipes: each a function that returns the frozen config of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from selfray.config import (
    CropsConfig,
    EncoderConfig,
    HeadsConfig,
    LossConfig,
    OptimizerConfig,
    PretrainConfig,
    TeacherConfig,
)
from selfray.errors import InputError, nearest


def base_518() -> PretrainConfig:
    """The published RAD-DINO recipe; sources stand beside the defaults in `config.py`."""
    return PretrainConfig(recipe="base-518")


def small() -> PretrainConfig:
    """One workstation with one GPU: ViT-S/14 at 224, Sinkhorn-Knopp and 4,096 prototypes.

    A small batch with 65,536 prototypes and plain centering collapses on radiographs.
    """
    return PretrainConfig(
        recipe="small",
        steps=30_000,
        batch_size=256,
        checkpoint_every=500,
        evaluate_every=1000,
        encoder=EncoderConfig(arch="vit_small", image_size=224, drop_path=0.1),
        crops=CropsConfig(global_size=224, local_size=98),
        heads=HeadsConfig(prototypes=4096),
        loss=LossConfig(centering="sinkhorn"),
    )


def demo() -> PretrainConfig:
    """Two CPU cores and a few minutes: a phantom-sized ViT with batch norm in the head."""
    return PretrainConfig(
        recipe="demo",
        steps=600,
        batch_size=64,
        checkpoint_every=100,
        evaluate_every=100,
        encoder=EncoderConfig(
            arch="vit_nano", patch_size=14, image_size=112, layerscale_init=1.0, drop_path=0.0
        ),
        crops=CropsConfig(global_size=112, local_size=56, local_count=4),
        heads=HeadsConfig(prototypes=512, hidden=512, bottleneck=128, batch_norm=True),
        loss=LossConfig(centering="sinkhorn", koleo_weight=0.0, teacher_temperature=(0.04, 0.04)),
        optimizer=OptimizerConfig(learning_rate=8e-3, layer_decay=1.0, patch_embed_factor=1.0),
        teacher=TeacherConfig(momentum=(0.99, 1.0)),
    )


RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    "demo": demo,
    "small": small,
    "base-518": base_518,
}


def recipe(name: str) -> PretrainConfig:
    """The config of a named recipe.

    Raises:
        InputError: No such recipe; the nearest name is suggested.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe is named {name!r}. {nearest(name, RECIPES)}")
    return replace(RECIPES[name](), recipe=name)
