"""Reports as archives keep them: XML files of OpenI, text files of MIMIC-CXR.

Files come from outside: each is read in memory and bounded, nothing of an archive is written to
disk, and XML with a document type, without which there are no entities to expand, is refused.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO
from xml.etree import ElementTree

from selfray.data.published_layouts import openi_number
from selfray.data.report_text import Sections, count_sections, parse_report
from selfray.errors import InputError
from selfray.progress import progress_bar

MAX_REPORT_BYTES = 1_000_000
"""Of one file; the longest of OpenI has 9,000, with everything around the report."""

MAX_ARCHIVE_BYTES = 4_000_000_000
"""Unpacked; the 227,835 reports of MIMIC-CXR have some 250 million."""

MAX_REASONS = 20
"""In a line. Reports have fewer; the reasons of images may hold sizes in pixels."""

_SUFFIXES = (".xml", ".txt")
# Of "CXR1000_IM-0003-1001.png" and "CXR1_1_IM-0001-3001.png"; the DICOM files are without.
_PNG_PREFIX = re.compile(r"^CXR(?:(\d+)_(?=\1_))?")
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError)


@dataclass
class ReportFiles:
    """Reports and the images that they are of.

    Attributes:
        reports: Canonical texts by key: the name of the file without suffix.
        key_of_image: Key by name of an image without suffix, where the file of a report lists its
            images (OpenI).
        unread: How many files gave no report, by reason.
        listing_images_of_others: How many files list an image that is another report's.
        passed_over: How many files are neither XML nor text by name.
    """

    reports: dict[str, str] = field(default_factory=dict)
    key_of_image: dict[str, str] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    listing_images_of_others: int = 0
    passed_over: int = 0

    def key_of(self, file: str) -> str | None:
        """Which report an image belongs to, or None.

        It is the one that lists the image by name (OpenI, `CXR1000_IM-0003-1001`, or without `CXR`,
        as its DICOM files are called), else the one of its number; else the one that is called as
        the image; else the one that is called as a folder in which the image lies (MIMIC-CXR,
        `s50414267`), the nearest first.

        Args:
            file: Path of the image below the ingested folder, with `/`.
        """
        path = PurePosixPath(file)
        stem = path.name.split(".")[0]
        if stem in self.key_of_image:
            return self.key_of_image[stem]
        names = (openi_number(stem), stem, *(folder.name for folder in path.parents))
        return next((name for name in names if name in self.reports), None)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that was read."""
        digest = hashlib.sha256()
        for pair in (*self.reports.items(), *self.key_of_image.items()):
            digest.update("\0".join((*pair, "")).encode(errors="surrogateescape"))
        return digest.hexdigest()

    def section_counts(self) -> dict[str, int]:
        """How many reports have each section; see `report_text.count_sections`."""
        return count_sections(self.reports.values())


def read_report_files(path: Path) -> ReportFiles:
    """Read the reports of OpenI or MIMIC-CXR.

    XML files (`ecgen-radiology/1.xml`) hold labelled sections and the names of their images; text
    files (`files/p10/p10000032/s50414267.txt`) are called as the folder of their study. A file that
    gives no report is counted with its reason, and the others are read.

    Args:
        path: Folder, searched with its subfolders, links followed, or an archive of one: .zip,
            .tar, .tgz.

    Raises:
        InputError: There is none, it is no archive, or damaged or of no sensible size.
    """
    found = ReportFiles()
    with (
        closing(_contents(path)) as contents,
        progress_bar(unit="file", desc="reports", leave=False) as bar,
    ):
        for name, read in contents:
            bar.update()
            if name.suffix.lower() not in _SUFFIXES:
                found.passed_over += 1
                continue
            try:
                _add(found, name, read())
            except _Unread as reason:
                found.unread[str(reason)] += 1
    if not found.reports:
        reasons = listed(by_count(found.unread))
        raise InputError(
            f"--reports {path}: no report found" + (f" ({reasons})" if reasons else "") + ". Give "
            "the XML files of OpenI or the text files of MIMIC-CXR, as a folder, .zip or .tgz."
        )
    return found


def by_count(reasons: Counter[str]) -> dict[str, int]:
    """Counts by reason, the most frequent first."""
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def listed(reasons: dict[str, int]) -> str:
    """Reasons with their counts, in a line; those behind `MAX_REASONS` together."""
    shown = dict(list(reasons.items())[:MAX_REASONS])
    others = sum(reasons.values()) - sum(shown.values())
    parts = [f"{count}: {reason}" for reason, count in shown.items()]
    return "; ".join([*parts, f"{others}: other reasons"] if others else parts)


class _Unread(Exception):
    """One file gives no report; the message is its reason, without a name."""


_Read = Callable[[], bytes]
_Contents = Generator[tuple[PurePosixPath, _Read]]


def _add(found: ReportFiles, name: PurePosixPath, content: bytes) -> None:
    if len(content) > MAX_REPORT_BYTES:
        raise _Unread(f"is larger than {MAX_REPORT_BYTES:,} bytes")
    images: list[str] = []
    if name.suffix.lower() == ".xml":
        sections, images = _of_xml(content)
    else:
        sections = parse_report(_decoded(content))
    text = sections.text()
    if not text:
        raise _Unread("is empty")
    if name.stem in found.reports:
        raise _Unread("has the name of one read before")
    found.reports[name.stem] = text
    taken = [image for image in images if image in found.key_of_image]
    found.listing_images_of_others += bool(taken)
    # Of two reports that list an image, the one of its number has it, whichever is read first.
    own = {image for image in images if openi_number(image) == name.stem}
    free = set(images) - (set(taken) - own)
    found.key_of_image.update(dict.fromkeys(sorted(free), name.stem))


