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

    A small batch with 65,536 prototypes and plain centering collapses on radiographs. The numbers
    are chosen to fit the machine, not found by a search; the recipe was never run to its end.
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
    """Two CPU cores and a few minutes: small crops, and a head that a small batch can train.

    The numbers that differ from the published recipe were found by the probe on the phantom:
    batch norm in the head and prototypes that never move keep the targets from becoming uniform,
    which is where a small encoder on look-alike images otherwise ends; positions that are known
    from the start, a high learning rate and many small steps make the most of few images.
    """
    return PretrainConfig(
        recipe="demo",
        steps=720,
        batch_size=32,
        checkpoint_every=120,
        evaluate_every=240,
        evaluate_images=1500,
        encoder=EncoderConfig(
            arch="vit_pico",
            patch_size=16,
            image_size=128,
            layerscale_init=1.0,
            position_init="sincos",
            drop_path=0.0,
        ),
        crops=CropsConfig(global_size=96, local_size=48, local_count=4),
        heads=HeadsConfig(prototypes=512, hidden=512, bottleneck=64, batch_norm=True),
        loss=LossConfig(centering="sinkhorn", koleo_weight=0.0, teacher_temperature=(0.02, 0.02)),
        optimizer=OptimizerConfig(
            learning_rate=8e-3, layer_decay=1.0, patch_embed_factor=1.0, freeze_last_layer=1.0
        ),
        teacher=TeacherConfig(momentum=(0.98, 1.0)),
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
