"""An archive of radiographs → a dataset directory and a list of what was refused.

Privacy. Of a header only the fields that `dicom.py` names are read. Patient, study and file names
are written as keyed hashes (HMAC-SHA256): without the key nobody can tell which patient a hash
is, not even by trying all identifiers. The key and the list of files by hash lie beside the
dataset in `OUT.key` and `OUT.files.csv`, readable by the owner alone; who has them can link the
images to their patients, so they stay where the archive is when the dataset moves on. Pixels are
not searched for burned-in text, nor reports for names; reports and records of a `--table` are
copied as they are; columns of records that may tell patients apart are refused.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import secrets
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from selfray.data.dataset import (
    SPLITS,
    DatasetInfo,
    DatasetWriter,
    encode_png,
    require_empty,
    write_atomically,
)
from selfray.data.dicom import AcquisitionRecord
from selfray.data.image_files import FoundImages, create_private, find_images, write_file_list
from selfray.data.isolated import each_in_processes
from selfray.data.metadata_table import MetadataTable, read_metadata_table, require_no_identifier
from selfray.data.published_layouts import Place, published_place
from selfray.data.radiograph import (
    INTENSITIES,
    MIN_SIDE,
    read_radiograph,
    resize_shorter_side,
    to_eight_bits,
)
from selfray.data.report_files import ReportFiles, by_count, listed, read_report_files
from selfray.errors import BadImage, InputError, Interrupted
from selfray.progress import collected_signals, progress_bar

MAX_SIZE = 4096
"""Pixels of the shorter side; the largest detectors of chest radiography have 3524."""

MAX_WORKERS = 256

SPLIT_SHARES = {"train": 0.7, "validate": 0.1, "test": 0.2}

# After a kill at most this many images are decoded again.
_ROWS_PER_SHARD = 512

_COMMAND_FILE = "ingest.json"
# Empty; there from the first image on that names its patient, so that a resumed run knows.
_NAMED_FILE = "a-patient-is-named"

_WHO_COUNTS_AS_A_PATIENT = (
    "; without patient identifier, a study or else an image counts as a patient of its own"
)


@dataclass(frozen=True)
class ReportCounts:
    """What became of the files of `--reports`.

    Attributes:
        files: Files that gave a report.
        sections: How many reports have each section; see `report_text.count_sections`.
        images_with_report: Images of the dataset that have one.
        images_without_report: Images of the dataset that have none.
        without_image: Reports of which the dataset has no image.
        unread: How many files gave no report, by reason.
        listing_images_of_others: Files that list an image of another report; they count as read.
        passed_over: Files that are neither XML nor text by name.
    """

    files: int
    sections: dict[str, int]
    images_with_report: int
    images_without_report: int
    without_image: int
    unread: dict[str, int]
    listing_images_of_others: int
    passed_over: int

    def __str__(self) -> str:
        having = self.sections
        parts = [
            f"reports: {self.files} read, {having['findings']} with findings, "
            f"{having['impression']} with impression, "
            f"{having['neither_findings_nor_impression']} with neither",
            f"{self.images_with_report} images have one, {self.images_without_report} have none",
        ]
        if self.without_image:
            parts.append(f"{self.without_image} reports have no image")
        if self.unread:
            parts.append(f"{sum(self.unread.values())} files not read ({listed(self.unread)})")
        if self.listing_images_of_others:
            parts.append(f"{self.listing_images_of_others} reports list an image of another report")
        if self.passed_over:
            parts.append(f"{self.passed_over} other files passed over")
        line = "; ".join(parts)
        if not self.images_with_report:
            line += (
                ". No report has an image: reports are found by the names of images (OpenI) or of "
                "study folders (MIMIC-CXR), so these must be as published"
            )
        return line


@dataclass(frozen=True)
class IngestCounts:
    """What became of the files of a folder.

    Attributes:
        images: Rows of the dataset.
        patients: Different patients among them.
        splits: Rows by split.
        quarantined: Files refused.
        reasons: How many were refused for each reason.
        passed_over: Files that are no images by name and content.
        closed_folders: Folders that cannot be opened.
        table_rows_without_file: Rows of the table that matched nothing.
        patients_named: Whether table, header or a published layout names the patient of any image.
        reports: Of `--reports`; None without.
    """

    images: int
    patients: int
    splits: dict[str, int]
    quarantined: int
    reasons: dict[str, int]
    passed_over: int
    closed_folders: int
    table_rows_without_file: int
    patients_named: bool
    reports: ReportCounts | None = None

    def __str__(self) -> str:
        parts = [f"{self.images} images of {self.patients} patients"]
        if self.quarantined:
            parts.append(f"{self.quarantined} files refused ({listed(self.reasons)})")
        if self.passed_over:
            parts.append(f"{self.passed_over} other files passed over")
        if self.closed_folders:
            parts.append(f"{self.closed_folders} folders cannot be opened")
        if self.table_rows_without_file:
            parts.append(f"{self.table_rows_without_file} rows of the table have no file")
        parts += [f"{self.splits.get(split, 0)} to {split}" for split in SPLITS]
        line = ", ".join(parts)
        empty = [split for split in SPLITS if not self.splits.get(split)]
        if empty:
            line += (
                f". No image is in {' and '.join(empty)}, and `selfray evaluate` needs all three "
                "splits: add a column split to the table, or try another --seed"
            )
        if not self.patients_named:
            line += (
                "\nwarning: no image names its patient, in the table, its header or a published "
                "layout: each study, or else each image, counts as a patient, and splits may part "
                "a patient. Give the column patient_id in --table."
            )
        return f"{line}\n{self.reports}" if self.reports else line


def ingest(
    source: Path,
    out: Path,
    *,
    size: int = 518,
    intensity: str = "minmax",
    table: Path | None = None,
    reports: Path | None = None,
    name: str | None = None,
    origin: str = "radiographs ingested from files",
    licence: str = "as of the source",
    seed: int = 0,
    key_file: Path | None = None,
    workers: int | None = None,
) -> IngestCounts:
    """Read every radiograph below a folder into a dataset directory.

    A file that cannot be used goes to `quarantine.jsonl` with its reason, and the run goes on.
    After an interruption the same command continues. Patients come from the table, else from
    the headers, else from paths as MIMIC-CXR and OpenI have them
    (`published_layouts.published_place`); without one, a study counts as a patient, and without
    that an image (copies of a file are one). Splits come from the table, else from a hash of
    patient and seed: 70 % train, 10 % validate, 20 % test. Values of the table win over those of a
    header. A table that gives patients or splits must give them for every image: two ways of naming
    patients, mixed, would put one into two splits.

    Args:
        source: Folder, searched with its subfolders, links followed; hidden files are not read.
        out: Dataset directory to make; must not exist, or be empty.
        size: Shorter side of the images, pixels, 64 to 4096.
        intensity: `minmax` or `percentile`; see `radiograph.to_eight_bits`.
        table: CSV with more metadata; see `metadata_table.read_metadata_table`.
        reports: Reports of OpenI or MIMIC-CXR, a folder or an archive; see
            `report_files.read_report_files`. Each image of a study gets the study's report, as
            canonical text, and images of one report are of one study where nothing else says so.
        name: Name of the dataset; that of `out` if None.
        origin: Where the images come from, for `dataset.json`.
        licence: Terms of use, for `dataset.json`.
        seed: Of the splits, >= 0.
        key_file: Secret key of the hashes, made if missing; `OUT.key` if None. Folders ingested
            with one key give one patient one hash.
        workers: Decoding processes, 1 to 256; one a core if None.

    Returns:
        Counts.

    Raises:
        InputError: Nothing can be made of the arguments, or no image could be read.
        Interrupted: SIGINT or SIGTERM; what was read is kept for the next start.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 (resolve() would follow a link at OUT)
    _require_arguments(source, out, size, intensity, workers, seed)
    found = find_images(source)
    _require_images(source, found)
    metadata = read_metadata_table(table, found.images) if table else MetadataTable()
    written = _read_reports(reports, table, metadata) if reports else ReportFiles()
    info = DatasetInfo(
        name=name or out.name,
        origin=f"{origin}{_WHO_COUNTS_AS_A_PATIENT}",
        licence=licence,
        synthetic=False,
        findings=metadata.findings,
        mask_labels=(),
        pixels=f"shorter side {size} px by antialiased cubic resampling, {intensity} to 8 bits",
        records=metadata.records,
    )
    key_file = key_file or out.with_name(out.name + ".key")
    file_list = out.with_name(out.name + ".files.csv")
    with _room_on_disk(out), _left_as_found(key_file), _left_as_found(file_list):
        key = _key(key_file)
        writer = DatasetWriter(out, info, rows_per_shard=_ROWS_PER_SHARD)
        _require_same_command(writer, source, (table, written), seed, key)
        hashes = _Hashes(key)
        names = {file: hashes.of("file", file, 20) for file in found.images}
        write_file_list(file_list, "source_file", ((h, file) for file, h in names.items()))
        rows = _RowMaker(hashes, metadata, written, seed, writer)
        refused = _read_files(source, names, rows, writer, (size, intensity), workers)
        _require_rows(writer, source, refused)
        _require_no_identifier(table, metadata, writer)
        report_counts = _count_reports(written, names, writer) if reports else None
        counted = {"report_files": asdict(report_counts)} if report_counts else {}
        dataset = writer.finish(refused, counted)
        _remove_notes(out)
    return IngestCounts(
        images=len(dataset),
        patients=dataset.info["counts"]["patients"],
        splits=dataset.info["counts"]["split"],
        quarantined=len(refused),
        reasons=_by_reason(refused),
        passed_over=found.others,
        closed_folders=found.closed_folders,
        table_rows_without_file=metadata.unmatched,
        patients_named=rows.patients_named,
        reports=report_counts,
    )


