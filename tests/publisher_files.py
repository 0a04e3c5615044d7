"""Files as publishers write them, with random weights, and how the package answers them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from selfray.errors import InputError
from selfray.models.published import load_encoder

TOLERANCE = 2e-5
SHAPES = ((300, 241), (241, 300), (224, 224), (97, 140), (531, 530))
"""Heights and widths: odd margins both ways, enlarged, reduced, and as they are."""


def gray_images() -> list[np.ndarray]:
    """Images of those shapes with edges and noise, uint8 [H, W]."""
    generator = np.random.default_rng(0)
    images = []
    for height, width in SHAPES:
        y, x = np.mgrid[:height, :width]
        image = 127 + 60 * np.sin(x / 9) * np.cos(y / 13) + generator.normal(0, 25, (height, width))
        images.append(image.clip(0, 255).astype(np.uint8))
    return images


def randomise(model: nn.Module, std: float = 0.1) -> None:
    """Let no parameter be zero or one, so that none can be forgotten unnoticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.is_floating_point() and tensor.ndim < 4:
                tensor.add_(torch.empty_like(tensor).normal_(std=std, generator=generator))


def whole_object(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A network with such parameters, to be pickled whole; its classes are PyTorch's."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, tensor.clone())
    return root


def refusal(name: str | Path) -> str:
    """What is said of an encoder that is refused: one line."""
    with pytest.raises(InputError) as error:
        load_encoder(str(name))
    assert "\n" not in str(error.value)
    return str(error.value)


def convert(said: str) -> None:
    """Run the command that a refusal ends with in a shell, as it is printed, from elsewhere."""
    subprocess.run(said.strip().split("the file itself: ")[1], shell=True, cwd="/", check=True)


def in_order(patches: Tensor) -> Tensor:
    """[B, D, h, w] to [B, h*w, D]."""
    return patches.flatten(2).transpose(1, 2)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to `TOLERANCE`, and of values for which that says something."""
    assert expected.std() > 0.1
    difference = (found - expected).abs().max().item()
    assert found.shape == expected.shape and difference <= TOLERANCE
