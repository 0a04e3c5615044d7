"""Encoder x images -> feature directory: the frozen features of every image, once."""

from __future__ import annotations

import math
import os
import shutil
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from selfray import distributed, feature_directory
from selfray.data.dataset import RadiographDataset
from selfray.data.image_source import DatasetImages, FolderImages, Prepare, open_images
from selfray.errors import InputError, Interrupted, RunStopped, nearest
from selfray.feature_directory import (
    FORMAT_NAME,
    FeatureWriter,
    open_features,
    read_manifest,
    require_same,
)
from selfray.inference import BACKENDS, PRECISIONS, Inference, Samples, require_backend
from selfray.models.encoder import Encoder
from selfray.models.preprocessing import REDUCED, Preprocessing
from selfray.models.published import load_encoder
from selfray.models.training_data import mentioned
from selfray.pixel_baselines import Thumbnail, open_pixel_encoder, require_pixel_encoder
from selfray.progress import progress_bar

_CHECKED_IMAGES = 8  # on which the promise of a precision is checked
_CALIBRATION_IMAGES = 16  # from which int8 takes the ranges of activations
_PIXEL_BATCH = 32
_MOST_DECODERS = 16  # each is a process of some 300 MB where files are read

Images = DatasetImages | FolderImages


def extract_features(
    encoder: str,
    data: Path,
    out: Path,
    *,
    batch_size: int | None = None,
    patch_tokens: bool = False,
    precision: str = "exact",
    backend: str = "auto",
) -> Path:
    """Write the features of every image.

    Interrupted, the same command continues after the last chunks that were written. Repeated on a
    finished directory it does nothing. Under `torchrun` the processes share the images.

    Args:
        encoder: A name for `load_encoder`, `pixels:pca` (256 principal components of the image at
            56 x 56) or `pixels:16x16` (thumbnails).
        data: Dataset directory, or a folder with DICOM, PNG, JPEG or TIFF files.
        out: Feature directory to make.
        batch_size: Images at a time; found out if None.
        patch_tokens: Also write every patch's features, float16.
        precision: How near to PyTorch's float32 on the publisher's preprocessing: `exact` within
            2e-5 of the largest feature; `bf16` cosine >= 0.9999 and `int8` cosine >= 0.998 of
            every CLS, which is checked on a few of the images at the start.
        backend: `torch`, `openvino`, or `auto` for the fastest that keeps the promise.

    Returns:
        `out`.

    Raises:
        InputError: `out` holds something else, or features of another encoder, preprocessing,
            precision or dataset; a feature is not finite; no image can be used.
    """
    _require_options(batch_size, precision, backend)
    out = out.resolve()
    if os.path.ismount(out):
        raise InputError(f"{out} is a mount point. Give a folder in it, to be made.")
    images = open_images(data)
    source = _open_source(encoder, images, patch_tokens, batch_size)
    manifest = _manifest(encoder, images, source, precision)
    _warn_of_training_data(encoder, images, source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        found = read_manifest(out, "manifest.json")
        require_same(out, found, manifest)
        _require_backend(out, found, backend)
        open_features(out)
        print(f"features: {out} is finished, nothing to do", file=sys.stderr)
        return out
    distributed.start()
    with FeatureWriter(out, distributed.rank()) as writer:
        with _interruptible(writer), _threads_as_they_were():
            work = _begin(source, images, writer, manifest, backend)
            _extract_missing(work, images, writer, f"features {encoder}")
        _wait_for_others()
        if distributed.rank() == 0:
            _finish(source, images, writer, data)
        _wait_for_others()
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
        require_pixel_encoder(encoder, DatasetImages(dataset))
    else:
        load_encoder(encoder)


@dataclass(frozen=True)
class _Reading:
    """From a file to what a batch is made of.

    Attributes:
        prepare: Done to each image where it is decoded.
        at_least: Pixels of the shorter side that a JPEG keeps when it is decoded; None: all.
    """

    prepare: Prepare
    at_least: int | None

    def of(self, images: Images, rows: Sequence[int]) -> Iterator[np.ndarray | str]:
        return images.prepared(rows, self.prepare, workers=_decoders(), at_least=self.at_least)


@dataclass(frozen=True)
class _Work:
    """How features are computed: `infer` by the batch, of what `reading` gives."""

    reading: _Reading
    infer: Callable[[np.ndarray], dict[str, np.ndarray]]
    batch_size: int
    concurrency: int


class _Source(Protocol):
    """What gives features: an encoder or a pixel baseline."""

    identity: dict[str, Any]
    """What must be equal for features to be the same."""
    widths: dict[str, tuple[int, ...]]
    """Shape of one row of each array."""

    def begin(
        self, images: Images, writer: FeatureWriter, manifest: dict[str, Any], backend: str
    ) -> _Work:
        """Get ready; `manifest` may be added to, as long as it names no backend."""
        ...

    def end(self) -> None:
        """Remove what was needed on the way."""
        ...


class _EncoderSource:
    def __init__(self, encoder: Encoder, patch_tokens: bool, batch_size: int | None) -> None:
        self._encoder, self._patch_tokens, self._batch_size = encoder, patch_tokens, batch_size
        self._inference: Inference | None = None
        width = (encoder.width,)
        self.widths: dict[str, tuple[int, ...]] = {"cls": width, "patch_mean": width}
        if patch_tokens:
            self.widths["patch_tokens"] = (*encoder.grid, encoder.width)
        self.identity = {
            "weights_sha256": encoder.weights_sha256,
            "synthetic": encoder.synthetic,
            "training_data": list(encoder.training_data),
            "preprocessing": encoder.preprocessing.description(),
        }

    def begin(
        self, images: Images, writer: FeatureWriter, manifest: dict[str, Any], backend: str
    ) -> _Work:
        self._inference = inference = Inference(
            self._encoder,
            patch_tokens=self._patch_tokens,
            directory=writer.partial,
            threads=_threads(),
            batch_size=self._batch_size,
        )
        precision = manifest["precision"]
        if precision == "exact" and backend != "openvino":
            manifest["backend"] = "torch-float32"  # which is what others are compared with
        if "backend" in manifest:
            chosen = inference.open(manifest["backend"])
        else:
            samples, reference, near = self._samples(images, precision, inference)
            chosen, measured = inference.choose(precision, backend, samples, reference)
            manifest |= {"backend": chosen.name, "fidelity": measured, "reads_reduced": near}
        near = manifest.get("reads_reduced", False)
        reading = self._near_reading() if near else self._exact_reading()
        return _Work(reading, chosen, chosen.batch_size, chosen.concurrency)

    def _samples(
        self, images: Images, precision: str, inference: Inference
    ) -> tuple[Samples, np.ndarray, bool]:
        """Images to check on, their reference, and whether they are read reduced.

        They are not where that is too far off.
        """
        exact = self._exact_reading()
        if precision != "exact" and isinstance(self._encoder.preprocessing, Preprocessing):
            samples = _samples(images, self._near_reading(), exact)
            reference = inference.reference(samples)
            if inference.reading_is_near(precision, samples, reference):
                return samples, reference, True
            print(
                "features: images are decoded and resized as the encoder's publisher does it, as "
                "the faster way is too far off here",
                file=sys.stderr,
            )
        samples = _samples(images, exact, exact)
        return samples, inference.reference(samples), False

    def _exact_reading(self) -> _Reading:
        return _Reading(self._encoder.preprocessing.square, None)

    def _near_reading(self) -> _Reading:
        preprocessing = self._encoder.preprocessing
        assert isinstance(preprocessing, Preprocessing)
        return _Reading(
            preprocessing.square_nearly, math.ceil(REDUCED * preprocessing.shorter_side)
        )

    def end(self) -> None:
        if self._inference is not None:
            self._inference.forget_graph()


class _PixelSource:
    def __init__(self, baseline: Thumbnail) -> None:
        self._baseline = baseline
        self.widths, self.identity = baseline.widths, baseline.identity

    def begin(
        self, images: Images, writer: FeatureWriter, manifest: dict[str, Any], backend: str
    ) -> _Work:
        del images, writer, backend
        manifest["backend"] = "pixels"
        return _Work(_Reading(self._baseline.prepare, None), self._baseline, _PIXEL_BATCH, 1)

    def end(self) -> None:
        pass


def _open_source(
    encoder: str, images: Images, patch_tokens: bool, batch_size: int | None
) -> _Source:
    if not encoder.startswith("pixels:"):
        return _EncoderSource(load_encoder(encoder), patch_tokens, batch_size)
    if patch_tokens:
        raise InputError(f"{encoder} has no patch tokens. Leave --patch-tokens out.")
    return _PixelSource(open_pixel_encoder(encoder, images, _decoders()))


def _require_options(batch_size: int | None, precision: str, backend: str) -> None:
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size is {batch_size}. Give 1 or more.")
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown. {nearest(precision, PRECISIONS)}")
    if backend not in BACKENDS:
        raise InputError(f"backend {backend!r} is unknown. {nearest(backend, BACKENDS)}")
    require_backend(precision, backend)


def _manifest(encoder: str, images: Images, source: _Source, precision: str) -> dict[str, Any]:
    arrays = {
        name: {
            "shape": [len(images), *width],
            "dtype": "float16" if name == "patch_tokens" else "float32",
        }
        for name, width in source.widths.items()
    }
    return {
        "format": FORMAT_NAME,
        "version": 1,
        "encoder": encoder,
        **source.identity,
        "precision": precision,
        "arrays": arrays,
        "dataset": images.description,
    }


def _warn_of_training_data(encoder: str, images: Images, source: _Source) -> None:
    seen = mentioned(source.identity.get("training_data", ()), *images.said_of_itself)
    if seen:
        print(
            f"features: {encoder} was trained on {', '.join(seen)}, which the data's name or "
            "origin mentions: what is measured on images that it saw is too good",
            file=sys.stderr,
        )


@contextmanager
def _interruptible(writer: FeatureWriter) -> Iterator[None]:
    """Ctrl-C and SIGTERM say that the same command goes on."""
    in_main = threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGTERM, signal.default_int_handler) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; the same command goes on from {writer.partial.name}"
        ) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, former)