def _decoded(content: bytes) -> str:
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    try:
        text = content.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        raise _Unread("is no text in UTF-8") from None
    if "\0" in text:
        raise _Unread("is no text")
    return text


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise _Unread("is XML with a document type, which OpenI has not")


def _of_xml(content: bytes) -> tuple[Sections, list[str]]:
    """Sections of an OpenI report, and its images by the names that their files may have."""
    try:
        root = ElementTree.fromstring(content, ElementTree.XMLParser(target=_WithoutDoctype()))
    except (ElementTree.ParseError, LookupError, ValueError):
        raise _Unread("is no XML" if content.strip() else "is empty") from None
    labelled = list(root.iter("AbstractText"))
    if not labelled:
        raise _Unread("is XML of another kind: it has no AbstractText")
    lines = []
    for element in labelled:
        text = " ".join("".join(element.itertext()).split())
        heading = " ".join(element.get("Label", "OTHER").upper().split())
        lines.append(f"{heading}: {text}" if text else "")
    images = (image.get("id", "") for image in root.iter("parentImage"))
    names = {name for image in images for name in (image, _PNG_PREFIX.sub("", image))}
    return parse_report("\n".join(lines)), sorted(names - {""})


def _contents(path: Path) -> _Contents:
    """Names and contents of the files below a folder or in an archive, in order."""
    if path.is_dir():
        yield from _of_folder(path)
        return
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):
                yield from _of_zip(path, file)
                return
            file.seek(0)
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream = gzip.GzipFile(fileobj=file) if packed else file
            yield from _of_tar(path, stream)
    except _DAMAGED:
        raise InputError(
            f"--reports {path}: is no .zip, .tar or .tgz, or is damaged. Give a folder or a whole "
            "archive."
        ) from None
    except OSError as cause:
        raise InputError(f"--reports {path}: cannot be read ({cause.strerror})") from None


def _of_folder(top: Path) -> _Contents:
    folders, seen = [top], set()
    while folders:
        folder = folders.pop()
        try:
            status = folder.stat()
            entries = sorted(folder.iterdir(), reverse=True)
        except OSError:
            yield PurePosixPath("closed.txt"), _closed_folder
            continue
        if (status.st_dev, status.st_ino) in seen:  # a link back up, or to a folder seen before
            continue
        seen.add((status.st_dev, status.st_ino))
        visible = [entry for entry in entries if not entry.name.startswith(".")]
        folders += [entry for entry in visible if entry.is_dir()]
        for entry in reversed(visible):
            if entry.is_file():  # a pipe or a device would block or never end
                yield PurePosixPath(entry.name), _reader_of_file(entry)


def _closed_folder() -> bytes:
    raise _Unread("is a folder that cannot be opened")


def _reader_of_file(path: Path) -> _Read:
    def read() -> bytes:
        try:
            with path.open("rb") as file:
                return file.read(MAX_REPORT_BYTES + 1)
        except OSError as cause:
            raise _Unread(f"cannot be read ({cause.strerror})") from None

    return read


def _of_zip(path: Path, file: IO[bytes]) -> _Contents:
    total = 0
    with zipfile.ZipFile(file) as archive:
        for entry in archive.infolist():
            if entry.is_dir() or PurePosixPath(entry.filename).name.startswith("."):
                continue

            def read(entry: zipfile.ZipInfo = entry) -> bytes:
                nonlocal total
                try:
                    with archive.open(entry) as member:
                        content = member.read(MAX_REPORT_BYTES + 1)
                # RuntimeError: encrypted; NotImplementedError: a rare way of packing.
                except (*_DAMAGED, OSError, RuntimeError):
                    raise _Unread("is damaged, encrypted or packed in an unknown way") from None
                total += len(content)
                _require_bounded(path, total)
                return content

            yield PurePosixPath(entry.filename), read


def _of_tar(path: Path, stream: IO[bytes] | gzip.GzipFile) -> _Contents:
    with tarfile.open(fileobj=_Bounded(path, stream), mode="r:") as archive:
        for member in archive:
            name = PurePosixPath(member.name)
            if not member.isreg() or name.name.startswith("."):
                continue

            # At once, since `_contents` tells of damage only while it is asked for the next file.
            packed = archive.extractfile(member)
            content = packed.read(MAX_REPORT_BYTES + 1) if packed else b""
            yield name, partial(bytes, content)


class _Bounded(io.RawIOBase):
    """A file of which only so much can be read: an archive may unpack without end."""

    def __init__(self, path: Path, stream: IO[bytes] | gzip.GzipFile) -> None:
        self._path, self._stream = path, stream

    def read(self, size: int = -1) -> bytes:
        # A header may claim any length for a name; tarfile reads that much at once.
        _require_bounded(self._path, MAX_ARCHIVE_BYTES + 1 if size < 0 else 0)
        if size > 2 * MAX_REPORT_BYTES:
            raise tarfile.ReadError("a header without end")
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        _require_bounded(self._path, offset)
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _require_bounded(path: Path, size: int) -> None:
    if size > MAX_ARCHIVE_BYTES:
        raise InputError(
            f"--reports {path}: unpacks to more than {MAX_ARCHIVE_BYTES // 10**9} GB. Unpack the "
            "reports alone into a folder, and give that."
        )
