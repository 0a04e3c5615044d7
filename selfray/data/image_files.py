"""The files below a folder that may be radiographs."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from selfray.data.radiograph import image_format
from selfray.progress import progress_bar


@dataclass(frozen=True)
class FoundImages:
    """What is below a folder.

    Attributes:
        images: Their paths below the folder, sorted, with `/`.
        others: Number of other files.
        closed_folders: Number of folders that cannot be opened.
    """

    images: list[str]
    others: int
    closed_folders: int


def find_images(source: Path) -> FoundImages:
    """Look for radiographs below a folder.

    Args:
        source: Searched with its subfolders, links followed; hidden files and DICOMDIR are passed
            over.
    """
    images: list[str] = []
    others = closed = 0
    folders, seen = [source], set()
    with progress_bar(unit="file", desc="looking", leave=False) as bar:
        while folders:
            folder = folders.pop()
            try:
                status = folder.stat()
                entries = sorted(folder.iterdir())
            except OSError:
                closed += 1
                continue
            if (status.st_dev, status.st_ino) in seen:  # a link back up, or to a folder seen before
                continue
            seen.add((status.st_dev, status.st_ino))
            for entry in entries:
                if entry.name.startswith(".") or entry.name.upper() == "DICOMDIR":
                    continue
                kind = _kind(entry)
                if kind == "folder":
                    folders.append(entry)
                elif kind == "image":
                    images.append(entry.relative_to(source).as_posix())
                else:
                    others += 1
            bar.update(len(entries))
    return FoundImages(sorted(images), others, closed)


def _kind(path: Path) -> str:
    """`folder`, `image`, or `other`, which is no image by name and content."""
    named_as_image = path.suffix.lower() in _IMAGE_SUFFIXES
    try:
        if path.is_dir():
            return "folder"
        if path.is_file():
            return "image" if named_as_image or image_format(path) is not None else "other"
        if path.exists():  # a pipe or a device would block or never end
            return "other"
    except OSError:
        pass
    # What cannot be opened is quarantined where its name says that an image is lost.
    return "image" if named_as_image else "other"


# By suffix, so that a damaged image is quarantined rather than passed over; else by content.
_IMAGE_SUFFIXES = frozenset(
    {".dcm", ".dicom", ".dic", ".ima", ".png", ".jpg", ".jpeg", ".jpe", ".tif", ".tiff"}
)


def write_file_list(path: Path, column: str, files: Iterable[tuple[str, str]]) -> None:
    """Write which name is which file, for the owner's eyes alone; whole or not at all.

    Args:
        path: CSV file, replaced if it is there.
        column: Heading of the names.
        files: (name, path below the folder), which may hold a patient's name.
    """
    temporary = path.with_name(f".{path.name}.partial")
    temporary.unlink(missing_ok=True)
    with create_private(temporary) as file:
        lines = csv.writer(file)
        lines.writerow((column, "path"))
        lines.writerows(files)
    temporary.replace(path)


def create_private(path: Path) -> io.TextIOWrapper:
    """A new file that its owner alone may read; names that are no UTF-8 stay as they are.

    Raises:
        FileExistsError: It is there already.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    return os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape", newline="")