@contextmanager
def _threads_as_they_were() -> Iterator[None]:
    former = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _wait_for_others() -> None:
    try:
        distributed.barrier()
    except RuntimeError as cause:  # of the process group
        raise RunStopped("another process stopped, which says why; repeat the command") from cause


def _require_backend(out: Path, found: dict[str, Any], backend: str) -> None:
    made = str(found.get("backend", backend))
    if backend != "auto" and made != "pixels" and made.partition("-")[0] != backend:
        raise InputError(
            f"{out} holds features by {made}, asked for {backend}. Give another --out, remove the "
            "directory, or leave --backend out."
        )


def _begin(
    source: _Source, images: Images, writer: FeatureWriter, manifest: dict[str, Any], backend: str
) -> _Work:
    """Make the arrays or take them up; the first process decides, the others follow."""
    work = None
    if distributed.rank() == 0:
        plan = writer.begun(manifest) or manifest
        _require_backend(writer.partial, plan, backend)
        writer.begin(plan)
        if "backend" not in plan:
            try:
                work = source.begin(images, writer, plan, backend)
            except InputError:  # nothing is lost, and the command is to be changed
                shutil.rmtree(writer.partial)
                raise
            writer.note(plan)
    _wait_for_others()
    plan = writer.begun(manifest)
    assert plan is not None
    writer.open(plan)
    return work or source.begin(images, writer, plan, backend)


