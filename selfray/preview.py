"""What the networks will see: crops and masks of a few training images, on one PNG."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from selfray.config import PretrainConfig, validate
from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.data.loader import CropBatch
from selfray.pretrain import build_loader
from selfray.run_loop import open_data

_IMAGES = 6  # of the first batch, one row each
_LOCAL = 6  # columns of local crops, at most
_TINT = np.array([255, 140, 0], np.uint8)


def write_preview(config: PretrainConfig, file: Path) -> Path:
    """Draw crops and masks of the first step, as the networks will get them.

    A row an image: the whole image, its two global crops with the patches tinted that are masked
    for the student, its local crops.

    Args:
        config: The run.
        file: PNG to write.

    Returns:
        `file`.

    Raises:
        InputError: Config or data are not fit for a run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    validate(config)
    datasets = open_data(config)
    batch = build_loader(config, datasets, slice(0, min(_IMAGES, config.batch_size))).batch(0)
    images = _images(datasets, batch.image_ids)
    columns = 3 + min(_LOCAL, len(batch.local_crops))
    figure = Figure(figsize=(1.7 * columns, 1.75 * len(images) + 0.7), layout="constrained")
    axes = figure.subplots(len(images), columns, squeeze=False)
    for index, row in enumerate(axes):
        pictures = _pictures(images[index], batch, index, config.encoder.patch_size)
        for axis, (title, picture) in zip(row, pictures, strict=False):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(title, fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(_caption(config, datasets), fontsize=8)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(file, png.getvalue())
    return file


def _images(datasets: list[RadiographDataset], image_ids: tuple[str, ...]) -> list[np.ndarray]:
    places = {id: (d, row) for d in datasets for row, id in enumerate(d.column("image_id"))}
    return [dataset.pixels(row) for dataset, row in (places[id] for id in image_ids)]


def _pictures(
    image: np.ndarray, batch: CropBatch, index: int, patch_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    """Title and picture of every column; uint8 gray or RGB."""
    yield f"image, {image.shape[1]} × {image.shape[0]}", image
    for number, (crops, masks) in enumerate(zip(batch.global_crops, batch.masks, strict=True), 1):
        mask = masks[index].numpy()
        title = f"global crop {number}, {mask.sum()} of {mask.size} masked"
        yield title, tinted(crops[index].numpy(), mask, patch_size)
    for number, crops in enumerate(batch.local_crops, 1):
        yield f"local crop {number}, {crops.shape[-1]} px", crops[index].numpy()


def tinted(crop: np.ndarray, mask: np.ndarray, patch_size: int) -> np.ndarray:
    """A crop with its masked patches in orange.

    Args:
        crop: uint8 [S, S].
        mask: bool [patches], row by row.
        patch_size: Side of a patch, pixels.

    Returns:
        uint8 [S, S, 3], RGB.
    """
    side = len(crop) // patch_size
    masked = mask.reshape(side, side).repeat(patch_size, 0).repeat(patch_size, 1)
    colour = np.stack([crop] * 3, axis=-1)
    colour[masked] = colour[masked] // 2 + _TINT // 2
    return colour


def _caption(config: PretrainConfig, datasets: list[RadiographDataset]) -> str:
    names = ", ".join(
        f"{d.info['name']} (synthetic phantom)" if d.synthetic else d.info["name"] for d in datasets
    )
    return (
        f"{names}\nrecipe {config.recipe}, seed {config.seed}, first step; "
        "orange: masked for the student"
    )
