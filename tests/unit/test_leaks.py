"""What makes results too good is found and named, and where nothing is wrong nothing is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted_copies import EDITS, copies, phantom_rows, write_rows

from selfray.data import dataset as dataset_module
from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.evals.near_duplicates import pixel_sha256
from selfray.evaluate.leaks import (
    KnownTraining,
    find_leaks,
    pretraining_fingerprints,
    read_training_list,
)


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return phantom_rows(40)


@pytest.fixture(scope="module")
def clean(rows, tmp_path_factory) -> RadiographDataset:
    return write_rows(tmp_path_factory.mktemp("clean") / "d", rows)


def alike(count: int) -> np.ndarray:
    """Features by which each image has others at a cosine of 0.99 and more, also after centring."""
    rng = np.random.default_rng(0)
    sign = np.where(rng.random(count) < 0.5, 1.0, -1.0)
    return (50 + sign[:, None] + 0.01 * rng.standard_normal((count, 16))).astype(np.float32)


def test_a_dataset_without_leaks_gives_none_even_by_features_that_are_all_alike(clean):
    assert all(len(clean.rows(split)) > 3 for split in ("train", "test", "validate"))
    assert find_leaks(clean, {"alike": alike(len(clean))}, {}, threads=2) == []


def test_each_planted_copy_is_found_and_named_by_its_image_id(rows, tmp_path):
    planted = copies(rows, EDITS)
    dataset = write_rows(tmp_path / "d", rows + planted)
    same, edited = find_leaks(dataset, {}, {})
    assert (same.kind, same.splits, same.count) == ("same image", ("test", "train"), 1)
    assert same.image_ids == ("exact",) and same.encoder is None
    assert edited.kind == "near duplicate"
    assert set(edited.image_ids) == set(EDITS) - {"exact"} and edited.count == len(EDITS) - 1
    total = len(dataset.rows("test"))
    assert (
        edited.sentence == f"7 of {total} images of test are an edited copy of an image in train."
    )
    assert not any(row["patient_id"] in leak.sentence for leak in (same, edited) for row in planted)


def test_a_crop_that_hashes_miss_is_found_by_an_encoder_that_sees_through_it(rows, tmp_path):
    crop = {"cropped by 5 %": lambda pixels: pixels[6:, 6:]}
    dataset = write_rows(tmp_path / "d", rows + copies(rows, crop))
    assert find_leaks(dataset, {}, {}) == []
    features = np.random.default_rng(0).standard_normal((len(dataset), 32))
    original = int(np.flatnonzero(dataset.column("split") == "train")[0])
    features[-1] = features[original] + 0.01
    [leak] = find_leaks(dataset, {"ours": features}, {})
    assert (leak.kind, leak.image_ids, leak.encoder) == (
        "near duplicate",
        ("cropped by 5 %",),
        None,
    )
    assert leak.sentence.endswith("found by features of ours.")


def test_a_patient_and_a_study_in_two_splits_are_found_in_datasets_made_elsewhere(
    rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset_module, "_require_one_split_per_patient", lambda *_: None)
    train, test = (
        next(row for row in rows if row["split"] == split) for split in ("train", "test")
    )
    again = {"patient_id": train["patient_id"], "study_id": "another", "image_id": "again"}
    study = {"patient_id": "another", "study_id": train["study_id"], "image_id": "study"}
    changed = [test | again, test | study, *(row for row in rows if row is not test)]
    leaks = find_leaks(write_rows(tmp_path / "d", changed), {}, {})
    found = {(leak.kind, leak.image_ids) for leak in leaks}
    assert found == {("same patient", ("again",)), ("same study", ("study",))}
    assert not any(train["patient_id"] in leak.sentence for leak in leaks)


def test_a_training_list_that_holds_test_images_is_found_by_id_file_or_pixels(clean, tmp_path):
    test = clean.rows("test")
    ids, files = clean.column("image_id"), clean.column("source_file")
    lines = [ids[test[0]], files[test[1]], pixel_sha256(clean.pixels(int(test[2])))]
    lines += ["", "elsewhere", ids[clean.rows("train")[0]]]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(lines) + "\n")
    known = KnownTraining(listed=read_training_list(path))
    [leak] = find_leaks(clean, {}, {"theirs": known, "other": KnownTraining()})
    assert (leak.kind, leak.encoder, leak.splits) == ("training list", "theirs", ("test",))
    assert leak.image_ids == tuple(ids[row] for row in test[:3])
    assert leak.sentence == (
        f"3 of {len(test)} images of test are in the list of what theirs was trained on."
    )


def test_training_data_that_the_dataset_names_and_runs_on_the_same_data_are_told(
    rows, clean, tmp_path
):
    named = write_rows(tmp_path / "d", rows[:9], name="nih-official")
    known = {"rad-dino": KnownTraining(datasets=("NIH ChestX-ray14", "CheXpert"))}
    [leak] = find_leaks(named, {}, known)
    assert (leak.kind, leak.encoder) == ("training data", "rad-dino")
    assert "rad-dino was trained on NIH ChestX-ray14, which" in leak.sentence
    assert find_leaks(clean, {}, known) == []
    [mild] = find_leaks(clean, {}, {"run": KnownTraining(fingerprints=("0", clean.fingerprint))})
    assert (mild.kind, mild.splits) == ("pre-training", ("train",))
    assert "it saw no test image" in mild.sentence


def test_a_run_tells_its_data_and_that_of_the_run_that_it_began_from(tmp_path):
    for name, init, prints in (
        ("first", "", ["a"]),
        ("second", str(tmp_path / "first"), ["b"]),
        ("circle", str(tmp_path / "circle"), ["c"]),
        ("shipped", "selfray/phantom", ["d"]),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"init": init}))
        environment = json.dumps({"data_fingerprints": prints})
        (tmp_path / name / "environment.json").write_text(environment)
    assert pretraining_fingerprints(str(tmp_path / "second")) == ("b", "a")
    assert pretraining_fingerprints(str(tmp_path / "circle")) == ("c",)
    assert pretraining_fingerprints(str(tmp_path / "shipped")) == ("d",)
    (tmp_path / "first" / "environment.json").write_text("{")
    assert pretraining_fingerprints(str(tmp_path / "first")) == ()
    assert pretraining_fingerprints("random:vit_pico/16@128") == ()


def test_features_of_another_dataset_are_refused(clean):
    with pytest.raises(InputError, match=r"^ours: features of 3 images, and .* has \d+\. Extract"):
        find_leaks(clean, {"ours": np.zeros((3, 8))}, {})


def test_a_training_list_that_is_empty_or_no_text_is_refused(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("empty.txt", "is empty. Give one image_id"),
        ("binary.txt", "is no text in UTF-8"),
        ("missing.txt", "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_training_list(tmp_path / name)
