"""The CSV of `ingest --table`: what is known of an image besides what its file says."""

from __future__ import annotations

import csv
import difflib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from selfray.data.dataset import SPLITS
from selfray.errors import InputError, nearest

TEXT_COLUMNS = ("patient_id", "study_id", "split", "view", "sex", "site", "scanner", "report")
NUMBER_COLUMNS = ("age_years", "weight_kg", "bmi", "pixel_spacing_mm")
KNOWN_COLUMNS = ("file", *TEXT_COLUMNS, *NUMBER_COLUMNS)

MAX_CHARACTERS = 1_000_000
"""Of one value: as much as a report in a file of its own (`report_files.MAX_REPORT_BYTES`)."""

MAX_CATEGORIES = 32
"""Different values of a column of text. Each becomes a target that needs some twenty images for and
against it in the test split, and lists of names or remarks are longer."""

_LARGEST = {"age_years": 120.0, "weight_kg": 700.0, "bmi": 200.0, "pixel_spacing_mm": 10.0}
_LARGEST_RECORD = 99_999.0  # longer numbers are record numbers, dates (20190314) and times (104523)
# Shares of the patients from which on a column tells them apart. Text of few values is shared by
# many; of whole numbers, such as laboratory values, many patients have one of their own.
_TELLING = {"category": 0.5, "number": 0.9}
_CLOSE_TO_KNOWN = (
    0.8  # difflib's ratio of "weight" to "weight_kg", of "Patient ID" to "patient_id": 0.9
)
_OTHERS = (
    "Other names are for findings (1, 0 and empty), numbers and texts of few values: rename it."
)
_LABEL_WORDS = frozenset(
    {"yes", "no", "y", "n", "true", "false", "t", "f", "pos", "neg", "positive", "negative"}
)
_SEXES = {"f": "F", "female": "F", "m": "M", "male": "M", "o": None, "u": None, "unknown": None}
_LABELS = {"": None, "1": 1, "1.0": 1, "0": 0, "0.0": 0}


@dataclass(frozen=True)
class MetadataTable:
    """Metadata by file.

    Attributes:
        findings: Names of the finding columns, in the order of the table.
        records: Other columns that are not known, by name `number` or `category`.
        gives_splits: Whether the table says which split a patient is in.
        gives_patients: Whether the table says which patient an image is of.
        rows: By file (path below the ingested folder, with `/`), the values that are known.
        unmatched: Rows of the table for which there is no file.
    """

    findings: tuple[str, ...] = ()
    records: dict[str, str] = field(default_factory=dict)
    gives_splits: bool = False
    gives_patients: bool = False
    rows: dict[str, dict[str, Any]] | None = None
    unmatched: int = 0

    def of(self, file: str) -> dict[str, Any]:
        """What is known of one file; empty if it is not in the table."""
        return (self.rows or {}).get(file, {})


def read_metadata_table(path: Path, files: Iterable[str]) -> MetadataTable:
    """Read a CSV with a header line, and match its rows to files.

    The column `file` holds a path below the ingested folder, or a file name, or a file name
    without suffix, where only one file has it. Known columns are `KNOWN_COLUMNS`; of these,
    `pixel_spacing_mm` is that of the file. A value has at most `MAX_CHARACTERS`. A column of
    another name is a finding if it holds nothing but 1, 0 and empty, a number if all its values
    are, else a category of at most `MAX_CATEGORIES` values. What may identify a patient is refused:
    text that is not shared, whole numbers that nearly each patient has for itself, numbers of more
    than five digits or with leading zeros. Ages above 120, pixels above 10 mm, and weights, BMIs
    and pixels that are not positive, count as unknown.

    Args:
        path: UTF-8 CSV, separated by commas, or by semicolons or tabs, with which decimal commas
            are usual.
        files: Paths below the ingested folder, with `/`.

    Raises:
        InputError: What is wrong with which column or row (the header is row 1). The values
            themselves are not repeated: they may identify a patient.
    """
    header, *lines = _lines(path) or [[]]
    header = [name.strip() for name in header]
    _require_header(path, header)
    records = []
    for number, line in enumerate(lines, start=2):
        if not line:
            continue
        if len(line) != len(header):
            raise InputError(
                f"--table {path}, row {number}: {len(line)} values for {len(header)} columns"
            )
        record = dict(zip(header, (value.strip() for value in line), strict=True))
        records.append((number, record))
    findings, kinds = _other_columns(path, header, [record for _, record in records])
    locate = _file_index(files)
    rows: dict[str, dict[str, Any]] = {}
    for number, record in records:
        where = f"--table {path}, row {number}"
        file = _located(where, record["file"], locate)
        if file is None:
            continue
        if file in rows:
            raise InputError(f"{where}: this file has a row already. Give each file one row.")
        rows[file] = _values(where, record, findings, kinds)
    if records and not rows:
        raise InputError(
            f"--table {path}: no value of its column 'file' is a file of the folder. Give paths "
            "below the folder, or file names."
        )
    _require_one_split_a_patient(path, rows)
    return MetadataTable(
        findings=tuple(findings),
        records=kinds,
        gives_splits="split" in header,
        gives_patients="patient_id" in header,
        rows=rows,
        unmatched=len(records) - len(rows),
    )


