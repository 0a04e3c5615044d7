"""Parts of an evaluation that are kept, each with what it was made of.

Files and directories are named by the options, so that a part is taken over whatever else is asked
for. What can still differ is what a name stands for, the encoder's weights or the dataset. Such a
part is refused, as features are, and never replaced: it may have taken hours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from selfray.data.dataset import write_atomically
from selfray.errors import InputError

_IDENTITY = b"selfray"  # among the metadata of the Parquet file
_MARK = "made_of.json"


def read_part(part: Path, identity: Mapping[str, Any]) -> pa.Table | None:
    """A part that was kept, or None where there is none yet.

    Args:
        part: Parquet file.
        identity: By name, everything that the part depends on; can be JSON.

    Returns:
        The table that `write_part` was given.

    Raises:
        InputError: The file is damaged, or names another identity.
    """
    if not part.exists():
        return None
    try:
        table = pq.read_table(part)
        metadata = dict(table.schema.metadata or {})
        found = json.loads(metadata.pop(_IDENTITY))
    except (OSError, ValueError, KeyError) as cause:
        raise InputError(
            f"{part} is damaged, or no part of an evaluation. Remove it, and it is made again."
        ) from cause
    _require_equal(part, found, identity)
    return table.replace_schema_metadata(metadata or None)


def claim_directory(directory: Path, identity: Mapping[str, Any]) -> None:
    """Mark a directory of unfinished work, or refuse one that was marked for other work.

    Args:
        directory: Made if need be.
        identity: As for `read_part`.

    Raises:
        InputError: The mark is damaged, or names another identity.
    """
    mark = directory / _MARK
    if not mark.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(mark, json.dumps(identity, indent=2).encode())
        return
    try:
        found = dict(json.loads(mark.read_text("utf-8")))
    except (OSError, ValueError, TypeError) as cause:
        raise InputError(f"{mark} is damaged. Remove {directory}, and it is made again.") from cause
    _require_equal(directory, found, identity)


def write_part(part: Path, table: pa.Table, identity: Mapping[str, Any]) -> None:
    """Keep a part.

    Args:
        part: Parquet file, in a directory that is made if need be.
        table: Its own metadata is kept.
        identity: As for `read_part`.
    """
    named = {**(table.schema.metadata or {}), _IDENTITY: json.dumps(identity).encode()}
    write_table(part, table.replace_schema_metadata(named))


def write_table(file: Path, table: pa.Table) -> None:
    """Write a Parquet file, whole or not at all."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, buffer.getvalue().to_pybytes())


def _require_equal(path: Path, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    as_read = json.loads(json.dumps(identity))  # lists for tuples
    for what, wanted in as_read.items():
        if found.get(what) != wanted:
            raise InputError(
                f"{path} is of other {what} than now. Give another --out, or remove it."
            )
