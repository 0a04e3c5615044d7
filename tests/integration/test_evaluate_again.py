"""One evaluation written over another: what differs is said, and no page shows other results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from selfray.cli import main
from selfray.data.dataset import DatasetInfo, DatasetWriter, encode_png

SPLITS = ("train", "validate", "test")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finding brightens a corner, in 25 patients of each split."""
    out = tmp_path_factory.mktemp("data") / "planted"
    writer = DatasetWriter(
        out, DatasetInfo("planted", "test", "MIT", True, ("effusion",), (), "8 bit")
    )
    noise = np.random.default_rng(5)
    for patient in range(75):
        finding = patient // 3 % 2
        pixels = noise.normal(100, 10, (32, 32))
        pixels[:12, :12] += 20 * finding
        writer.add(
            {"image": encode_png(pixels.clip(0, 255).astype(np.uint8)), "image_id": f"i{patient}",
             "patient_id": f"p{patient}", "study_id": f"s{patient}", "split": SPLITS[patient % 3],
             "sex": "FM"[patient // 6 % 2], "age_years": 40.0 + patient, "effusion": finding}
        )  # fmt: skip
    writer.finish()
    return out


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation with its page."""
    out = tmp_path_factory.mktemp("evaluation") / "e"
    assert main(command(data, out)) == 0
    assert main(["summary", str(out)]) == 0
    return out


def command(data: Path, out: Path, *options: str) -> list[str]:
    words = ["evaluate", "pixels:16x16", "--data", str(data), "--out", str(out)]
    return [*words, "--probes", "linear", *options]


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Lines about what was there before."""
    lines = capsys.readouterr().err.splitlines()
    return [line for line in lines if "held an evaluation" in line or "removed" in line]


def test_other_options_are_named_and_the_page_of_the_results_before_is_removed(
    data, finished, tmp_path, capsys
):
    out = shutil.copytree(finished, tmp_path / "e")
    assert main(command(data, out, "--seed", "3", "--tasks", "classification")) == 0
    other, removed = said(capsys)
    assert other == (
        f"evaluate: {out} held an evaluation with other options (--tasks, --seed): its results "
        "will be replaced; parts that still hold are taken over"
    )
    assert removed.startswith(f"evaluate: removed {out}/summary.html, ")
    assert not (out / "summary.html").exists()
    assert json.loads((out / "results.jsonl").read_text().splitlines()[0])["seed"] == 3


def test_another_encoder_and_joined_evaluations_are_other_options_too(
    data, finished, tmp_path, capsys
):
    out = shutil.copytree(finished, tmp_path / "e")
    other = command(data, tmp_path / "other")
    other[1] = "pixels:pca"
    assert main(other) == 0
    assert not said(capsys)  # a new directory
    joining = ["evaluate", "--compare", str(finished), str(tmp_path / "other"), "--out", str(out)]
    assert main(joining) == 0
    assert "(--compare, encoders, --tasks, --probes, --seed, --decoders)" in said(capsys)[0]


def test_the_same_command_says_nothing_and_leaves_the_page(data, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "e")
    moved = shutil.copytree(data, tmp_path / "moved")
    before = (finished / "summary.html").read_bytes()
    # The command in evaluation.json names the directories, which a page shows.
    assert main(command(data, finished)) == 0
    assert not said(capsys)
    assert (finished / "summary.html").read_bytes() == before
    assert main(command(moved, out)) == 0
    assert [line for line in said(capsys) if "held" in line] == []


def test_a_page_that_selfray_did_not_write_is_left_alone(data, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "e")
    (out / "summary.html").write_text("<h1>My own</h1>")
    assert main(command(data, out, "--seed", "3")) == 0
    assert len(said(capsys)) == 1
    assert (out / "summary.html").read_text() == "<h1>My own</h1>"


def test_an_evaluation_whose_options_cannot_be_read_is_said_so(data, finished, tmp_path, capsys):
    out = shutil.copytree(finished, tmp_path / "e")
    (out / "evaluation.json").write_text("{}")
    assert main(command(data, out)) == 0
    assert "with options that cannot be read: its results" in said(capsys)[0]