def _lines(path: Path) -> list[list[str]]:
    lines: list[list[str]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as source, _room_for_reports():
            delimiter = max(",;\t", key=source.readline().count)
            source.seek(0)
            for line in csv.reader(source, strict=True, delimiter=delimiter):
                lines.append(line)
    except OSError as cause:
        raise InputError(f"--table {path}: cannot be read ({cause.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as cause:
        if "field limit" in str(cause):
            raise InputError(
                f"--table {path}, row {len(lines) + 1}: a value has more than {MAX_CHARACTERS:,} "
                "characters. Shorten it; if none is so long, a quotation mark is missing here."
            ) from None
        raise InputError(f"--table {path}: is no CSV in UTF-8. Save it as CSV UTF-8.") from None
    return lines


@contextmanager
def _room_for_reports() -> Iterator[None]:
    """The limit of `csv` is one for the whole process, and 131,072 characters."""
    former = csv.field_size_limit(MAX_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(former)


def _require_header(path: Path, header: list[str]) -> None:
    if "file" not in header:
        raise InputError(
            f"--table {path}: the column 'file' is missing; {_found_columns(header)}. Name the "
            "column 'file' that holds paths below the folder, or file names."
        )
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice:
        raise InputError(f"--table {path}: column {twice[0]!r} is there twice")


def _found_columns(header: list[str]) -> str:
    """Names in the first row; without a known one it may be a patient's row, and is not told."""
    if any(name.lower() in KNOWN_COLUMNS for name in header):
        return f"found: {', '.join(header)}"
    count = len(header)
    return f"none of its {count} columns has a known name" if header else "the file is empty"


def _other_columns(
    path: Path, header: list[str], records: list[dict[str, str]]
) -> tuple[list[str], dict[str, str]]:
    """Names of the findings, and kinds by name of what else is not known."""
    findings, kinds = [], {}
    for name in header:
        if name in KNOWN_COLUMNS:
            continue
        where = f"--table {path}, column {name!r}"
        values = [record[name] for record in records]
        _require_meant(where, name, set(values))
        if set(values) <= set(_LABELS):
            findings.append(name)
            continue
        numbers = all(_as_number(value) is not None for value in values if value)
        kinds[name] = "number" if numbers else "category"
        patients = [record.get("patient_id", str(row)) for row, record in enumerate(records)]
        require_no_identifier(f"--table {path}", name, kinds[name], values, patients)
    return findings, kinds


def _require_meant(where: str, name: str, values: set[str]) -> None:
    """Refuse names and values that are likelier a slip than a column of their own."""
    close = difflib.get_close_matches(name.lower(), KNOWN_COLUMNS, 1, _CLOSE_TO_KNOWN)
    if close or not name:
        raise InputError(
            f"{where}: unknown column. {nearest(name.lower(), KNOWN_COLUMNS)} {_OTHERS}"
        )
    if values & {"-1", "-1.0"} and values <= {*_LABELS, "-1", "-1.0"}:
        raise InputError(
            f"{where}: this finding holds -1 (uncertain). Allowed: 1, 0 and empty. Decide which of "
            "them uncertain shall be."
        )
    if {value.lower() for value in values} - {""} <= _LABEL_WORDS and values - {""}:
        raise InputError(f"{where}: holds words such as yes and no. Write 1, 0 and empty.")


def require_no_identifier(
    where: str, name: str, kind: str, values: Sequence[Any], patients: Sequence[str]
) -> None:
    """Refuse a column by which patients could be told apart.

    Args:
        where: What holds the column, for the error.
        name: Of the column.
        kind: `number` or `category`.
        values: Of each image, as text or as read; empty or None where not known.
        patients: Whose image it is.

    Raises:
        InputError: It could; no value is told.
    """
    known = [(str(v), p) for v, p in zip(values, patients, strict=True) if v not in ("", None)]
    different = {value for value, _ in known}
    holders = len({patient for _, patient in known})
    where = f"{where}, column {name!r}"
    advice = "Leave the column out if it names patients, studies or days"
    if kind == "category" and len(different) > MAX_CATEGORIES:
        raise InputError(
            f"{where}: {len(different)} different texts, at most {MAX_CATEGORIES} are taken. "
            f"{advice}; else join values."
        )
    numbers = [_as_number(value) or 0.0 for value in different] if kind == "number" else []
    if any(abs(n) > _LARGEST_RECORD for n in numbers) or any(
        re.match(r"[+-]?0\d", value) for value in different if numbers
    ):
        raise InputError(
            f"{where}: numbers of more than five digits or with leading zeros, as record numbers, "
            f"dates and times are. {advice}; else give it in a larger unit."
        )
    whole = all(number.is_integer() for number in numbers)
    if whole and len(different) > _TELLING[kind] * holders:
        raise InputError(
            f"{where}: {len(different)} different values of {holders} patients, nearly one for "
            f"each, would tell them apart. {advice}; else round it or join values."
        )


def _file_index(files: Iterable[str]) -> dict[str, list[str]]:
    """Files by all that a table may call them."""
    index: dict[str, list[str]] = defaultdict(list)
    for file in files:
        path = PurePosixPath(file)
        for name in {file, path.name, path.stem}:
            index[name].append(file)
    return index


def _located(where: str, name: str, index: dict[str, list[str]]) -> str | None:
    name = name.replace("\\", "/").removeprefix("./")
    candidates = index.get(name, [])
    if name in candidates:
        return name
    if len(candidates) > 1:
        raise InputError(
            f"{where}: {len(candidates)} files have this name. Give the path below the folder."
        )
    return candidates[0] if candidates else None


def _values(
    where: str, record: dict[str, str], findings: list[str], kinds: dict[str, str]
) -> dict[str, Any]:
    """The known values of one row; unknown ones are left out."""
    values: dict[str, Any] = {name: _LABELS[record[name]] for name in findings}
    for name, kind in kinds.items():
        if record[name]:
            values[name] = _as_number(record[name]) if kind == "number" else record[name]
    for name in TEXT_COLUMNS:
        if record.get(name):
            values[name] = record[name]
    for name in NUMBER_COLUMNS:
        if record.get(name):
            values[name] = _number(f"{where}, column {name!r}", record[name], _LARGEST[name])
    if "sex" in values:
        if values["sex"].lower() not in _SEXES:
            raise InputError(f"{where}: sex is neither F nor M nor empty")
        values["sex"] = _SEXES[values["sex"].lower()]
    if "view" in values:
        values["view"] = values["view"].upper()
    if "split" in record and values.get("split") not in SPLITS:
        raise InputError(f"{where}: split is none of {', '.join(SPLITS)}")
    return {name: value for name, value in values.items() if value is not None}


def _number(where: str, text: str, largest: float) -> float | None:
    number = _as_number(text)
    if number is None:
        raise InputError(f"{where}: is no number")
    return number if 0 <= number <= largest and (number > 0 or largest == 120) else None


def _as_number(text: str) -> float | None:
    """A finite number with a decimal point or comma, or None for other text."""
    try:
        number = float(text.replace(",", "."))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _require_one_split_a_patient(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    split_of: dict[str, str] = {}
    for values in rows.values():
        patient, split = values.get("patient_id"), values.get("split")
        if patient and split and split_of.setdefault(patient, split) != split:
            raise InputError(
                f"--table {path}: a patient is in the splits {split_of[patient]} and {split}. "
                "All images of a patient belong in one."
            )
