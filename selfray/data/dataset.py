"""The dataset directory: one row an image, opened by `datasets.load_from_disk` and by us.

Layout: Arrow shards (stream format, uncompressed, so that they are memory-mapped), the two JSON
files by which the `datasets` library recognises a saved dataset, `dataset.json` (what this is)
and `quarantine.jsonl` (what was refused, and why).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from selfray.data.report_text import count_sections
from selfray.errors import BadImage, InputError

FORMAT_NAME = "selfray-dataset"
FORMAT_VERSION = 1
SPLITS = ("train", "validate", "test")

_ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_COLUMNS: dict[str, pa.DataType] = {
    "image": _ENCODED,  # PNG or JPEG bytes, 8-bit gray
    "image_id": pa.string(),
    "patient_id": pa.string(),
    "study_id": pa.string(),
    "split": pa.string(),  # train, validate or test; a patient is in one only
    "view": pa.string(),  # PA, AP, LL, ...
    "site": pa.string(),
    "sex": pa.string(),  # F, M or null
    "age_years": pa.float32(),
    "weight_kg": pa.float32(),
    "bmi": pa.float32(),  # kg/m²
    "scanner": pa.string(),  # manufacturer and model
    "pixel_spacing_mm": pa.float32(),  # of the pixels that are stored here; null if not square
    "mask": _ENCODED,  # PNG, uint16 bit field: bit k is set where label k of `mask_labels` is
    "finding_mask": _ENCODED,  # likewise, bit k for finding k of `findings`
    "report": pa.string(),
    "source_file": pa.string(),  # from ingest: keyed hash of the path below the folder
}
_RECORDS = {"number": pa.float32(), "category": pa.string()}


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says before counting.

    Attributes:
        name: Short name of the dataset.
        origin: Where the images come from; `synthetic phantom` for synthetic ones.
        licence: Terms of use of the images.
        synthetic: True when no image shows a real patient.
        findings: Names of the findings, each a column of 1/0/null.
        mask_labels: Names of the bits of `mask`, lowest first, at most 16.
        pixels: How pixels were made from the source files.
        records: Columns of this dataset alone, by name `number` or `category` (text).
    """

    name: str
    origin: str
    licence: str
    synthetic: bool
    findings: tuple[str, ...]
    mask_labels: tuple[str, ...]
    pixels: str
    records: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for what, names in (
            ("findings", self.findings),
            ("mask_labels", self.mask_labels),
            ("records and findings", (*self.records, *self.findings)),
        ):
            if len(set(names)) != len(names) or set(names) & set(_COLUMNS):
                raise InputError(f"{what} must be distinct and none of the column names: {names}")
        if len(self.mask_labels) > 16:
            raise InputError(f"mask_labels: {len(self.mask_labels)} labels, at most 16 fit")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode a gray image as PNG.

    Args:
        pixels: uint8 or uint16 [H, W].
    """
    done, encoded = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 4])
    if not done:
        raise BadImage(f"PNG encoding failed for an array of {pixels.dtype} {pixels.shape}")
    return encoded.tobytes()


def encode_bits(masks: np.ndarray) -> bytes:
    """Encode overlapping masks as one PNG bit field.

    Args:
        masks: bool [K, H, W], K <= 16.
    """
    bits = np.zeros(masks.shape[1:], np.uint16)
    for index, mask in enumerate(masks):
        bits |= mask.astype(np.uint16) << index
    return encode_png(bits)


class DatasetWriter:
    """Writes a dataset directory shard by shard; nothing appears under its name until all is done.

    Rows collect in `OUT.partial/`. After an interruption, a writer opened on the same directory
    with the same info continues after the last complete shard: `rows_written` and
    `written("source_file")` say what is already there.

    Args:
        out: Directory to make. Must not exist, or be an empty directory.
        info: What the dataset is.
        rows_per_shard: Rows after which a shard is closed and fsynced.

    Raises:
        InputError: `out` holds something, or a partial directory of another dataset is there.
    """

    def __init__(self, out: Path, info: DatasetInfo, rows_per_shard: int = 2048) -> None:
        require_empty(out)
        self.out, self.info, self.rows_per_shard = out, info, rows_per_shard
        self.partial = out.with_name(out.name + ".partial")
        self._schema = pa.schema(
            [
                *_COLUMNS.items(),
                *((name, _RECORDS[kind]) for name, kind in info.records.items()),
                *((finding, pa.int8()) for finding in info.findings),
            ]
        )
        self._rows: list[dict[str, Any]] = []
        plan = json.dumps({"format": FORMAT_NAME, **info.__dict__}, sort_keys=True)
        plan_file = self.partial / "plan.json"
        if plan_file.exists() and plan_file.read_text() != plan:
            raise InputError(
                f"{self.partial} holds an unfinished dataset made with other settings. "
                "Remove it, or repeat the command that began it."
            )
        if self.partial.exists() and any(self.partial.iterdir()) and not plan_file.exists():
            raise InputError(f"{self.partial} exists and is no unfinished dataset. Remove it.")
        self.partial.mkdir(parents=True, exist_ok=True)
        write_atomically(plan_file, plan.encode())

    @property
    def shards(self) -> list[Path]:
        return sorted(self.partial.glob("shard-*.arrow"))

    @property
    def rows_written(self) -> int:
        """Rows in complete shards; rows still in memory are not counted."""
        return sum(_read_shard(shard).num_rows for shard in self.shards)

    def written(self, column: str) -> list[Any]:
        """The values of one column in complete shards, in order."""
        return [v for shard in self.shards for v in _read_shard(shard)[column].to_pylist()]

    def add(self, row: Mapping[str, Any]) -> None:
        """Add one image.

        Args:
            row: Values by column; absent columns are null. `image`, `mask` and `finding_mask`
                are encoded bytes.

        Raises:
            InputError: A column that the dataset does not have, or a split that is none.
        """
        unknown = set(row) - set(self._schema.names)
        if unknown:
            raise InputError(f"columns {sorted(unknown)} are not in this dataset")
        if row.get("split") not in SPLITS:
            raise InputError(f"split is {row.get('split')!r}. Allowed: {', '.join(SPLITS)}")
        full = dict.fromkeys(self._schema.names) | dict(row)
        for column in ("image", "mask", "finding_mask"):
            if full[column] is not None:
                full[column] = {"bytes": full[column], "path": None}
        self._rows.append(full)
        if len(self._rows) >= self.rows_per_shard:
            self.flush()

    def flush(self) -> None:
        """Close the current shard, so that its rows survive an interruption."""
        if not self._rows:
            return
        path = self.partial / f"shard-{len(self.shards):05d}.arrow"
        temporary = path.with_name(f".{path.name}.partial")
        try:
            self._write_shard(temporary)
        except OSError:
            temporary.unlink(missing_ok=True)  # on a full disk, leave the room that it took
            raise
        temporary.replace(path)
        self._rows = []

    def _write_shard(self, path: Path) -> None:
        with path.open("wb") as file:
            with pa.ipc.new_stream(file, self._schema) as stream:
                # Small batches keep random access cheap: a batch is the unit of a lookup.
                for start in range(0, len(self._rows), 64):
                    rows = self._rows[start : start + 64]
                    stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=self._schema))
            file.flush()
            os.fsync(file.fileno())

    def finish(
        self,
        quarantined: Iterable[Mapping[str, str]] = (),
        counts: Mapping[str, Any] = MappingProxyType({}),
    ) -> RadiographDataset:
        """Write the describing files and give the directory its name.

        Args:
            quarantined: One record a refused file, e.g. `{"file": ..., "reason": ...}`.
            counts: More counts for `dataset.json`, by name.

        Raises:
            InputError: No row was added, or a patient is in two splits.
        """
        self.flush()
        shards = self.shards
        if not shards:
            raise InputError(f"{self.out}: no image could be read, so no dataset was made")
        tables = [_read_shard(shard) for shard in shards]
        _require_one_split_per_patient(tables, self.out)
        refused = [dict(record) for record in quarantined]
        digest = hashlib.sha256()
        for shard in shards:
            with shard.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        description = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            **self.info.__dict__,
            "counts": {**_counts(tables), "quarantined": len(refused), **counts},
            "fingerprint": digest.hexdigest(),
        }
        state = {
            "_data_files": [{"filename": shard.name} for shard in shards],
            "_fingerprint": digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        features = {
            name: {"_type": "Image"}
            if type_ == _ENCODED
            else {"dtype": "float32" if type_ == pa.float32() else str(type_), "_type": "Value"}
            for name, type_ in zip(self._schema.names, self._schema.types, strict=True)
        }
        lines = "".join(json.dumps(record) + "\n" for record in refused)
        write_atomically(self.partial / "quarantine.jsonl", lines.encode())
        write_atomically(
            self.partial / "dataset_info.json", json.dumps({"features": features}).encode()
        )
        write_atomically(self.partial / "state.json", json.dumps(state).encode())
        write_atomically(self.partial / "dataset.json", json.dumps(description, indent=2).encode())
        if self.out.exists():
            self.out.rmdir()
        self.partial.rename(self.out)
        # Last: without the plan a kill just before the renaming would leave what nobody continues.
        (self.out / "plan.json").unlink()
        return RadiographDataset(self.out)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.partial, ignore_errors=True)


class RadiographDataset:
    """A dataset directory opened for reading: memory-mapped, random access, cheap to open.

    Args:
        directory: What `selfray ingest` or `selfray phantom` wrote.

    Raises:
        InputError: Not a dataset directory, or of a newer version than this program knows.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        description = self.directory / "dataset.json"
        if not self.directory.is_dir():
            raise InputError(f"{directory} is not a directory. Give one made by `selfray ingest`.")
        try:
            self.info: dict[str, Any] = json.loads(description.read_text())
            if self.info["format"] != FORMAT_NAME or not isinstance(self.info["version"], int):
                raise KeyError("format")
            state = json.loads((self.directory / "state.json").read_text())
            shards = [self.directory / Path(f["filename"]).name for f in state["_data_files"]]
        except (OSError, ValueError, KeyError, TypeError) as cause:
            raise InputError(
                f"{directory} is not a selfray dataset (dataset.json or state.json is missing or "
                "of another tool). Make one with `selfray ingest FOLDER OUT`."
            ) from cause
        if self.info["version"] > FORMAT_VERSION:
            raise InputError(
                f"{directory} is of dataset version {self.info['version']}, this program knows "
                f"{FORMAT_VERSION}. Update selfray."
            )
        try:
            self.table: pa.Table = pa.concat_tables([_read_shard(shard) for shard in shards])
        except (OSError, pa.ArrowInvalid) as cause:
            raise InputError(f"{directory}: a shard is missing or damaged ({cause})") from cause
        self.findings: tuple[str, ...] = tuple(self.info["findings"])
        self.mask_labels: tuple[str, ...] = tuple(self.info["mask_labels"])
        # Datasets of before there were records have none.
        self.records: dict[str, str] = dict(self.info.get("records", {}))
        self.fingerprint: str = self.info["fingerprint"]
        self.synthetic: bool = bool(self.info["synthetic"])
        # One chunk lookup by bisection instead of pyarrow's linear walk over the chunks.
        images = self.table["image"]
        self._chunks = images.chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])

    def __len__(self) -> int:
        return self.table.num_rows

    def encoded(self, row: int) -> bytes:
        """The encoded bytes of one image."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        chunk = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self._chunks[chunk].field("bytes")[row - int(self._starts[chunk])].as_py()

    def pixels(self, row: int) -> np.ndarray:
        """One image, uint8 [H, W].

        Raises:
            BadImage: The bytes do not decode.
        """
        pixels = cv2.imdecode(np.frombuffer(self.encoded(row), np.uint8), cv2.IMREAD_GRAYSCALE)
        if pixels is None:
            raise BadImage(f"{self.directory}: row {row} does not decode")
        return pixels

    def masks(self, row: int, column: str = "mask") -> np.ndarray | None:
        """The masks of one image, bool [K, H, W], in the order of their names; None if null.

        Args:
            row: Which image.
            column: `mask` (K = labels of `mask_labels`) or `finding_mask` (K = findings).
        """
        names = self.mask_labels if column == "mask" else self.findings
        value = self.table[column][row].as_py()
        if value is None:
            return None
        bits = cv2.imdecode(np.frombuffer(value["bytes"], np.uint8), cv2.IMREAD_UNCHANGED)
        if bits is None or bits.ndim != 2:
            raise BadImage(f"{self.directory}: {column} of row {row} does not decode")
        bits = bits.astype(np.uint16)
        return np.stack([(bits >> index) & 1 for index in range(len(names))]).astype(bool)

    def column(self, name: str) -> np.ndarray:
        """One column: float64 with NaN for null if numeric, else object with None for null."""
        if name not in self.table.column_names:
            raise InputError(
                f"{self.directory} has no column {name!r}. Columns: "
                f"{', '.join(self.table.column_names)}."
            )
        column = self.table[name]
        if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
            values = column.to_pylist()
            return np.array([np.nan if v is None else v for v in values], np.float64)
        return np.array(column.to_pylist(), dtype=object)

    def rows(self, split: str) -> np.ndarray:
        """Row numbers of one split, ascending, int64 [n]."""
        return np.flatnonzero(self.column("split") == split)

    def labels(self) -> np.ndarray:
        """All findings, float64 [N, K]: 1, 0, or NaN where it is not known."""
        if not self.findings:
            return np.empty((len(self), 0))
        return np.stack([self.column(finding) for finding in self.findings], axis=1)


def require_empty(out: Path) -> None:
    """Refuse to write where something is.

    Raises:
        InputError: `out` is a file or a directory with content.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and is not empty. Give a new directory, or remove it.")


