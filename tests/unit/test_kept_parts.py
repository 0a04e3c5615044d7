"""Kept parts of an evaluation: taken over where they hold, else refused."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from selfray.errors import InputError
from selfray.evaluate.kept_parts import claim_directory, read_part, write_part

IDENTITY = {"weights_sha256": "a" * 64, "labels": ("lung", "heart"), "steps": 3}
TABLE = pa.table({"dice": [0.5, None]})


@pytest.fixture
def part(tmp_path: Path) -> Path:
    file = tmp_path / "made" / "part.parquet"
    write_part(file, TABLE, IDENTITY)
    return file


def test_what_was_kept_comes_back_with_its_own_metadata_alone(part):
    found = read_part(part, IDENTITY)
    assert found is not None and found.equals(TABLE, check_metadata=True)
    described = TABLE.replace_schema_metadata({"judged": "by one"})
    write_part(part, described, IDENTITY)
    found = read_part(part, IDENTITY)
    assert found is not None and found.equals(described, check_metadata=True)


def test_a_part_that_is_not_there_is_none(tmp_path):
    assert read_part(tmp_path / "part.parquet", IDENTITY) is None


@pytest.mark.parametrize(
    ("what", "change"),
    [("labels", {"labels": ("heart", "lung")}), ("image_size", {"image_size": 8})],
)
def test_a_part_of_something_else_is_refused_by_what_differs_and_stays(part, what, change):
    before = part.read_bytes()
    with pytest.raises(InputError, match=f"part.parquet is of other {what} than now"):
        read_part(part, IDENTITY | change)
    assert part.read_bytes() == before


def test_a_damaged_part_and_a_table_of_somebody_else_are_refused(part):
    pq.write_table(TABLE, part)
    with pytest.raises(InputError, match="no part of an evaluation"):
        read_part(part, IDENTITY)
    part.write_bytes(b"PAR1")
    with pytest.raises(InputError, match="is damaged"):
        read_part(part, IDENTITY)


def test_a_directory_of_unfinished_work_is_of_what_it_was_begun_with(tmp_path):
    directory = tmp_path / "new" / "seed-0"
    for _ in range(2):
        claim_directory(directory, IDENTITY)
    with pytest.raises(InputError, match="seed-0 is of other steps than now"):
        claim_directory(directory, IDENTITY | {"steps": 4})
    (mark,) = directory.iterdir()
    mark.write_text("[1")
    with pytest.raises(InputError, match="is damaged"):
        claim_directory(directory, IDENTITY)
