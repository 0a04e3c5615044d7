"""The dataset directory keeps its promises to readers, here and in the `datasets` library."""

import json
from pathlib import Path

import cv2
import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfray.data.dataset import (
    FORMAT_VERSION,
    DatasetInfo,
    DatasetWriter,
    RadiographDataset,
    encode_bits,
    encode_png,
    write_atomically,
)
from selfray.errors import InputError

LABELS = tuple(f"label {index}" for index in range(16))


def info(**changes) -> DatasetInfo:
    fields = {
        "name": "small",
        "origin": "test",
        "licence": "none",
        "synthetic": True,
        "findings": ("effusion", "nodule"),
        "mask_labels": LABELS,
        "pixels": "as drawn",
    }
    return DatasetInfo(**fields | changes)


def image(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (9 + row % 3, 7), np.uint8)


def row_of(number: int, **changes) -> dict:
    row = {
        "image": encode_png(image(number)),
        "image_id": f"image {number}",
        "patient_id": f"patient {number}",
        "study_id": f"study {number}",
        "split": ("train", "validate", "test")[number % 3],
        "age_years": 20.5 + number,
        "effusion": (1, 0, None)[number % 3],
        "source_file": f"file {number}",
    }
    return row | changes


def written(out: Path, count: int = 150, rows_per_shard: int = 70) -> RadiographDataset:
    writer = DatasetWriter(out, info(), rows_per_shard)
    for number in range(count):
        writer.add(row_of(number))
    return writer.finish([{"file": "x", "reason": "y"}])


def test_the_datasets_library_opens_it_with_the_same_pixels_and_values(tmp_path):
    ours = written(tmp_path / "d")
    theirs = datasets.load_from_disk(str(tmp_path / "d"))
    assert len(theirs) == len(ours) == 150
    for row in (0, 63, 64, 69, 70, 140, 149):
        np.testing.assert_array_equal(np.asarray(theirs[row]["image"]), image(row))
        np.testing.assert_array_equal(ours.pixels(row), image(row))
        assert theirs[row]["age_years"] == 20.5 + row
        assert theirs[row]["effusion"] == (1, 0, None)[row % 3]
        assert theirs[row]["nodule"] is None
        assert theirs[row]["mask"] is None


def test_columns_of_one_dataset_alone_are_read_by_their_kind(tmp_path):
    records = {"hb": "number", "ward": "category"}
    writer = DatasetWriter(tmp_path / "d", info(records=records))
    writer.add(row_of(0, hb=13.5, ward="ICU"))
    writer.add(row_of(1))
    ours = writer.finish()
    assert RadiographDataset(tmp_path / "d").records == records
    assert json.loads((tmp_path / "d" / "dataset.json").read_text())["records"] == records
    np.testing.assert_array_equal(ours.column("hb"), [13.5, np.nan])
    assert ours.column("ward").tolist() == ["ICU", None]
    theirs = datasets.load_from_disk(str(tmp_path / "d"))
    assert (theirs["hb"][:], theirs["ward"][:]) == ([13.5, None], ["ICU", None])
    with pytest.raises(InputError, match="must be distinct"):
        info(records={"sex": "category"})
    with pytest.raises(InputError, match="must be distinct"):
        info(records={"nodule": "number"})


def test_a_dataset_of_before_there_were_records_and_scanners_is_opened(tmp_path):
    writer = DatasetWriter(tmp_path / "d", info())
    newer = {"scanner", "pixel_spacing_mm"}
    writer._schema = pa.schema([f for f in writer._schema if f.name not in newer])
    writer.add(row_of(0))
    writer.finish()
    description = tmp_path / "d" / "dataset.json"
    older = json.loads(description.read_text())
    del older["records"]
    description.write_text(json.dumps(older))
    opened = RadiographDataset(tmp_path / "d")
    assert opened.records == {} and opened.column("age_years").tolist() == [20.5]
    with pytest.raises(InputError, match="no column 'scanner'"):
        opened.column("scanner")


def test_rows_can_be_read_in_any_order_and_none_beyond_the_end(tmp_path):
    dataset = written(tmp_path / "d")
    for row in np.random.default_rng(0).permutation(150)[:60]:
        np.testing.assert_array_equal(dataset.pixels(int(row)), image(int(row)))
    for outside in (-1, 150):
        with pytest.raises(IndexError):
            dataset.pixels(outside)


def test_unknown_labels_are_nan_and_splits_partition_the_rows(tmp_path):
    dataset = written(tmp_path / "d", 9)
    np.testing.assert_array_equal(dataset.labels()[:, 0], [1, 0, np.nan] * 3)
    assert np.isnan(dataset.labels()[:, 1]).all()
    rows = [dataset.rows(split) for split in ("train", "validate", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)), np.arange(9))
    with pytest.raises(InputError, match="no column 'height'"):
        dataset.column("height")


def test_dataset_json_counts_and_quarantine_are_written(tmp_path):
    written(tmp_path / "d", 10)
    description = json.loads((tmp_path / "d" / "dataset.json").read_text())
    assert description["version"] == FORMAT_VERSION
    assert description["counts"]["images"] == description["counts"]["patients"] == 10
    assert description["counts"]["split"] == {"train": 4, "validate": 3, "test": 3}
    assert description["counts"]["quarantined"] == 1
    lines = (tmp_path / "d" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"file": "x", "reason": "y"}]
    assert {path.name for path in (tmp_path / "d").iterdir()} == {
        "shard-00000.arrow",
        "dataset.json",
        "dataset_info.json",
        "state.json",
        "quarantine.jsonl",
    }


