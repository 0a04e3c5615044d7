"""Named recipes: each a function that returns the frozen config of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from selfray.config import (
    AdamWConfig,
    ContrastiveConfig,
    ContrastiveLossConfig,
    CropsConfig,
    EncoderConfig,
    GlobalCropConfig,
    HeadsConfig,
    LossConfig,
    OneCropConfig,
    OptimizerConfig,
    PretrainConfig,
    RunConfig,
    TeacherConfig,
    TextConfig,
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


def clip_base_518() -> ContrastiveConfig:
    """The control of `base-518`: the same images seen, learned from reports; never run."""
    return _control_of(base_518(), TextConfig())


def clip_small() -> ContrastiveConfig:
    """The control of `small`; never run to its end, like `small`."""
    return _control_of(small(), TextConfig())


def clip_demo() -> ContrastiveConfig:
    """The control of `demo`.

    The learning rate is a third of its pair's, at which both encoders collapse, and texts are whole
    reports: of three sentences a report, as many steps learn nothing. Both were found on the
    phantom.
    """
    paired = demo()
    paired = replace(paired, optimizer=replace(paired.optimizer, learning_rate=2.8e-3))
    text = TextConfig(sentences=0, max_tokens=128, vocabulary=2000, width=128, depth=2, heads=2)
    return replace(
        _control_of(paired, text),
        contrastive=ContrastiveLossConfig(embedding=128),
    )


def siglip_demo() -> ContrastiveConfig:
    """`clip-demo` with the sigmoid loss, and its initial factor and bias."""
    return replace(
        clip_demo(),
        recipe="siglip-demo",
        contrastive=ContrastiveLossConfig(loss="siglip", embedding=128, logit_scale=10.0),
    )


def _control_of(paired: PretrainConfig, text: TextConfig) -> ContrastiveConfig:
    """A run of language supervision that differs from one on images alone in nothing else.

    Args:
        paired: Gives encoder, number of images, probes, engine, and its first global crop.
        text: The text encoder.
    """
    crops = _values(GlobalCropConfig, paired.crops)
    crops |= {"flip": OneCropConfig.flip, "blur": paired.crops.blur_global_first}
    return ContrastiveConfig(
        **_values(RunConfig, paired)
        | {
            "recipe": f"clip-{paired.recipe}",
            "crops": OneCropConfig(**crops),
            "optimizer": AdamWConfig(**_values(AdamWConfig, paired.optimizer)),
        },
        text=text,
    )


def _values(kind: type[Any], config: Any) -> dict[str, Any]:
    """The values that a config has for the fields of a class that it is derived from."""
    return {field.name: getattr(config, field.name) for field in fields(kind)}


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "small": small,
    "base-518": base_518,
    "clip-demo": clip_demo,
    "siglip-demo": siglip_demo,
    "clip-small": clip_small,
    "clip-base-518": clip_base_518,
}


def recipe(name: str) -> RunConfig:
    """The config of a named recipe.

    Raises:
        InputError: No such recipe; the nearest name is suggested.
    """
    if name not in RECIPES:
        raise InputError(f"no recipe is named {name!r}. {nearest(name, RECIPES)}")
    return replace(RECIPES[name](), recipe=name)
