"""What cannot be a run is refused with one line and exit code 2, and nothing is half written."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from micro_run import (
    command_line,
    in_child,
    micro_config,
    terminate,
    within_step,
    write_dataset,
)

from selfray import pretrain
from selfray.checkpoint import load_newest
from selfray.cli import main
from selfray.pretrain import pretrain as run_pretrain
from selfray.run_directory import RunDirectory


def _refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command line is refused."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert "Traceback" not in lines[0]
    return lines[0]


def test_data_named_twice_is_refused(
    micro_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command_line(micro_config(micro_data), tmp_path / "run")
    for again in (["--data", str(micro_data)], ["--data", str(micro_data), str(micro_data)]):
        assert "same dataset twice" in _refused([*words, *again], capsys)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"crops__global_size": 200}, ["crops.global_size is 200", "14", "Use 196 or 210"]),
        ({"crops__global_size": 84}, ["images of 56 pixels", "crops.global_size 84", "--size"]),
        ({"crops__local_size": 20}, ["crops.local_size is 20", "Use 14 or 28"]),
        ({"encoder__arch": "vit_bass"}, ["encoder.arch is 'vit_bass'", "'vit_base'"]),
        ({"init": "nowhere"}, ["nowhere"]),
        ({"batch_size": 10**10}, ["GiB of memory are free", "Lower batch_size"]),
        ({"crops__local_count": 10**9}, ["crops.local_count is 1000000000", "at most 64"]),
        ({"batch_size": 1}, ["koleo_weight needs at least 2"]),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_is_refused(
    micro_data: Path,
    tmp_path: Path,
    change: dict[str, Any],
    said: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    line = _refused(command_line(micro_config(micro_data, **change), run), capsys)
    for part in said:
        assert part in line
    assert not run.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain", "smal", "--data", "d", "--out", "r"], "Did you mean 'small'"),
        (["pretrain", "small", "--data", "d", "--out", "r", "--crops.flp", "1"], "--crops.flip"),
        (["pretrain", "small", "--data", "d", "--out", "r", "--resume", "maybe"], "must"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in _refused(words, capsys)


def _missing(path: Path) -> None:
    pass


def _empty(path: Path) -> None:
    path.mkdir()


def _pictures(path: Path) -> None:
    path.mkdir()
    cv2.imwrite(str(path / "a.png"), np.zeros((4, 4), np.uint8))


def _of_another_tool(path: Path) -> None:
    path.mkdir()
    (path / "dataset.json").write_text(json.dumps({"name": "nnU-Net", "modality": {"0": "CT"}}))
    (path / "state.json").write_text("{}")


def _without_training_images(path: Path) -> None:
    import micro_run

    splits, micro_run.SPLITS = micro_run.SPLITS, ("test",) * 24
    try:
        write_dataset(path)
    finally:
        micro_run.SPLITS = splits


@pytest.mark.parametrize(
    "make", [_missing, _empty, _pictures, _of_another_tool, _without_training_images]
)
def test_data_that_is_none_is_refused(
    make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "data")
    line = _refused(command_line(micro_config(tmp_path / "data"), tmp_path / "run"), capsys)
    assert "ingest" in line or "split 'train'" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "content", [{"notes.txt": "mine"}, {"config.json": "{}"}, {"config.json": '{"steps": 1}'}]
)
def test_an_output_directory_that_holds_something_else_is_left_alone(
    micro_data: Path,
    tmp_path: Path,
    content: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name, text in content.items():
        (run / name).write_text(text)
    line = _refused(command_line(micro_config(micro_data), run), capsys)
    assert "exists and is not a run directory" in line
    assert {path.name: path.read_text() for path in run.iterdir()} == content


def test_an_output_that_is_a_file_is_left_alone(
    micro_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("mine")
    line = _refused(command_line(micro_config(micro_data), tmp_path / "run"), capsys)
    assert "exists and is not a run directory" in line
    assert (tmp_path / "run").read_text() == "mine"


@pytest.mark.parametrize("room", ["for no checkpoint", "for no encoder"])
def test_a_full_disk_is_said_in_one_line_and_older_checkpoints_are_intact(
    micro_data: Path, tmp_path: Path, room: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    config = micro_config(micro_data, evaluate_every=4 if room == "for no encoder" else 0)
    half = micro_config(micro_data, evaluate_every=config.evaluate_every)

    def begin() -> None:
        within_step(2, terminate, pretrain, pytest.MonkeyPatch())
        run_pretrain(half, run)

    def go_on_with_little_room() -> None:
        most = 60_000 if room == "for no encoder" else 100_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        raise SystemExit(main(command_line(config, run)))

    in_child(begin if room == "for no checkpoint" else lambda: None)
    before = load_newest(run / "checkpoints")[0]
    capfd.readouterr()
    assert in_child(go_on_with_little_room) == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "could not be written" in last
    assert "make room" in last
    after = load_newest(run / "checkpoints")[0]
    if before is None:
        assert after is None
    else:
        assert after is not None
        assert after.step == before.step == 2
    assert run_pretrain(config, run) == run
    assert (run / "DONE").exists()


def test_a_line_of_metrics_for_which_there_is_no_room_is_said_in_one_line(
    micro_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, config = tmp_path / "run", micro_config(micro_data, steps=2)
    original = RunDirectory.truncate_metrics

    def truncate(self: RunDirectory, step: int) -> None:
        original(self, step)
        self.metrics.unlink()
        self.metrics.symlink_to("/dev/full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "truncate_metrics", truncate)
        assert main(command_line(config, run)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{run} could not be written to ([Errno 28] No space left" in last
    assert "make room there, then repeat the command" in last
    (run / "metrics.jsonl").unlink()
    assert main(command_line(config, run)) == 0


def test_a_guard_without_findings_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", findings=()).directory
    config = micro_config(data, evaluate_every=4, guard=0.1)
    assert "guard needs findings" in _refused(command_line(config, tmp_path / "run"), capsys)


def test_the_config_of_a_run_is_what_ran(micro_data: Path, tmp_path: Path) -> None:
    config = micro_config(micro_data, steps=1)
    run = run_pretrain(config, tmp_path / "run")
    saved = json.loads((run / "config.json").read_text())
    assert saved == json.loads(json.dumps(asdict(config)))
    environment = json.loads((run / "environment.json").read_text())
    assert {"torch", "python", "command", "git_commit", "data_fingerprints"} <= set(environment)