def test_the_fingerprint_tells_contents_apart_and_nothing_else(tmp_path):
    same = [written(tmp_path / name, 8).fingerprint for name in ("a", "b")]
    assert same[0] == same[1]
    assert written(tmp_path / "c", 7).fingerprint != same[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 16), st.integers(0, 2**32 - 1))
def test_sixteen_overlapping_masks_come_back_bit_for_bit(count, seed):
    masks = np.random.default_rng(seed).random((count, 6, 5)) < 0.5
    bits = cv2.imdecode(np.frombuffer(encode_bits(masks), np.uint8), cv2.IMREAD_UNCHANGED)
    assert bits is not None and bits.dtype == np.uint16
    for index in range(count):
        np.testing.assert_array_equal((bits >> index) & 1, masks[index])


def test_masks_are_read_by_the_names_of_their_bits(tmp_path):
    masks = np.random.default_rng(1).random((16, 9, 7)) < 0.5
    finding_masks = np.random.default_rng(2).random((2, 9, 7)) < 0.5
    writer = DatasetWriter(tmp_path / "d", info())
    writer.add(row_of(0, mask=encode_bits(masks), finding_mask=encode_bits(finding_masks)))
    writer.add(row_of(1))
    dataset = writer.finish()
    np.testing.assert_array_equal(dataset.masks(0), masks)
    np.testing.assert_array_equal(dataset.masks(0, "finding_mask"), finding_masks)
    assert dataset.masks(1) is None


def test_a_seventeenth_mask_label_or_a_finding_named_like_a_column_is_refused():
    with pytest.raises(InputError, match="at most 16"):
        info(mask_labels=(*LABELS, "one more"))
    with pytest.raises(InputError, match="distinct"):
        info(findings=("effusion", "sex"))
    with pytest.raises(InputError, match="distinct"):
        info(findings=("effusion", "effusion"))


def test_a_patient_in_two_splits_is_refused_and_nothing_gets_the_name(tmp_path):
    writer = DatasetWriter(tmp_path / "d", info())
    writer.add(row_of(0, patient_id="p", split="train"))
    writer.add(row_of(1, patient_id="p", split="test"))
    with pytest.raises(InputError, match="two splits"):
        writer.finish()
    assert not (tmp_path / "d").exists()


def test_an_interrupted_writer_resumes_to_the_same_dataset(tmp_path):
    writer = DatasetWriter(tmp_path / "d", info(), rows_per_shard=4)
    for number in range(11):  # two shards on disk; the last three rows are lost with the process
        writer.add(row_of(number))
    assert not (tmp_path / "d").exists()
    (tmp_path / "d.partial" / ".shard-00002.arrow.partial").write_bytes(b"cut off")
    again = DatasetWriter(tmp_path / "d", info(), rows_per_shard=4)
    assert again.rows_written == 8
    assert again.written("source_file") == [f"file {number}" for number in range(8)]
    for number in range(8, 13):
        again.add(row_of(number))
    resumed = again.finish()
    straight = DatasetWriter(tmp_path / "e", info(), rows_per_shard=4)
    for number in range(13):
        straight.add(row_of(number))
    assert resumed.fingerprint == straight.finish().fingerprint


def test_a_kill_just_before_the_renaming_can_be_continued(tmp_path, monkeypatch):
    writer = DatasetWriter(tmp_path / "d", info())
    writer.add(row_of(0))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            writer.finish()
    assert len(DatasetWriter(tmp_path / "d", info()).finish()) == 1


def test_an_unfinished_dataset_of_other_settings_or_another_tool_is_not_continued(tmp_path):
    DatasetWriter(tmp_path / "d", info())
    with pytest.raises(InputError, match="other settings"):
        DatasetWriter(tmp_path / "d", info(name="large"))
    (tmp_path / "e.partial").mkdir()
    (tmp_path / "e.partial" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="no unfinished dataset"):
        DatasetWriter(tmp_path / "e", info())


def test_an_output_that_holds_something_is_refused_and_an_empty_one_used(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(InputError, match="not empty"):
            DatasetWriter(tmp_path / name, info())
    (tmp_path / "empty").mkdir()
    assert len(written(tmp_path / "empty", 3)) == 3


def test_a_row_with_an_unknown_column_or_split_is_refused(tmp_path):
    writer = DatasetWriter(tmp_path / "d", info())
    with pytest.raises(InputError, match="height"):
        writer.add(row_of(0, height=3))
    with pytest.raises(InputError, match="train, validate, test"):
        writer.add(row_of(0, split="val"))
    with pytest.raises(InputError, match="no image"):
        writer.finish()


def test_directories_that_are_no_dataset_are_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="is not a directory"):
        RadiographDataset(tmp_path / "nowhere")
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(str(tmp_path / "other"))
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "dataset.json").write_text("[1]")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dataset.json").write_bytes(b"\xff{")
    for name in ("other", "list", "broken"):
        with pytest.raises(InputError, match="is not a selfray dataset"):
            RadiographDataset(tmp_path / name)


def test_a_newer_version_and_a_damaged_shard_are_refused(tmp_path):
    written(tmp_path / "d", 5)
    path = tmp_path / "d" / "dataset.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"version": FORMAT_VERSION + 1}))
    with pytest.raises(InputError, match="Update selfray"):
        RadiographDataset(tmp_path / "d")
    path.write_text(json.dumps(description))
    shard = tmp_path / "d" / "shard-00000.arrow"
    for content in (shard.read_bytes()[:300], b""):
        shard.write_bytes(content)
        with pytest.raises(InputError, match="missing or damaged"):
            RadiographDataset(tmp_path / "d")
    shard.unlink()
    with pytest.raises(InputError, match="missing or damaged"):
        RadiographDataset(tmp_path / "d")


def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_atomically(tmp_path / "taken", b"content")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
