"""Encoder x dataset -> feature directory: the frozen features of every image, once.

`cls.npy` and `patch_mean.npy` [N, D] float32, on request `patch_tokens.npy` [N, h, w, D] float16;
`rows.parquet`, the dataset's columns without pixels and masks; `manifest.json`, what made them.
The pixel baselines have `cls.npy` only: a vector of pixels has no patches.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from selfray.data.dataset import RadiographDataset, write_atomically
from selfray.errors import InputError, nearest
from selfray.progress import progress_bar

FORMAT_NAME = "selfray-features"
PIXEL_ENCODERS = ("pixels:pca", "pixels:16x16")

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_PIXEL_COLUMNS = ("image", "mask", "finding_mask")
_FLUSH_ROWS = 512  # rows lost at most by an interruption
_PCA_SIZE = 56  # pixels a side
_PCA_COMPONENTS = 256
_PCA_ROWS = 20_000  # at most so many training images fit the components
# Of the largest singular value. Below is float32's rounding, when training images repeat; a probe
# that scales it to standard deviation 1 would make it the largest feature of any other image.
_PCA_FLOOR = 1e-6
_THUMBNAIL_SIZE = 16


class _Source(Protocol):
    """What gives features: an encoder or a pixel baseline."""

    identity: dict[str, Any]
    """What must be equal for features to be the same."""
    widths: dict[str, tuple[int, ...]]
    """Shape of one row of each array."""

    def prepare(self, pixels: np.ndarray) -> Any:
        """One image, uint8 [H, W], to what `infer` takes; runs in a thread."""
        ...

    def infer(self, images: list[Any]) -> dict[str, np.ndarray]:
        """Arrays by name for a batch."""
        ...


class _EncoderSource:
    def __init__(self, name: str, patch_tokens: bool) -> None:
        from selfray.models.published import load_encoder

        self.encoder = e = load_encoder(name)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        e.model.to(self.device)
        self.widths: dict[str, tuple[int, ...]] = {"cls": (e.width,), "patch_mean": (e.width,)}
        if patch_tokens:
            self.widths["patch_tokens"] = (*e.grid, e.width)
        self.identity = {
            "weights_sha256": e.weights_sha256,
            "synthetic": e.synthetic,
            "preprocessing": e.preprocessing.description(),
        }

    def prepare(self, pixels: np.ndarray) -> torch.Tensor:
        return self.encoder.preprocess(pixels)

    def infer(self, images: list[torch.Tensor]) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            cls, patches = self.encoder.features(torch.stack(images).to(self.device))
        arrays = {"cls": cls.float(), "patch_mean": patches.float().mean(dim=(2, 3))}
        if "patch_tokens" in self.widths:
            arrays["patch_tokens"] = patches.permute(0, 2, 3, 1).half()
        return {name: value.cpu().numpy() for name, value in arrays.items()}


class _ThumbnailSource:
    """The pixels of a small square image, 0 to 1, as features."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.widths: dict[str, tuple[int, ...]] = {"cls": (size * size,)}
        self.identity: dict[str, Any] = {
            "weights_sha256": None,
            "synthetic": False,
            "preprocessing": {"image_size": size, "resize": "centre crop, area"},
        }

    def prepare(self, pixels: np.ndarray) -> np.ndarray:
        height, width = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[top : top + side, left : left + side]
        small = cv2.resize(square, (self.size, self.size), interpolation=cv2.INTER_AREA)
        return small.astype(np.float32).ravel() / 255

    def infer(self, images: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {"cls": np.stack(images)}


class _PcaSource(_ThumbnailSource):
    """The principal components of the pixels, fitted on the training split."""

    def __init__(self, dataset: RadiographDataset) -> None:
        from sklearn.decomposition import PCA

        super().__init__(_PCA_SIZE)
        rows = dataset.rows("train")
        chosen = rows[np.linspace(0, len(rows) - 1, min(len(rows), _PCA_ROWS)).astype(int)]
        with ThreadPoolExecutor(_workers()) as pool:
            pixels = np.stack(list(pool.map(lambda row: self.prepare(dataset.pixels(row)), chosen)))
        components = min(_PCA_COMPONENTS, len(rows) - 1)
        # PCA's own float32 mean of many rows is rounded by enough to pass for a component.
        self.mean = pixels.mean(axis=0, dtype=np.float64).astype(np.float32)
        pixels -= self.mean
        self.pca = PCA(components, svd_solver="randomized", random_state=0).fit(pixels)
        singular = self.pca.singular_values_  # largest first
        self.kept = int((singular >= _PCA_FLOOR * singular[0]).sum())
        self.widths = {"cls": (self.kept,)}
        self.identity["preprocessing"]["pca_components"] = self.kept

    def infer(self, images: list[np.ndarray]) -> dict[str, np.ndarray]:
        components = self.pca.transform(np.stack(images) - self.mean)[:, : self.kept]
        return {"cls": components.astype(np.float32)}


@dataclass(frozen=True)
class Features:
    """A feature directory opened for reading.

    Attributes:
        cls: [N, D] float32, memory-mapped.
        patch_mean: [N, D] float32, memory-mapped; None for pixel baselines.
        rows: The dataset's columns without pixels; row i belongs to array row i.
        manifest: What made them.
    """

    cls: np.ndarray
    patch_mean: np.ndarray | None
    rows: pa.Table
    manifest: dict[str, Any]


def is_feature_directory(path: Path) -> bool:
    """Whether this is a finished feature directory."""
    try:
        return json.loads((path / "manifest.json").read_text())["format"] == FORMAT_NAME
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_features(directory: Path) -> Features:
    """Open what `extract_features` wrote.

    Raises:
        InputError: Not a feature directory, or a file of it is missing or damaged.
    """
    if not is_feature_directory(directory):
        raise InputError(f"{directory} is no feature directory. Make one with `selfray features`.")
    manifest = json.loads((directory / "manifest.json").read_text())
    try:
        arrays = {
            name: np.load(directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("cls", "patch_mean")
            if name in manifest["arrays"]
        }
        rows = pq.read_table(directory / "rows.parquet")
    except (OSError, ValueError, pa.ArrowInvalid) as cause:
        raise InputError(
            f"{directory}: a file of the features is missing or damaged. Remove the directory and "
            "extract them again."
        ) from cause
    return Features(arrays["cls"], arrays.get("patch_mean"), rows, manifest)


def extract_features(
    encoder: str, data: Path, out: Path, *, batch_size: int = 32, patch_tokens: bool = False
) -> Path:
    """Write the features of every image of a dataset.

    Interrupted, the same command continues after the last flushed rows. Repeated on a finished
    directory it does nothing.

    Args:
        encoder: A name for `load_encoder`, `pixels:pca` (256 principal components of the image at
            56 x 56) or `pixels:16x16` (thumbnails).
        data: Dataset directory.
        out: Feature directory to make.
        batch_size: Images at a time.
        patch_tokens: Also write every patch's features, float16.

    Returns:
        `out`.

    Raises:
        InputError: `out` holds something else, or features of another encoder, preprocessing or
            dataset; a feature is not finite; an image does not decode.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}. Give 1 or more.")
    dataset = RadiographDataset(data)
    source = _open_source(encoder, dataset, patch_tokens)
    manifest = _manifest(encoder, dataset, source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        _require_same(out, out / "manifest.json", manifest)
        return out
    partial = out.with_name(out.name + ".partial")
    arrays, done = _open_partial(partial, manifest)
    total, label = len(dataset), f"features {encoder}"
    with progress_bar(total=total, initial=done, unit="image", desc=label) as bar:
        flushed = done
        for start, images in _batches(dataset, source, done, batch_size):
            stop = start + len(images)
            for name, values in source.infer(images).items():
                _require_finite(values, start, encoder)
                arrays[name][start:stop] = values
            bar.update(len(images))
            if stop - flushed >= _FLUSH_ROWS or stop == len(dataset):
                _flush(partial, arrays, stop)
                flushed = stop
    columns = [name for name in dataset.table.column_names if name not in _PIXEL_COLUMNS]
    rows = pa.BufferOutputStream()
    pq.write_table(dataset.table.select(columns), rows)
    write_atomically(partial / "rows.parquet", rows.getvalue().to_pybytes())
    write_atomically(partial / "manifest.json", json.dumps(manifest, indent=2).encode())
    if out.exists():
        out.rmdir()
    partial.rename(out)
    # Only now: without its plan, a partial directory could not be taken up again.
    for name in ("plan.json", "progress.json"):
        (out / name).unlink()
    return out


def require_encoder(encoder: str, dataset: RadiographDataset) -> None:
    """Check that features can be extracted, without extracting any.

    Args:
        encoder: As for `extract_features`.
        dataset: Whose images it will see.

    Raises:
        InputError: There is no such encoder, its files are not whole, or `pixels:pca` has no
            training images.
    """
    if encoder.startswith("pixels:"):
        _require_pixel_encoder(encoder, dataset)
    else:
        _EncoderSource(encoder, patch_tokens=False)


def _require_pixel_encoder(encoder: str, dataset: RadiographDataset) -> None:
    if encoder not in PIXEL_ENCODERS:
        raise InputError(f"encoder {encoder!r} is unknown. {nearest(encoder, PIXEL_ENCODERS)}")
    images = len(dataset.rows("train"))
    if encoder == "pixels:pca" and images < 2:
        raise InputError(
            f"{dataset.directory}: the train split has {images} images; pixels:pca needs 2 "
            "or more. Leave pixels:pca out, or make the dataset with a train split."
        )


def _open_source(encoder: str, dataset: RadiographDataset, patch_tokens: bool) -> _Source:
    if not encoder.startswith("pixels:"):
        return _EncoderSource(encoder, patch_tokens)
    _require_pixel_encoder(encoder, dataset)
    if patch_tokens:
        raise InputError(f"{encoder} has no patch tokens. Leave --patch-tokens out.")
    return _PcaSource(dataset) if encoder == "pixels:pca" else _ThumbnailSource(_THUMBNAIL_SIZE)


def _manifest(encoder: str, dataset: RadiographDataset, source: _Source) -> dict[str, Any]:
    arrays = {
        name: {
            "shape": [len(dataset), *width],
            "dtype": "float16" if name == "patch_tokens" else "float32",
        }
        for name, width in source.widths.items()
    }
    return {
        "format": FORMAT_NAME,
        "version": 1,
        "encoder": encoder,
        **source.identity,
        "precision": "float32",
        "arrays": arrays,
        "dataset": {
            "name": dataset.info["name"],
            "origin": dataset.info["origin"],
            "fingerprint": dataset.fingerprint,
            "synthetic": dataset.synthetic,
            "findings": list(dataset.findings),
        },
    }


def _require_same(directory: Path, file: Path, manifest: dict[str, Any]) -> None:
    """Refuse to continue or to reuse what was made from something else."""
    try:
        found = json.loads(file.read_text())
        if found["format"] != FORMAT_NAME:
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise InputError(
            f"{directory} exists and holds no features. Give a new directory, or remove it."
        ) from cause
    named = {
        "encoder weights": lambda m: m["weights_sha256"],
        "dataset": lambda m: m["dataset"]["fingerprint"],
        "preprocessing": lambda m: m["preprocessing"],
        "precision": lambda m: m["precision"],
        "arrays": lambda m: m["arrays"],
    }
    for what, value in named.items():
        if value(found) != value(manifest):
            raise InputError(
                f"{directory} holds features of another {what}: {_short(value(found))}, asked for "
                f"{_short(value(manifest))}. Give another --out, or remove the directory."
            )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else json.dumps(value)


def _open_partial(partial: Path, manifest: dict[str, Any]) -> tuple[dict[str, np.ndarray], int]:
    """Make the arrays, or take up those of an interrupted extraction after its flushed rows."""
    plan = partial / "plan.json"
    if partial.exists() and any(partial.iterdir()):
        _require_same(partial, plan, manifest)
    partial.mkdir(parents=True, exist_ok=True)
    progress = partial / "progress.json"
    done = json.loads(progress.read_text())["rows"] if progress.exists() else 0
    write_atomically(plan, json.dumps(manifest).encode())
    arrays = {}
    for name, array in manifest["arrays"].items():
        file = partial / f"{name}.npy"
        with _room_for(manifest, partial):
            arrays[name] = np.lib.format.open_memmap(
                file,
                mode="r+" if done else "w+",
                dtype=array["dtype"],
                shape=None if done else tuple(array["shape"]),
            )
            _reserve(file)
    return arrays, done


def _reserve(file: Path) -> None:
    """Take a mapped file's room on the disk now; what it holds stays.

    A mapped file has holes until it is written to, and on a full disk that kills the process
    (SIGBUS) where no exception can tell why.
    """
    with file.open("r+b") as opened:
        os.posix_fallocate(opened.fileno(), 0, file.stat().st_size)


@contextmanager
def _room_for(manifest: dict[str, Any], partial: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno not in _NO_ROOM:
            raise
        arrays = manifest["arrays"].values()
        need = sum(math.prod(a["shape"]) * np.dtype(a["dtype"]).itemsize for a in arrays)
        raise InputError(
            f"{partial} needs {math.ceil(need / 1e6)} MB, and there is no room for it "
            f"({cause.strerror}). Make room there, then repeat the command."
        ) from cause


def _flush(partial: Path, arrays: dict[str, np.ndarray], rows: int) -> None:
    for array in arrays.values():
        assert isinstance(array, np.memmap)
        array.flush()
    write_atomically(partial / "progress.json", json.dumps({"rows": rows}).encode())


def _batches(
    dataset: RadiographDataset, source: _Source, start: int, batch_size: int
) -> Iterator[tuple[int, list[Any]]]:
    """Batches of prepared images and their first row; decoding runs two batches ahead."""
    with ThreadPoolExecutor(_workers()) as pool:
        waiting: deque[tuple[int, list[Any]]] = deque()
        for first in range(start, len(dataset), batch_size):
            rows = range(first, min(first + batch_size, len(dataset)))
            futures = [pool.submit(lambda r: source.prepare(dataset.pixels(r)), r) for r in rows]
            waiting.append((first, futures))
            if len(waiting) > 2:
                first, futures = waiting.popleft()
                yield first, [future.result() for future in futures]
        for first, futures in waiting:
            yield first, [future.result() for future in futures]


def _require_finite(values: np.ndarray, start: int, encoder: str) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        row = start + int(np.argmin(finite))
        raise InputError(
            f"{encoder}: the features of row {row} are not finite. Check the encoder's weights: a "
            "diverged run gives such values."
        )


def _workers() -> int:
    return min(4, os.cpu_count() or 1)
