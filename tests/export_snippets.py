"""What users paste to open an export, run as it is printed; and an export without room."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from selfray.export.card import snippet
from selfray.models.encoder import Encoder
from selfray.models.encoder_directory import save_encoder
from selfray.models.published import load_encoder
from selfray.models.vit import PositionInterpolation, Shape, VisionTransformer

NETWORKS = {
    "mlp": (0, "mlp"),
    "registers": (4, "mlp"),
    "swiglu": (0, "swiglu"),
    "swiglu with registers": (2, "swiglu"),
}
"""Registers and kind of feed-forward."""
CARD = {
    "synthetic": True,
    "data": [{"name": "thorax", "origin": "synthetic phantom", "licence": "CC0"}],
    "recipe": "demo",
    "step": 600,
    "validation": {"macro_auroc": 0.625},
}


def random_vit(network: str, interpolation: PositionInterpolation | None = None):
    """A small vision transformer of which no parameter is zero or one."""
    registers, ffn = NETWORKS[network]
    shape = Shape(48, 2, 3, "swiglu" if ffn == "swiglu" else "mlp")
    model = VisionTransformer(shape, patch_size=14, image_size=56, registers=registers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(std=0.1, generator=generator))
    if interpolation is not None:
        model.position_interpolation = interpolation
    return model.eval()


def write_encoder(directory: Path, network: str = "mlp", **card: object) -> Encoder:
    """Such an encoder as a run leaves it."""
    save_encoder(random_vit(network), directory, mean=0.53, std=0.26, card={**CARD, **card})
    return load_encoder(str(directory))


def opened(to: str, encoder: Encoder, folder: Path, images: Tensor) -> tuple[Tensor, Tensor]:
    """CLS [B, D] and patches [B, D, h, w] that the printed snippet gives."""
    names: dict[str, object] = {"images": images.numpy()}
    exec(snippet(to, encoder, str(folder)), names)
    cls, patches = (torch.from_numpy(np.asarray(names[name])) for name in ("cls", "patches"))
    if patches.ndim == 3:
        patches = patches.transpose(1, 2).unflatten(2, encoder.grid)
    return cls, patches


def export_into_small_files(name: str, to: str, out: Path) -> tuple[int, str]:
    """Exit code and stderr of an export in a process that may write 100 000 bytes to a file."""
    words = ["export", name, "--to", to, "--out", str(out)]
    script = (
        "import resource, torch; from selfray.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)); "
        f"raise SystemExit(main({words!r}))"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr
