"""What a user sees of a run while it goes: the bar, the alarm, TensorBoard."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
from micro_run import command_line, micro_config

from selfray.cli import main
from selfray.pretrain import CollapseAlarm
from selfray.pretrain import pretrain as run_pretrain
from selfray.run_directory import RunDirectory


def test_the_bar_shows_step_loss_images_a_second_and_the_time_that_is_left(
    micro_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    run = run_pretrain(micro_config(micro_data, steps=3), tmp_path / "run")
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    shown = capsys.readouterr().err.split("\r")[-1]
    assert re.search(r"100%.* step 3/3 \[\d\d:\d\d, \d\d:\d\d left, ", shown)
    assert f"loss {last['loss']:.3f}" in shown
    assert f"cosine {last['mean_cosine']:.2f}" in shown
    assert f"{last['images_per_second']:.0f} images/s" in shown


FINE, TWINS, UNIFORM = (0.5, 1.0), (0.995, 1.0), (0.5, math.log(16))


@pytest.mark.parametrize(
    ("streaks", "warnings"),
    [
        ([(FINE, 200)], []),
        ([(TWINS, 49), (FINE, 1), (TWINS, 49)], []),
        ([(TWINS, 200)], [(50, "mean cosine 0.995")]),
        ([(FINE, 10), (UNIFORM, 50)], [(60, "nearly uniform (2.77 of 2.77 nats)")]),
        ([(TWINS, 60), (FINE, 1), (TWINS, 60)], [(50, "mean cosine"), (111, "mean cosine")]),
    ],
    ids=str,
)
def test_a_collapse_is_warned_of_once_in_each_streak_of_50_steps(
    streaks: list[tuple[tuple[float, float], int]],
    warnings: list[tuple[int, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    alarm = CollapseAlarm(prototypes=16)
    values = [value for value, count in streaks for _ in range(count)]
    for step, (cosine, entropy) in enumerate(values, start=1):
        alarm.watch(step, {"mean_cosine": cosine, "teacher_entropy": entropy})
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == len(warnings)
    for line, (step, what) in zip(lines, warnings, strict=True):
        assert line.startswith(f"warning: step {step}: ")
        assert what in line
        assert "may be collapsing" in line


def test_without_tensorboard_its_option_is_refused_before_anything_is_written(
    micro_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = micro_config(micro_data, engine__tensorboard=True)
    assert main(command_line(config, tmp_path / "run")) == 2
    assert "Install selfray[tensorboard]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard_shows_the_numbers_of_the_metrics_also_after_a_resume(
    micro_data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = micro_config(micro_data, engine__tensorboard=True)
    for wrong, first in ((9.0, 1), (1.0, 3)):  # the second begins again at step 3
        run = RunDirectory(tmp_path / "run", config, ["f"], "auto")
        run.begin()
        run.truncate_metrics(first - 1)
        for step in range(first, 6):
            run.append({"kind": "step", "step": step, "loss": wrong + step})
        run._events.close()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("step/loss")
    assert [(e.step, e.value) for e in events] == [
        (record["step"], record["loss"]) for record in run.records()
    ]
    assert [e.value for e in events] == [10.0, 11.0, 4.0, 5.0, 6.0]
