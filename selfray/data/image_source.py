"""Where images for features come from: a dataset directory, or a folder of files as they are."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from selfray.data.dataset import RadiographDataset
from selfray.data.image_files import find_images, write_file_list
from selfray.data.isolated import CRASHED, each_in_processes
from selfray.data.radiograph import read_eight_bits
from selfray.errors import BadImage, InputError

Prepare = Callable[[np.ndarray], np.ndarray]
"""What is done to an image, uint8 [H, W], where it is decoded; can be pickled."""

PIXEL_COLUMNS = ("image", "mask", "finding_mask")
_AHEAD = 4  # images a thread that wait for the one before them
_FILES_A_JOB = 8  # that a process takes at once: handing over costs a tenth of a small image


class ImageSource(Protocol):
    """Images in a fixed order.

    Attributes:
        fingerprint: Changes when the images do.
        synthetic: Whether they are phantoms.
        said_of_itself: Name and origin, by which known datasets are recognised.
        description: For a manifest.
    """

    fingerprint: str
    synthetic: bool
    said_of_itself: tuple[str, ...]
    description: dict[str, Any]

    def __len__(self) -> int: ...

    def prepared(
        self, rows: Sequence[int], prepare: Prepare, *, workers: int, at_least: int | None = None
    ) -> Iterator[np.ndarray | str]:
        """Decode images ahead of their use.

        Args:
            rows: Which, in this order.
            prepare: Done to each.
            workers: Threads or processes.
            at_least: The shorter side that is needed, pixels: a JPEG may be decoded at a half, a
                quarter or an eighth of its size, as long as it keeps so many. None: whole.

        Yields:
            What `prepare` gave, or the reason why an image cannot be used.
        """
        ...

    def table(self) -> pa.Table:
        """What is known of each image, without pixels."""
        ...


class DatasetImages:
    """The images of a dataset directory.

    Args:
        dataset: Opened.
    """

    def __init__(self, dataset: RadiographDataset) -> None:
        self._dataset = dataset
        self.rows = dataset.rows
        self.fingerprint, self.synthetic = dataset.fingerprint, dataset.synthetic
        self.said_of_itself = (dataset.info["name"], dataset.info["origin"])
        self.description = {
            "name": dataset.info["name"],
            "origin": dataset.info["origin"],
            "fingerprint": dataset.fingerprint,
            "synthetic": dataset.synthetic,
            "findings": list(dataset.findings),
        }

    def __len__(self) -> int:
        return len(self._dataset)

    def prepared(
        self, rows: Sequence[int], prepare: Prepare, *, workers: int, at_least: int | None = None
    ) -> Iterator[np.ndarray | str]:
        """See `ImageSource`."""
        del at_least  # a dataset's images are PNG, and small

        def one(row: int) -> np.ndarray | str:
            try:
                return prepare(self._dataset.pixels(row))
            except BadImage:
                return "does not decode"

        waiting: deque[Future[np.ndarray | str]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for row in rows:
                    waiting.append(pool.submit(one, row))
                    if len(waiting) > _AHEAD * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def table(self) -> pa.Table:
        """See `ImageSource`."""
        table = self._dataset.table
        return table.select([name for name in table.column_names if name not in PIXEL_COLUMNS])


class FolderImages:
    """The radiographs below a folder, as they are: DICOM, PNG, JPEG, TIFF.

    Images are named by their place in the sorted list of files, since a file's name may be a
    patient's; `write_file_list` says which is which.

    Args:
        folder: Searched with its subfolders, links followed.

    Raises:
        InputError: There is no image in it.
    """

    synthetic = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = find_images(folder).images
        if not self._files:
            raise InputError(
                f"{folder} holds no DICOM, PNG, JPEG or TIFF. Give a folder with radiographs, or a "
                "dataset directory."
            )
        digest = hashlib.sha256()
        for file in self._files:
            try:
                status = (folder / file).stat()
                stamp = f"{status.st_size}\0{status.st_mtime_ns}"
            except OSError:
                stamp = "cannot be read"
            digest.update(f"{file}\0{stamp}\n".encode(errors="surrogateescape"))
        self.fingerprint = digest.hexdigest()
        self.said_of_itself = (folder.resolve().name,)
        self.description = {
            "name": "folder",  # its own name may be a patient's
            "origin": "a folder of files",
            "fingerprint": self.fingerprint,
            "synthetic": False,
            "findings": [],
        }

    def __len__(self) -> int:
        return len(self._files)

    def prepared(
        self, rows: Sequence[int], prepare: Prepare, *, workers: int, at_least: int | None = None
    ) -> Iterator[np.ndarray | str]:
        """See `ImageSource`; in processes, so that a decoder's crash costs one file."""
        files = [str(self._folder / self._files[row]) for row in rows]
        size = max(1, min(_FILES_A_JOB, len(files) // (_AHEAD * workers)))
        jobs = [(files[i : i + size], prepare, at_least) for i in range(0, len(files), size)]
        for job, outcomes in zip(
            jobs, each_in_processes(_prepare_files, jobs, workers), strict=True
        ):
            if outcomes != CRASHED:
                yield from outcomes
                continue
            alone = [([file], prepare, at_least) for file in job[0]]
            for outcome in each_in_processes(_prepare_files, alone, workers):
                yield outcome if isinstance(outcome, str) else outcome[0]

    def table(self) -> pa.Table:
        """See `ImageSource`."""
        return pa.table({"image_id": [_image_id(row) for row in range(len(self))]})

    def write_file_list(self, path: Path) -> None:
        """Write which image is which file, for the owner's eyes alone."""
        named = ((_image_id(row), file) for row, file in enumerate(self._files))
        write_file_list(path, "image_id", named)


def open_images(data: Path) -> DatasetImages | FolderImages:
    """A dataset directory, or a folder of image files.

    Raises:
        InputError: Neither.
    """
    if not data.is_dir():
        raise InputError(
            f"{data} is not a directory. Give a dataset directory or a folder with radiographs."
        )
    if (data / "dataset.json").exists():
        return DatasetImages(RadiographDataset(data))
    return FolderImages(data)


def _image_id(row: int) -> str:
    return f"{row:08d}"


def _prepare_files(job: tuple[list[str], Prepare, int | None]) -> list[np.ndarray | str]:
    """In a worker: files to what `prepare` makes of each, or the reason why not."""
    files, prepare, at_least = job
    return [_prepare_file(file, prepare, at_least) for file in files]


def _prepare_file(file: str, prepare: Prepare, at_least: int | None) -> np.ndarray | str:
    try:
        return prepare(read_eight_bits(Path(file), at_least=at_least))
    except BadImage as refused:
        return str(refused)
    except OSError as cause:
        return f"cannot be read from disk ({cause.strerror})"
    except MemoryError:
        return "needs more memory than there is"