def _read_shard(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_stream(source).read_all()


def _counts(tables: list[pa.Table]) -> dict[str, Any]:
    """Rows by what they are of; a report of several images counts once by section."""
    columns = {
        name: [v for t in tables for v in t[name].to_pylist()]
        for name in ("patient_id", "study_id", "split", "view", "site", "report")
    }
    pairs = zip(columns["study_id"], columns["report"], strict=True)
    reports = [(study, report) for study, report in pairs if report]
    return {
        "images": len(columns["split"]),
        "patients": len(set(columns["patient_id"])),
        "studies": len(set(columns["study_id"])),
        "split": dict(Counter(columns["split"])),
        "view": dict(Counter(str(v) for v in columns["view"])),
        "site": dict(Counter(str(v) for v in columns["site"])),
        "report": {
            "images": len(reports),
            **count_sections(report for _, report in dict.fromkeys(reports)),
        },
    }


def _require_one_split_per_patient(tables: list[pa.Table], out: Path) -> None:
    split_of: dict[str, str] = {}
    for table in tables:
        pairs = zip(table["patient_id"].to_pylist(), table["split"].to_pylist(), strict=True)
        for patient, split in pairs:
            if split_of.setdefault(patient, split) != split:
                raise InputError(
                    f"{out}: a patient is in two splits ({split_of[patient]}, {split})"
                )
