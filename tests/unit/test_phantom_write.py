"""`write_phantom`: the directory, its determinism, and what happens when it is interrupted."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from selfray.data.dataset import DatasetWriter, RadiographDataset
from selfray.data.phantom import write, write_phantom
from selfray.data.phantom.findings import FINDINGS
from selfray.data.phantom.patients import metadata, plan_patient
from selfray.errors import InputError


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    return write_phantom(tmp_path_factory.mktemp("phantom") / "out", patients=10, size=48, seed=1)


def test_phantom_is_a_dataset_that_says_it_is_synthetic(phantom):
    description = json.loads((phantom.directory / "dataset.json").read_text())
    assert description["synthetic"] is True
    assert description["origin"] == "synthetic phantom"
    assert description["licence"] == "MIT (synthetic)"
    assert phantom.findings == FINDINGS
    assert description["counts"]["patients"] == 10


def test_every_row_has_pixels_masks_and_a_report(phantom):
    for row in range(len(phantom)):
        pixels = phantom.pixels(row)
        assert pixels.shape == (48, 48)
        assert pixels.std() > 20
        masks = phantom.masks(row)
        assert masks.shape == (11, 48, 48)
        assert masks[0].any()
        assert phantom.masks(row, "finding_mask").shape == (len(FINDINGS), 48, 48)
    assert all(phantom.column("report"))
    assert np.isin(phantom.labels(), (0, 1)).all()


def test_patients_are_in_one_split_and_studies_in_one_site(phantom):
    for column in ("split", "site"):
        pairs = set(zip(phantom.column("patient_id"), phantom.column(column), strict=True))
        assert len(pairs) == 10


def test_bmi_is_weight_over_height_squared_and_a_few_fields_are_unknown():
    patients = [plan_patient(0, number, ("A",)) for number in range(500)]
    described = [metadata(patient) for patient in patients]
    for name in ("sex", "age_years", "weight_kg", "bmi"):
        assert 0.02 < np.mean([d[name] is None for d in described]) < 0.09
    for patient, d in zip(patients, described, strict=True):
        if d["weight_kg"] is not None and d["bmi"] is not None:
            height = patient.traits.height / 100
            assert d["bmi"] == pytest.approx(d["weight_kg"] / height**2, abs=0.1)


def test_contact_sheet_lies_beside_the_data(phantom):
    sheet = cv2.imread(str(phantom.directory / "contact_sheet.png"))
    assert sheet is not None
    assert min(sheet.shape[:2]) > 500


def test_number_of_workers_does_not_matter(tmp_path, phantom, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    alone = write_phantom(tmp_path / "alone", patients=10, size=48, seed=1)
    assert alone.fingerprint == phantom.fingerprint


def test_interrupted_phantom_resumes_to_the_same_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "ROWS_PER_SHARD", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    whole = write_phantom(tmp_path / "whole", patients=7, size=32, seed=2)
    add, added = DatasetWriter.add, []

    def interrupted(self, row):
        if len(added) == 8:
            raise KeyboardInterrupt
        added.append(row)
        add(self, row)

    monkeypatch.setattr(DatasetWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantom(tmp_path / "out", patients=7, size=32, seed=2)
    monkeypatch.setattr(DatasetWriter, "add", add)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(InputError, match="other settings"):
        write_phantom(tmp_path / "out", patients=7, size=32, seed=3)
    resumed = write_phantom(tmp_path / "out", patients=7, size=32, seed=2)
    assert resumed.fingerprint == whole.fingerprint
    assert not (tmp_path / "out.partial").exists()
    ids = RadiographDataset(tmp_path / "out").column("image_id")
    assert len(set(ids)) == len(ids) == len(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": 0}, "^patients is 0"),
        ({"size": 31}, "^size is 31"),
        ({"size": 2049}, "size is 2049"),
        ({"seed": -1}, "^seed is -1"),
        ({"sites": ("A", "E")}, "^site 'E' is unknown"),
        ({"sites": ("A", "B", "A")}, "^site 'A' is given 2 times"),
        ({"sites": ()}, "^no site"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        write_phantom(tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_with_content_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        write_phantom(tmp_path / "out", patients=1, size=32)


@pytest.mark.slow
def test_thumbnails_do_not_give_the_labels_away(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "phantom_giveaway.py"
    spec = importlib.util.spec_from_file_location("phantom_giveaway", path)
    assert spec is not None
    assert spec.loader is not None
    giveaway = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(giveaway)
    measured = giveaway.measure(write_phantom(tmp_path / "out", patients=1500, size=64))
    assert measured["sex"] <= giveaway.SEX_LIMIT
    for name in FINDINGS:
        assert measured[name] <= giveaway.FINDING_LIMIT, name


def test_drawing_processes_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    words = "import sys; from selfray.cli import main; main(sys.argv[1:])"
    parent = subprocess.Popen(
        [sys.executable, "-c", words, "phantom", str(tmp_path / "p"),
         "--patients", "9000", "--size", "32"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    partial = tmp_path / "p.partial"
    while parent.poll() is None and not list(partial.glob("shard-*")):
        time.sleep(0.1)
    parent.kill()
    # The pipe ends when the last process that has it is gone; the others look once a second.
    assert parent.communicate(timeout=30)[0] == b""
