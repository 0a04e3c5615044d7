"""A run that is stopped, killed or damaged ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from micro_run import (
    command_line,
    in_child,
    micro_config,
    records,
    terminate,
    within_step,
    write_dataset,
)

from selfray import checkpoint, pretrain, run_directory
from selfray.cli import main
from selfray.config import PretrainConfig
from selfray.errors import InputError, Interrupted
from selfray.models import encoder_directory
from selfray.pretrain import pretrain as run_pretrain
from selfray.run_directory import RunDirectory


@pytest.fixture(scope="module")
def config(micro_data: Path) -> PretrainConfig:
    return micro_config(micro_data, evaluate_every=4)


@pytest.fixture(scope="module")
def whole(config: PretrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    return run_pretrain(config, tmp_path_factory.mktemp("runs") / "whole")


def _checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def _assert_same_end(run: Path, whole: Path) -> None:
    last = Path("checkpoints") / "step_00000008" / "tensors.safetensors"
    for file in (last, Path("encoder/model.safetensors"), Path("encoder/dino_head.safetensors"),
                 Path("DONE"), Path("checkpoints/best.json")):  # fmt: skip
        assert (run / file).read_bytes() == (whole / file).read_bytes(), file
    assert records(run) == records(whole)
    assert [r["step"] for r in records(run) if r["kind"] == "step"] == list(range(1, 9))
    assert [r["step"] for r in records(run) if r["kind"] == "probe"] == [0, 4, 8]
    left = [path for path in run.rglob("*") if path.name.endswith((".partial", ".old"))]
    assert not left


def test_the_same_config_gives_the_same_run_twice(
    config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    _assert_same_end(run_pretrain(config, tmp_path / "run"), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_130_and_the_same_command_resumes(
    config: PretrainConfig,
    whole: Path,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command_line(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        within_step(5, lambda: os.kill(os.getpid(), number), pretrain, patch)
        assert main(words) == 130
    assert "stopped at step 5, state saved" in capsys.readouterr().err
    assert _checkpoints(tmp_path / "run")[-1] == "step_00000005"
    assert not (tmp_path / "run" / "DONE").exists()
    assert main(words) == 0
    assert "resuming" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints" / "step_00000005").joinpath("checkpoint.json").unlink()
    _assert_same_end(tmp_path / "run", whole)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _in_the_middle_of_a_checkpoint(patch: pytest.MonkeyPatch) -> None:
    saves = iter(range(1, 99))
    original = checkpoint.save_file

    def save_half(tensors: Any, file: Path) -> None:
        original(tensors, file)
        if next(saves) == 3:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
            _die()

    patch.setattr(checkpoint, "save_file", save_half)


def _before_a_checkpoint_gets_its_name(patch: pytest.MonkeyPatch) -> None:
    original = checkpoint.write_atomically

    def write(file: Path, content: bytes) -> None:
        original(file, content)
        if "step_00000004" in str(file):
            _die()

    patch.setattr(checkpoint, "write_atomically", write)


def _in_the_first_checkpoint(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "save_file", lambda tensors, file: (file.write_bytes(b"x"), _die()))


def _in_the_middle_of_a_line_of_metrics(patch: pytest.MonkeyPatch) -> None:
    original = RunDirectory.append

    def append(self: RunDirectory, record: dict[str, Any]) -> None:
        if record["step"] == 5:
            with self.metrics.open("a") as file:
                file.write('{"kind": "step", "step": 5, "lo')
            _die()
        original(self, record)

    patch.setattr(RunDirectory, "append", append)


def _while_the_run_directory_is_made(patch: pytest.MonkeyPatch) -> None:
    original = run_directory.write_atomically

    def write(file: Path, content: bytes) -> None:
        if file.name == "config.json":
            file.with_name(".config.json.partial").write_bytes(content[:20])
            _die()
        original(file, content)

    patch.setattr(run_directory, "write_atomically", write)


def _while_the_encoder_is_exported(patch: pytest.MonkeyPatch) -> None:
    original = encoder_directory.replace_directory
    exports = iter(range(1, 99))

    def replace(directory: Path, new: Path) -> None:
        if next(exports) == 1:
            _die()
        original(directory, new)

    patch.setattr(encoder_directory, "replace_directory", replace)


def _just_before_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RunDirectory, "finish", lambda self, why: _die())


@pytest.mark.parametrize(
    "moment",
    [
        _while_the_run_directory_is_made,
        _while_the_encoder_is_exported,
        _in_the_first_checkpoint,
        _in_the_middle_of_a_checkpoint,
        _before_a_checkpoint_gets_its_name,
        _in_the_middle_of_a_line_of_metrics,
        _just_before_done,
    ],
)
def test_a_run_killed_at_any_moment_ends_bit_for_bit_the_same(
    config: PretrainConfig,
    whole: Path,
    moment: Callable[[pytest.MonkeyPatch], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"

    def doomed() -> None:
        moment(monkeypatch)
        run_pretrain(config, run)

    assert in_child(doomed) == -signal.SIGKILL
    _assert_same_end(run_pretrain(config, run), whole)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    config: PretrainConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        within_step(7, terminate, pretrain, patch)
        run_pretrain(config, run)
    tensors = run / "checkpoints" / "step_00000007" / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-100] ^= 1
    tensors.write_bytes(content)
    run_pretrain(config, run)
    said = capsys.readouterr().err
    assert "step_00000007 is damaged" in said
    assert "at step 6" in said
    _assert_same_end(run, whole)


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_again(
    config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = _copy_unfinished(whole, tmp_path)
    for path in (run / "checkpoints").glob("step_*/tensors.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        run_pretrain(config, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def _copy_unfinished(whole: Path, tmp_path: Path) -> Path:
    import shutil

    run = Path(shutil.copytree(whole, tmp_path / "copy"))
    (run / "DONE").unlink()
    return run


def test_a_finished_run_says_so_and_changes_nothing(
    config: PretrainConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert main(command_line(config, whole)) == 0
    assert "is finished (8 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before


def test_must_never_begins(config: PretrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"--resume must: .* has no checkpoint"):
        run_pretrain(config, run, resume="must")
    assert not run.exists()


def test_must_resumes_a_run_that_has_a_checkpoint(
    config: PretrainConfig, whole: Path, tmp_path: Path
) -> None:
    run = _copy_unfinished(whole, tmp_path)
    _assert_same_end(run_pretrain(config, run, resume="must"), whole)


def test_never_does_not_resume(config: PretrainConfig, whole: Path, tmp_path: Path) -> None:
    run = _copy_unfinished(whole, tmp_path)
    with pytest.raises(InputError, match=r"--resume never: .* holds a run"):
        run_pretrain(config, run, resume="never")


def test_a_changed_config_is_refused_and_the_fields_are_named(
    config: PretrainConfig, whole: Path, micro_data: Path, tmp_path: Path
) -> None:
    run = _copy_unfinished(whole, tmp_path)
    changed = micro_config(micro_data, evaluate_every=4, steps=9, crops__flip=0.25)
    with pytest.raises(InputError, match=r"steps: 8 -> 9; crops.flip: 0.5 -> 0.25"):
        run_pretrain(changed, run)


def test_changed_data_is_refused_but_moved_data_is_not(whole: Path, tmp_path: Path) -> None:
    run = _copy_unfinished(whole, tmp_path)
    other = write_dataset(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match="was begun on other data"):
        run_pretrain(micro_config(other.directory, evaluate_every=4), run)
    moved = write_dataset(tmp_path / "moved")
    _assert_same_end(run_pretrain(micro_config(moved.directory, evaluate_every=4), run), whole)


def test_the_first_checkpoint_is_read_back_at_step_1(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.save_file

    def lose_a_bit(tensors: Any, file: Path) -> None:
        original(tensors, file)
        hashes.append(file)

    hashes: list[Path] = []
    sha256 = checkpoint._sha256
    monkeypatch.setattr(checkpoint, "save_file", lose_a_bit)
    # The medium gives back something else than was written: the hash of writing does not fit.
    monkeypatch.setattr(
        checkpoint, "_sha256", lambda file: "0" * 64 if "partial" in str(file) else sha256(file)
    )
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged"):
        run_pretrain(config, tmp_path / "run")
    assert [file.parent.name for file in hashes] == [".step_00000001.partial"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_command_line_with_130_and_one_line(
    micro_data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    config = micro_config(micro_data, encoder__arch="vit_nano", steps=10_000)
    command = [sys.executable, "-m", "selfray", *command_line(config, tmp_path / "run")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not _checkpoints(tmp_path / "run") and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(number)
        _, said = process.communicate()
    assert process.returncode == 130
    last = int(_checkpoints(tmp_path / "run")[-1].removeprefix("step_"))
    assert said.splitlines()[-1] == (
        f"selfray pretrain: stopped at step {last}, state saved; the same command resumes"
    )
    assert records(tmp_path / "run")[-1]["step"] == last


@pytest.mark.slow
def test_killed_again_and_again_at_any_time_the_command_line_ends_the_same(
    micro_data: Path, tmp_path: Path
) -> None:
    config = micro_config(micro_data, encoder__arch="vit_nano", steps=60, keep_checkpoints=3)
    whole, run = tmp_path / "whole", tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "selfray", *command_line(config, out)]

    began = time.monotonic()
    subprocess.run(command(whole), env=environment, check=True)
    took = time.monotonic() - began
    for attempt in range(12):
        process = subprocess.Popen(command(run), env=environment)
        try:
            process.wait(timeout=took * (0.3 + 0.05 * attempt))
        except subprocess.TimeoutExpired:
            process.send_signal((signal.SIGKILL, signal.SIGTERM)[attempt % 2])
            assert process.wait() in {-signal.SIGKILL, -signal.SIGTERM, 130}
    subprocess.run(command(run), env=environment, check=True)
    last = "checkpoints/step_00000060/tensors.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()
    assert records(run) == records(whole)
