"""What the networks will see: crops, masks and texts of a few training images, on one PNG."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from selfray.config import ContrastiveConfig, PretrainConfig, RunConfig, validate
from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.data.loader import CropBatch
from selfray.data.report_loader import with_reports
from selfray.pretrain import build_loader
from selfray.pretrain_language import build_report_loader
from selfray.run_loop import open_data

_IMAGES = 6  # of the first batch, one row each
_LOCAL = 6  # columns of local crops, at most
_TINT = np.array([255, 140, 0], np.uint8)


def write_preview(config: RunConfig, file: Path) -> Path:
    """Draw what the first step shows the networks.

    A row an image: the whole image, its two global crops with the patches tinted that are masked
    for the student, its local crops; of a run with reports, its one crop, and its text.

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
    rows = _rows_of(config, datasets, slice(0, min(_IMAGES, config.batch_size)))
    columns = len(rows[0])
    figure = Figure(figsize=(1.7 * columns, 1.75 * len(rows) + 0.7), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, pictures in zip(axes, rows, strict=True):
        for axis, (title, picture) in zip(row, pictures, strict=True):
            if isinstance(picture, str):
                axis.text(0, 1, textwrap.fill(picture, 28), fontsize=5, va="top")
                axis.set_title(title, fontsize=7)
                continue
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axis.set_title(title, fontsize=7)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.suptitle(_caption(config, datasets), fontsize=8)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_atomically(file, png.getvalue())
    return file


def _rows_of(
    config: RunConfig, datasets: list[RadiographDataset], slots: slice
) -> list[list[tuple[str, np.ndarray | str]]]:
    """Title, and picture or text, of every column of every row."""
    if isinstance(config, ContrastiveConfig):
        # Whether a text will be cut is not known before there is a tokenizer.
        places = with_reports(datasets, "train").places
        pairs = build_report_loader(config, places, lambda _: True, slots).batch(0)
        images = _images(datasets, pairs.image_ids)
        return [
            [_whole(image), (f"crop, {crop.shape[-1]} px", crop.numpy()), ("text", text)]
            for image, crop, text in zip(images, pairs.images, pairs.texts, strict=True)
        ]
    assert isinstance(config, PretrainConfig)
    batch = build_loader(config, datasets, slots).batch(0)
    patch, columns = config.encoder.patch_size, 3 + min(_LOCAL, len(batch.local_crops))
    return [
        list(islice(_pictures(image, batch, index, patch), columns))
        for index, image in enumerate(_images(datasets, batch.image_ids))
    ]


def _whole(image: np.ndarray) -> tuple[str, np.ndarray | str]:
    return f"image, {image.shape[1]} × {image.shape[0]}", image


def _images(datasets: list[RadiographDataset], image_ids: tuple[str, ...]) -> list[np.ndarray]:
    places = {id: (d, row) for d in datasets for row, id in enumerate(d.column("image_id"))}
    return [dataset.pixels(row) for dataset, row in (places[id] for id in image_ids)]


def _pictures(
    image: np.ndarray, batch: CropBatch, index: int, patch_size: int
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Title and picture of every column; uint8 gray or RGB."""
    yield _whole(image)
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


def _caption(config: RunConfig, datasets: list[RadiographDataset]) -> str:
    names = ", ".join(
        f"{d.info['name']} (synthetic phantom)" if d.synthetic else d.info["name"] for d in datasets
    )
    told = f"{names}\nrecipe {config.recipe}, seed {config.seed}, first step"
    masked = isinstance(config, PretrainConfig)
    return f"{told}; orange: masked for the student" if masked else told