def _samples(images: Images, reading: _Reading, exact_reading: _Reading) -> Samples:
    """Images for the check and the calibration, spread over the data."""
    count = min(len(images), _CHECKED_IMAGES + _CALIBRATION_IMAGES)
    spread = np.linspace(0, len(images) - 1, count).astype(int)
    # Where too many of these cannot be used, others are tried in their order.
    order = [*spread.tolist(), *np.setdiff1d(np.arange(len(images)), spread).tolist()]

    usable: list[tuple[int, np.ndarray]] = []
    refused: list[str] = []
    for start in range(0, len(order), count):
        rows = order[start : start + count]
        for row, square in zip(rows, reading.of(images, rows), strict=True):
            if isinstance(square, str):
                refused.append(square)
            else:
                usable.append((row, square))
        if len(usable) >= min(count, _CHECKED_IMAGES):
            break
    if not usable:
        raise InputError(f"none of {len(images)} images can be used: {_reasons(refused)}.")
    # Every third, so that both kinds are of all parts of the data.
    checked = usable[:: max(1, len(usable) // _CHECKED_IMAGES)][:_CHECKED_IMAGES]
    taken = {row for row, _ in checked}
    others = [square for row, square in usable if row not in taken]
    if len(others) < _CALIBRATION_IMAGES // 2:  # of few images, all
        others = [square for _, square in usable]
    exact = checked
    if reading != exact_reading:
        whole = exact_reading.of(images, [row for row, _ in checked])
        exact = [(r, s) for (r, _), s in zip(checked, whole, strict=True) if not isinstance(s, str)]
    return Samples(
        exact=np.stack([square for _, square in exact]),
        prepared=np.stack([square for _, square in checked]),
        calibration=np.stack(others),
    )


def _extract_missing(work: _Work, images: Images, writer: FeatureWriter, label: str) -> None:
    """Compute this process's share of the chunks that are not done."""
    size = feature_directory.CHUNK_ROWS
    done = writer.done()
    chunks = [c for c in range(-(-len(images) // size)) if c not in done]
    mine = chunks[distributed.rank() :: distributed.world_size()]
    rows = [row for c in mine for row in range(c * size, min((c + 1) * size, len(images)))]
    before = len(images) - sum(min(size, len(images) - c * size) for c in chunks)
    total = before + len(rows)
    with progress_bar(total=total, initial=before, unit="image", desc=label) as bar:
        tally = _Tally(writer, rows, bar)
        with ThreadPoolExecutor(work.concurrency) as pool:
            waiting: deque[tuple[list[int], Future[dict[str, np.ndarray]]]] = deque()
            try:
                for batch_rows, squares in _batches(images, rows, work, tally):
                    waiting.append((batch_rows, pool.submit(work.infer, squares)))
                    if len(waiting) > 2 * work.concurrency:
                        tally.store(*waiting.popleft())
                while waiting:
                    tally.store(*waiting.popleft())
            finally:
                pool.shutdown(cancel_futures=True)


def _batches(
    images: Images, rows: Sequence[int], work: _Work, tally: _Tally
) -> Iterator[tuple[list[int], np.ndarray]]:
    batch_rows: list[int] = []
    squares: list[np.ndarray] = []
    for row, square in zip(rows, work.reading.of(images, rows), strict=True):
        if isinstance(square, str):
            tally.leave_out(row, square)
            continue
        batch_rows.append(row)
        squares.append(square)
        if len(squares) == work.batch_size:
            yield batch_rows, np.stack(squares)
            batch_rows, squares = [], []
    if squares:
        yield batch_rows, np.stack(squares)


class _Tally:
    """Writes what comes and notes each chunk when its last image is there."""

    def __init__(self, writer: FeatureWriter, rows: Sequence[int], bar: tqdm) -> None:
        self._writer, self._bar = writer, bar
        self._missing = Counter(row // feature_directory.CHUNK_ROWS for row in rows)
        self._left_out: dict[int, dict[int, str]] = {}

    def store(self, rows: list[int], result: Future[dict[str, np.ndarray]]) -> None:
        values = result.result()
        for array in values.values():
            _require_finite(array, rows)
        self._writer.write(rows, values)
        for row in rows:
            self._count(row)

    def leave_out(self, row: int, reason: str) -> None:
        self._left_out.setdefault(row // feature_directory.CHUNK_ROWS, {})[row] = reason
        self._count(row)

    def _count(self, row: int) -> None:
        chunk = row // feature_directory.CHUNK_ROWS
        self._missing[chunk] -= 1
        self._bar.update()
        if not self._missing[chunk]:
            self._writer.finish_chunk(chunk, self._left_out.pop(chunk, {}))


def _finish(source: _Source, images: Images, writer: FeatureWriter, data: Path) -> None:
    left_out = [reason for bad in writer.done().values() for reason in bad.values()]
    if len(left_out) == len(images):
        shutil.rmtree(writer.partial)
        raise InputError(f"{data}: none of {len(images)} images can be used: {_reasons(left_out)}.")
    source.end()
    if isinstance(images, FolderImages):
        images.write_file_list(writer.out.with_name(writer.out.name + ".files.csv"))
    writer.finish(images.table())
    if left_out:
        print(
            f"features: left out {len(left_out)} of {len(images)} images ({_reasons(left_out)}); "
            f"{writer.out / 'left_out.jsonl'} says which",
            file=sys.stderr,
        )


def _reasons(outcomes: Sequence[object]) -> str:
    counts = Counter(str(outcome) for outcome in outcomes if isinstance(outcome, str))
    return "; ".join(f"{count} × {reason}" for reason, count in counts.most_common(3))


def _require_finite(values: np.ndarray, rows: Sequence[int]) -> None:
    finite = np.isfinite(values).reshape(len(values), -1).all(axis=1)
    if not finite.all():
        raise InputError(
            f"the features of row {rows[int(np.argmin(finite))]} are not finite. Check the "
            "encoder's weights: a diverged run gives such values."
        )


def _threads() -> int:
    """The thread budget: cores of this process, fewer if OMP_NUM_THREADS says so."""
    cores = len(os.sched_getaffinity(0))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


def _decoders() -> int:
    return min(_threads(), _MOST_DECODERS)
