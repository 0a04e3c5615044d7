"""Whether an encoder on this machine does what it is meant to: `selfray encoders --check`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from selfray.errors import InputError
from selfray.models.encoder import Encoder
from selfray.models.encoder_directory import DESCRIPTION, GOLDEN
from selfray.models.golden import TOLERANCE, VALUES, fixed_images
from selfray.models.huggingface import WEIGHTS, is_dinov2, read_json
from selfray.models.published import find_directory, load_encoder

# Of the range that 0 to 255 can become: what a cubic resize without rounding overshoots at an edge
# at most, and what the fixed images must reach.
_OVERSHOOT, _REACHED = 0.1, 0.5
# Cosine between the features of the two fixed images. Trained or not, encoders here give 0.93 to
# 0.98; the same encoders give over 0.99999 when pixels of 0 to 1 are taken for 0 to 255.
_LARGEST_COSINE = 0.9999
# What random weights give, `golden_cls` of torch 2.13 and 2.14 on x86-64.
_RANDOM_GOLDEN = {
    "random:vit_pico": [
        [0.522777, 1.305203, 0.508216, -0.795346, 1.183404, -1.277685, 2.417083, -0.325100],
        [0.739379, 0.907639, 0.736757, -0.705959, 1.385312, -1.241085, 2.377257, -0.689932],
    ],
    "random:vit_small": [
        [1.906285, -0.283082, -1.351545, 0.022797, 0.425680, -0.794707, 0.454952, 0.287126],
        [2.199292, 0.099211, -1.239610, -0.246885, 0.320890, -0.821531, 0.569447, 0.041602],
    ],
    "random:vit_base": [
        [0.375288, -0.131541, -0.797782, 0.897295, -1.008373, -2.062823, -1.667226, 1.079110],
        [0.670650, -0.217137, -0.872019, 0.558833, -0.951424, -1.957944, -1.366975, 0.799142],
    ],
}


def self_test(name: str) -> Iterator[str]:
    """Check an encoder on two fixed images, on the CPU.

    Args:
        name: As for `load_encoder`.

    Yields:
        A line for each check that it passed.

    Raises:
        InputError: A file is missing, damaged or of another model; or the encoder gives what it
            must not: the message says what.
    """
    encoder = load_encoder(name)
    millions = sum(p.numel() for p in encoder.model.parameters()) / 1e6
    rows, columns = encoder.grid
    yield (
        f"{name}: whole, {millions:.1f} million parameters, SHA-256 {encoder.weights_sha256[:12]}"
    )
    images = fixed_images()
    inputs = torch.stack([encoder.preprocess(image) for image in images])
    yield _check_inputs(encoder, inputs)
    cls, patches = encoder(images)
    if patches.shape[1:] != (encoder.width, rows, columns) or cls.shape[1] != encoder.width:
        raise InputError(
            f"{name}: patches are {list(patches.shape[1:])} and CLS [{cls.shape[1]}], expected "
            f"[{encoder.width}, {rows}, {columns}]. Take all files from the same model."
        )
    yield _check_features(encoder, images, cls, patches)
    directory = None if ":" in name and not Path(name).is_dir() else find_directory(name)
    yield _check_golden(name, directory, cls)
    if directory and _transformers_can(directory):
        yield _check_publisher(name, directory, images, cls, patches)


def _check_inputs(encoder: Encoder, inputs: Tensor) -> str:
    """Inputs [B, C, S, S] span what mean and std make of pixels of 0 to 255."""
    means, stds = encoder.preprocessing.mean, encoder.preprocessing.std
    for channel, (mean, std) in enumerate(zip(means, stds, strict=True)):
        if not (0 <= mean <= 1 and 0 < std <= 1):
            raise InputError(
                f"{encoder.name}: mean {mean:g} and standard deviation {std:g} of the "
                "preprocessing, allowed: 0 to 1, for pixels that were divided by 255. Take "
                "preprocessor_config.json from the publisher."
            )
        low, high = -mean / std, (1 - mean) / std
        least, most = float(inputs[:, channel].min()), float(inputs[:, channel].max())
        slack = _OVERSHOOT * (high - low)
        within = least >= low - slack and most <= high + slack  # false where it is not a number
        if not (within and most - least >= _REACHED * (high - low)):
            raise InputError(
                f"{encoder.name}: preprocessed pixels are {least:.2f} to {most:.2f}, expected "
                f"nearly {low:.2f} to {high:.2f}: the preprocessing is of another range of values. "
                "Take preprocessor_config.json from the publisher."
            )
    return (
        f"  input {list(inputs.shape[1:])}, {inputs.min():.2f} to {inputs.max():.2f}: what its "
        "mean and standard deviation make of pixels of 0 to 255"
    )


def _check_features(
    encoder: Encoder, images: list[np.ndarray], cls: Tensor, patches: Tensor
) -> str:
    """Features of the fixed images are finite, different, and the same each time."""
    if not (bool(cls.isfinite().all()) and bool(patches.isfinite().all())):
        raise InputError(
            f"{encoder.name}: features are not finite: a diverged training or a damaged copy. "
            "Copy the files anew, or take an earlier checkpoint."
        )
    first, second = cls.double()
    cosine = float(first @ second / (first.norm() * second.norm()))  # not a number for zeros
    if not cosine <= _LARGEST_COSINE:
        raise InputError(
            f"{encoder.name}: two different images have nearly the same features (cosine "
            f"{cosine:.5f}, allowed: {_LARGEST_COSINE} at most): weights that collapsed or were "
            "hardly trained, or a wrong range of values. Take other weights."
        )
    if torch.equal(patches[0], patches[1]):
        raise InputError(
            f"{encoder.name}: two different images have the same features of patches: weights "
            "that collapsed. Take other weights."
        )
    alone = torch.cat([encoder(image)[0] for image in images])
    apart = float((alone - cls).abs().max() / cls.abs().max())
    if not apart <= TOLERANCE:
        raise InputError(
            f"{encoder.name}: an image has other features alone than in a batch, or other ones "
            f"each time ({apart:.1e} of the largest value, allowed: {TOLERANCE:.0e}). The "
            "network must be in evaluation mode and treat each image for itself."
        )
    return f"  features finite; two images differ, cosine {cosine:.3f}; alone as in a batch"


def _check_golden(name: str, directory: Path | None, cls: Tensor) -> str:
    golden, source = _RANDOM_GOLDEN.get(name), "selfray"
    if directory and (directory / DESCRIPTION).is_file():
        golden = read_json(directory / DESCRIPTION).get(GOLDEN)
        source = str(directory / DESCRIPTION)
    if golden is None:
        shares = (cls[:, :VALUES] / cls.abs().max()).numpy()
        rounded = np.rint(shares * 100).astype(np.int64)
        begins = " ".join(f"{value:.4f}" for value in cls[0, :4].tolist())
        return (
            "  no golden values are known for it; another machine must print the same: "
            f"{hashlib.sha256(rounded.tobytes()).hexdigest()[:12]}, CLS {begins} ..."
        )
    try:
        kept = torch.tensor(golden, dtype=torch.float32).reshape(len(cls), VALUES)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{source}: {GOLDEN} is not {len(cls)} lists of {VALUES} numbers. Copy it anew."
        ) from None
    off = float((cls[:, :VALUES] - kept).abs().max() / cls.abs().max())
    if not off <= TOLERANCE:
        raise InputError(
            f"{name}: features differ from its golden values by {off:.1e} of the largest value, "
            f"allowed: {TOLERANCE:.0e}. The weights are not those that were saved, or a library "
            "computes differently here: copy the files anew, then compare package versions."
        )
    return f"  golden values: equal within {off:.1e} of the largest value"


def _transformers_can(directory: Path) -> bool:
    return (
        find_spec("transformers") is not None
        and (directory / WEIGHTS).is_file()
        and is_dinov2(read_json(directory / "config.json"))
    )


def _check_publisher(
    name: str, directory: Path, images: list[np.ndarray], cls: Tensor, patches: Tensor
) -> str:
    """The features equal those of transformers' class, with its own preprocessing."""
    from transformers import AutoModel, BitImageProcessorPil
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor = BitImageProcessorPil.from_pretrained(directory)
    theirs = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        inputs = processor([Image.fromarray(image) for image in images], return_tensors="pt")
        tokens = theirs(**inputs).last_hidden_state
    found = torch.cat([cls[:, None], patches.flatten(2).transpose(1, 2)], dim=1)
    registers = tokens.shape[1] - found.shape[1]
    expected = torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1)
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= TOLERANCE:
        raise InputError(
            f"{name}: features differ from those of transformers' {type(theirs).__name__} by "
            f"{off:.1e} of the largest value, allowed: {TOLERANCE:.0e}. Report it, with the "
            "versions of selfray, torch and transformers."
        )
    return f"  transformers' {type(theirs).__name__}: equal within {off:.1e} of the largest value"