def _read_reports(path: Path, table: Path | None, metadata: MetadataTable) -> ReportFiles:
    if any("report" in row for row in (metadata.rows or {}).values()):
        raise InputError(
            f"--reports {path}: the column 'report' of --table {table} holds reports, too. Give "
            "them in one way: leave out the column, or --reports."
        )
    return read_report_files(path)


def _count_reports(
    written: ReportFiles, names: dict[str, str], writer: DatasetWriter
) -> ReportCounts:
    """What became of the reports.

    Args:
        written: What was read.
        names: Hash by file.
        writer: Holds all rows.
    """
    kept = set(writer.written("source_file"))
    files = [file for file, name in names.items() if name in kept]
    having = sum(report is not None for report in writer.written("report"))
    used = {written.key_of(file) for file in files} - {None}
    return ReportCounts(
        files=len(written.reports),
        sections=written.section_counts(),
        images_with_report=having,
        images_without_report=len(files) - having,
        without_image=len(written.reports) - len(used),
        unread=by_count(written.unread),
        listing_images_of_others=written.listing_images_of_others,
        passed_over=written.passed_over,
    )


def _read_files(
    source: Path,
    names: dict[str, str],
    rows: _RowMaker,
    writer: DatasetWriter,
    how: tuple[int, str],
    workers: int | None,
) -> list[dict[str, str]]:
    """Read what was not read before an interruption into shards.

    Args:
        source: Folder.
        names: Hash by file.
        rows: Makes the rows.
        writer: Takes them; flushed at the end.
        how: Size and intensity.
        workers: Decoding processes.

    Returns:
        What was refused, and why.
    """
    with _Refusals(writer.partial / "quarantine.jsonl") as refusals:
        done = set(writer.written("source_file")) | refusals.files
        todo = [file for file, name in names.items() if name not in done]
        jobs = [(str(source / file), *how) for file in todo]
        outcomes = _with_progress(todo, each_in_processes(_decode, jobs, workers))
        for file, outcome in _until_interrupted(outcomes, writer):
            if isinstance(outcome, str):
                refusals.add(names[file], outcome)
                continue
            try:
                writer.add(rows.row(file, names[file], outcome))
            except BadImage as refused:
                refusals.add(names[file], str(refused))
    writer.flush()
    return refusals.records


def _by_reason(records: list[dict[str, str]]) -> dict[str, int]:
    """How many files were refused for each reason, the most frequent first."""
    return by_count(Counter(record["reason"] for record in records))


def _require_rows(writer: DatasetWriter, source: Path, refused: list[dict[str, str]]) -> None:
    if not writer.shards:
        writer.discard()
        raise InputError(
            f"{source}: none of {len(refused)} images can be used. {listed(_by_reason(refused))}."
        )


def _require_images(source: Path, found: FoundImages) -> None:
    if not found.images:
        closed = f"; {found.closed_folders} folders cannot be opened" * bool(found.closed_folders)
        raise InputError(
            f"{source}: no image among {found.others} files{closed}. Give a folder with DICOM, "
            "PNG, JPEG or TIFF files."
        )


def _require_arguments(
    source: Path, out: Path, size: int, intensity: str, workers: int | None, seed: int
) -> None:
    if not source.is_dir():
        raise InputError(f"{source} is not a directory. Give the folder with the radiographs.")
    if not MIN_SIDE <= size <= MAX_SIZE:
        raise InputError(f"size is {size}. Allowed: {MIN_SIDE} to {MAX_SIZE}.")
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise InputError(f"workers is {workers}. Allowed: 1 to {MAX_WORKERS}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}. Use a whole number from 0 to 2^63 - 1.")
    if intensity not in INTENSITIES:
        raise InputError(f"intensity is {intensity!r}. Allowed: {', '.join(INTENSITIES)}.")
    if out.is_relative_to(source.resolve()):
        raise InputError(f"{out} lies inside the folder that is read. Give a place outside of it.")
    require_empty(out)


class _Decoded(NamedTuple):
    """One image as it comes from a worker."""

    png: bytes
    record: AcquisitionRecord
    file_sha256: str
    scale: float  # pixels stored for one in the file


def _decode(job: tuple[str, int, str]) -> _Decoded | str:
    """In a worker: one file → image and record, or the reason why not."""
    path, size, intensity = job
    try:
        radiograph = read_radiograph(Path(path))
        pixels = to_eight_bits(resize_shorter_side(radiograph.pixels, size), intensity)
        scale = size / min(radiograph.pixels.shape)
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return _Decoded(encode_png(pixels), radiograph.record, digest, scale)
    except BadImage as refused:
        return str(refused)
    except OSError as cause:
        return f"cannot be read from disk ({cause.strerror})"
    except MemoryError:
        return "needs more memory than there is"


class _Hashes:
    """Names that tell nothing to those without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def of(self, kind: str, value: str, digits: int = 16) -> str:
        """Hexadecimal digits; the same value of two kinds gives unrelated ones."""
        message = f"{kind}\0{value}".encode(errors="surrogateescape")
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()[:digits]


class _RowMaker:
    """Joins what file, header and table say of an image into a row of the dataset.

    Attributes:
        patients_named: Whether the patient of any image was named, in a run before included.
    """

    def __init__(
        self,
        hashes: _Hashes,
        metadata: MetadataTable,
        reports: ReportFiles,
        seed: int,
        writer: DatasetWriter,
    ) -> None:
        self._hashes, self._metadata, self._seed = hashes, metadata, seed
        self._reports = reports
        self._named_file = writer.partial / _NAMED_FILE
        self.patients_named = self._named_file.exists()
        written = (writer.written(column) for column in ("patient_id", "split"))
        self._split_of: dict[str, str] = dict(zip(*written, strict=True))

    def row(self, file: str, name: str, decoded: _Decoded) -> dict[str, Any]:
        """One row.

        Raises:
            BadImage: The table gives patients or splits, but none for this image, or for its
                patient another split.
        """
        known = self._metadata.of(file)
        report = self._reports.key_of(file)
        place = published_place(file)
        study_key = known.get("study_id") or decoded.record.study_key
        study_key = study_key or (place.study if place else report)
        patient = self._patient(known, study_key, place, decoded)
        study = self._hashes.of("study", f"{patient}\0{study_key or file}")
        header = {
            column: getattr(decoded.record, column)
            for column in ("view", "sex", "age_years", "weight_kg", "bmi", "scanner")
        }
        spacing = known.get("pixel_spacing_mm") or decoded.record.pixel_spacing_mm
        return {
            **header,
            "report": self._reports.reports[report] if report else None,
            **known,
            "pixel_spacing_mm": spacing and spacing / decoded.scale,
            "image": decoded.png,
            "image_id": self._hashes.of("image", file),
            "patient_id": patient,
            "study_id": study,
            "split": self._split(patient, known),
            "source_file": name,
        }

    def _patient(
        self,
        known: dict[str, Any],
        study_key: str | None,
        place: Place | None,
        decoded: _Decoded,
    ) -> str:
        if self._metadata.gives_patients and "patient_id" not in known:
            raise BadImage("has no patient_id in the table, which gives the patients")
        # Kinds, so that a study or a file can never fall together with an identifier.
        identifier = known.get("patient_id") or decoded.record.patient_key
        if identifier := identifier or (place and place.patient):
            if not self.patients_named:
                self._named_file.touch()
            self.patients_named = True
            return self._hashes.of("patient", identifier)
        if study_key:
            return self._hashes.of("patient of study", study_key)
        # By content and not by name: a copy in another folder stays in the same split.
        return self._hashes.of("patient of file", decoded.file_sha256)

    def _split(self, patient: str, known: dict[str, Any]) -> str:
        if not self._metadata.gives_splits:
            return split_of_patient(patient, self._seed)
        split = known.get("split")
        if split is None:
            raise BadImage("is not in the table, which gives the splits")
        if self._split_of.setdefault(patient, split) != split:
            raise BadImage("the table puts this image in another split than its patient's first")
        return split


def _require_no_identifier(
    table: Path | None, metadata: MetadataTable, writer: DatasetWriter
) -> None:
    """Look again at the columns of the table, now that all patients are known.

    Raises:
        InputError: A column has a value of its own for most patients.
    """
    patients = writer.written("patient_id")
    for name, kind in metadata.records.items():
        require_no_identifier(f"--table {table}", name, kind, writer.written(name), patients)


def split_of_patient(patient_id: str, seed: int) -> str:
    """The split of a patient: a fixed draw by `SPLIT_SHARES`, whatever other patients there are."""
    digest = hashlib.sha256(f"{seed}\0{patient_id}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2**64
    for split in SPLITS[:-1]:
        if draw < SPLIT_SHARES[split]:
            return split
        draw -= SPLIT_SHARES[split]
    return SPLITS[-1]


def _key(path: Path) -> bytes:
    """The secret key of the hashes; made, readable by its owner alone, if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with create_private(path) as file:
            file.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        pass
    except OSError as cause:
        raise InputError(f"{path}: the key cannot be written ({cause.strerror})") from None
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        key = ""
    if len(key) < 32:
        raise InputError(
            f"{path}: holds no key. Give a file with at least 32 random characters, or a new path "
            "at which to make one."
        )
    return key.encode()


@contextmanager
def _left_as_found(path: Path) -> Iterator[None]:
    """Remove a file that is made here when the input turns out to be wrong."""
    existed = path.exists()
    try:
        yield
    except InputError:
        if not existed:
            path.unlink(missing_ok=True)
        raise


def _require_same_command(
    writer: DatasetWriter,
    source: Path,
    known: tuple[Path | None, ReportFiles],
    seed: int,
    key: bytes,
) -> None:
    """Refuse to continue what was begun with another key, table or seed: rows would not match.

    Args:
        writer: Of the dataset.
        source: Folder of the images.
        known: Table and reports.
        seed: Of the splits.
        key: Of the hashes.

    Raises:
        InputError: The unfinished dataset was begun by another command.
    """
    table, reports = known
    command = {
        "source": str(source.resolve()),
        "table": hashlib.sha256(table.read_bytes()).hexdigest() if table else None,
        "reports": reports.fingerprint if reports.reports else None,
        "seed": seed,
        "key": hashlib.sha256(b"which key\0" + key).hexdigest(),
    }
    path = writer.partial / _COMMAND_FILE
    if not path.exists():
        if writer.shards:
            raise InputError(f"{writer.partial} was not made by ingest. Remove it.")
        write_atomically(path, json.dumps(command).encode())
    begun = json.loads(path.read_text())
    differing = [name for name in command if begun.get(name) != command[name]]
    if differing:
        raise InputError(
            f"{writer.partial} was begun with another {' and '.join(differing)}. Repeat the "
            "command that began it, or remove it."
        )


def _remove_notes(out: Path) -> None:
    """Remove what only an unfinished ingest needs."""
    for name in (_COMMAND_FILE, _NAMED_FILE):
        (out / name).unlink(missing_ok=True)


class _Refusals:
    """The list of refused files, on disk as it grows, so that a resumed run need not try again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.records: list[dict[str, str]] = []
        if path.exists():
            # The last line may be cut off by a kill: that file is tried again.
            for line in path.read_text("utf-8").splitlines(keepends=True):
                if line.endswith("\n"):
                    self.records.append(json.loads(line))

    def __enter__(self) -> _Refusals:
        self._file = self._path.open("w", encoding="utf-8")
        for record in self.records:
            self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def files(self) -> set[str]:
        return {record["file"] for record in self.records}

    def add(self, file: str, reason: str) -> None:
        self.records.append({"file": file, "reason": reason})
        self._file.write(json.dumps(self.records[-1]) + "\n")
        self._file.flush()


def _with_progress(files: list[str], outcomes: Iterator[Any]) -> Generator[tuple[str, Any]]:
    """Pair files with outcomes under a progress bar."""
    with progress_bar(total=len(files), unit="image", desc="ingest") as bar:
        for file, outcome in zip(files, outcomes, strict=True):
            bar.update()
            yield file, outcome


def _until_interrupted(outcomes: Generator[Any], writer: DatasetWriter) -> Iterator[Any]:
    """Pass outcomes on until SIGINT or SIGTERM arrives; then keep what was read, and stop.

    The signals only raise a flag: an exception out of nowhere could hit between a shard and the
    record of its being written.
    """
    with collected_signals() as arrived:
        try:
            for outcome in outcomes:
                yield outcome
                if arrived:
                    writer.flush()
                    raise Interrupted(
                        f"{writer.rows_written} images are kept in {writer.partial}. Repeat the "
                        "command to continue."
                    )
        finally:
            outcomes.close()  # the progress bar ends its line before anything is said


@contextmanager
def _room_on_disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise InputError(
            f"{out}.partial: no room left on the disk. What was read is kept there; free some room "
            "and repeat the command."
        ) from None
