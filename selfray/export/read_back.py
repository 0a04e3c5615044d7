"""Each format opened by its own runtime, and held to the encoder's features."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selfray.errors import InputError, RunStopped
from selfray.export.graphs import ONNX, OPENVINO, OUTPUTS, TORCH, input_shape
from selfray.models.encoder import Encoder
from selfray.models.huggingface import read_model
from selfray.models.openvino_graph import openvino_core

TOLERANCE = 1e-4
"""Largest difference allowed, in root mean squares of the encoder's features.

Two float32 runtimes differ by the order of their sums: measured 9e-7 to 6e-6 of the features on
transformers of 6 and 12 blocks, up to 2e-5 on published networks of other families with random
weights. (Some of timm's, with weights drawn so large that they amplify rounding, reach 3e-4 and
are refused.) What must not pass is larger: TF32 rounds each factor at
5e-4 (10 bits), bfloat16 at 4e-3; the tanh approximation of GELU is off by 5e-4, and position
embeddings that are interpolated in another way by more than 1e-3.
"""

_IMAGES = 3  # read back at batch sizes 1 and 3, neither of them that of tracing

Features = Callable[[Tensor], tuple[Tensor, Tensor]]


class Differs(RunStopped):
    """What was written does not give the encoder's features."""


@torch.no_grad()
def differences(encoder: Encoder, features: Features) -> dict[str, tuple[float, float]]:
    """Compare what was read back with the encoder, on images of noise.

    Args:
        encoder: What was written.
        features: Of what was read back: images [B, C, S, S] to `cls` [B, D] and `patches`
            [B, D, h, w].

    Returns:
        Largest absolute difference of each output, and the same in root mean squares of the
        encoder's.

    Raises:
        InputError: All features are 0, or some are not finite.
        Differs: It is above `TOLERANCE`, or a shape is another.
    """
    noise = torch.Generator().manual_seed(0)
    images = torch.randn(_IMAGES, *input_shape(encoder), generator=noise)
    expected = encoder.features(images)
    scales = [float(wanted.double().square().mean().sqrt()) for wanted in expected]
    for name, scale in zip(OUTPUTS, scales, strict=True):
        if not 0 < scale < math.inf:
            raise InputError(
                f"{encoder.name}: {name} of images of noise have a root mean square of {scale:g}, "
                "allowed: more than 0, and finite: weights that collapsed or a diverged training. "
                "Take other weights."
            )
    largest: dict[str, tuple[float, float]] = dict.fromkeys(OUTPUTS, (0.0, 0.0))
    for count in (1, _IMAGES):
        read = features(images[:count])
        for name, wanted, found, scale in zip(OUTPUTS, expected, read, scales, strict=True):
            if found.shape != wanted[:count].shape:
                raise Differs(
                    f"{name} is {list(found.shape)} when read back, the encoder's is "
                    f"{list(wanted[:count].shape)}. Nothing was written."
                )
            difference = float((found - wanted[:count]).abs().max())
            relative = difference / scale
            if not relative <= TOLERANCE:  # also where it is not a number
                raise Differs(
                    f"{name} differs by {relative:.1e} of the features' root mean square when "
                    f"read back, allowed: {TOLERANCE:.0e}. Nothing was written: take other "
                    "versions of the packages, or another format."
                )
            largest[name] = max(largest[name], (difference, relative))
    return largest


def read_huggingface(directory: Path, encoder: Encoder) -> Features:
    """By transformers' AutoModel."""
    from transformers import AutoModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, parameters = AutoModel.from_pretrained(directory, output_loading_info=True)
    if wrong := sorted(kind for kind, names in parameters.items() if names):
        raise Differs(f"parameters: {', '.join(wrong)} in transformers. Nothing was written.")
    model.eval()
    return _of_tokens(lambda images: model(pixel_values=images).last_hidden_state, encoder)


def read_timm(directory: Path, encoder: Encoder) -> Features:
    """By timm's own class and loader, strictly."""
    import timm  # pyright: ignore[reportMissingImports]

    config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    weights = str(directory / "model.safetensors")
    model = timm.create_model(
        config["architecture"], checkpoint_path=weights, **config["model_args"]
    ).eval()
    return _of_tokens(model.forward_features, encoder)


def read_dinov2(directory: Path, encoder: Encoder) -> Features:
    """By this package: DINOv2's own is in no package index."""
    model, _ = read_model(directory)
    model.position_interpolation = encoder.vit.position_interpolation

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = model(images)
        return tokens.cls, _on_grid(tokens.patches, encoder)

    return features


def read_onnx(directory: Path, encoder: Encoder) -> Features:
    """By ONNX Runtime on the CPU."""
    import onnxruntime  # pyright: ignore[reportMissingImports]

    del encoder
    session = onnxruntime.InferenceSession(directory / ONNX, providers=["CPUExecutionProvider"])

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        cls, patches = session.run(list(OUTPUTS), {"images": images.numpy()})
        return torch.from_numpy(cls), torch.from_numpy(patches)

    return features


def read_openvino(directory: Path, encoder: Encoder) -> Features:
    """By OpenVINO on the CPU, in float32, also where the processor would take bfloat16."""
    del encoder
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(directory / OPENVINO, "CPU", hints)

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        found = compiled({"images": images.numpy()})
        return torch.from_numpy(found["cls"]), torch.from_numpy(found["patches"])

    return features


def read_torch(directory: Path, encoder: Encoder) -> Features:
    """By `torch.export.load`."""
    del encoder
    program = torch.export.load(directory / TORCH).module()

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        found = program(images)
        return found["cls"], found["patches"]

    return features


def _of_tokens(tokens_of: Callable[[Tensor], Tensor], encoder: Encoder) -> Features:
    """From CLS, registers and patches in one tensor [B, 1 + R + h*w, D]."""

    def features(images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens_of(images)
        return tokens[:, 0], _on_grid(tokens[:, 1 + encoder.vit.registers :], encoder)

    return features


def _on_grid(patches: Tensor, encoder: Encoder) -> Tensor:
    """[B, h*w, D] to [B, D, h, w]."""
    return patches.transpose(1, 2).unflatten(2, encoder.grid)
