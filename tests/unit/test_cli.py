"""The command line: what it accepts, and how it says what is wrong."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from selfray import cli
from selfray.cli import COMMANDS, main, parse
from selfray.config import ContrastiveConfig, PretrainConfig
from selfray.errors import InputError, Interrupted, RunStopped
from selfray.recipes import RECIPES

PRETRAIN = ["pretrain", "demo", "--data", "d", "--out", "r"]


def _config(*words: str) -> PretrainConfig:
    return parse([*PRETRAIN, *words])[1].config


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_without_options_is_the_recipe(name: str) -> None:
    config = parse(["pretrain", name, "--data", "d", "--out", "r"])[1].config
    assert config == dataclasses.replace(RECIPES[name](), data=("d",))


def test_options_replace_fields_and_nothing_else() -> None:
    words = "--steps 7 --crops.global-size 128 --heads.batch-norm false --loss.centering centering"
    changed = _config(*words.split(), "--teacher.momentum", "0.5", "1")
    recipe = RECIPES["demo"]()
    assert changed == dataclasses.replace(
        recipe,
        data=("d",),
        steps=7,
        crops=dataclasses.replace(recipe.crops, global_size=128),
        heads=dataclasses.replace(recipe.heads, batch_norm=False),
        loss=dataclasses.replace(recipe.loss, centering="centering"),
        teacher=dataclasses.replace(recipe.teacher, momentum=(0.5, 1.0)),
    )


def test_every_field_of_the_config_has_an_option() -> None:
    def names(kind: type, prefix: str = "") -> set[str]:
        found: set[str] = set()
        for field in dataclasses.fields(kind):
            default = field.default
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                found |= names(type(default), f"{prefix}{field.name}.")
            else:
                found.add(f"--{prefix}{field.name}".replace("_", "-"))
        return found

    text = cli.command_parser("pretrain").format_help()
    options = {word for word in text.split() if word.startswith("--")}
    assert (names(PretrainConfig) | names(ContrastiveConfig)) - options == {"--recipe"}
    text = cli.command_parser("pretrain", ["clip-demo"]).format_help()
    options = {word for word in text.split() if word.startswith("--")}
    assert names(ContrastiveConfig) - options == {"--recipe"}
    assert not (names(PretrainConfig) - names(ContrastiveConfig)) & options


def test_help_shows_the_values_of_the_recipe_that_is_named() -> None:
    demo = RECIPES["demo"]()
    shown = cli.command_parser("pretrain", ["demo"]).format_help()
    assert f"optimizer steps ({demo.steps})" in shown
    everything = cli.command_parser("pretrain").format_help()
    assert f"optimizer steps (demo, clip-demo, siglip-demo: {demo.steps}; small, " in everything


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["featurs"], "Did you mean 'features'?"),
        ([], "no command given"),
        (["--verbose"], "no option --verbose"),
        (["pretrain", "dmeo", "--data", "d"], "Did you mean 'demo'?"),
        ([*PRETRAIN, "--crops.global-sise", "3"], "Did you mean --crops.global-size?"),
        ([*PRETRAIN, "--global-size=3"], "Did you mean --crops.global-size?"),
        ([*PRETRAIN, "--steps", "many"], "--steps"),
        ([*PRETRAIN, "--steps", "0"], "steps is 0. It must be more than 0."),
        ([*PRETRAIN, "--crops.global-size", "113"], "Use 112 or 128."),
        ([*PRETRAIN, "--engine.precision", "bfloat"], "Did you mean 'bfloat16'?"),
        ([*PRETRAIN, "--heads.batch-norm", "yes"], "Allowed: false, true."),
        ([*PRETRAIN, "--resume", "mst"], "Did you mean 'must'?"),
        (["pretrain", "demo"], "--data"),
        (["pretrain", "demo", "--data", "d"], "--out RUN is missing"),
        (["summary", "a", "b"], "one argument too many: 'b'"),
        (["evaluate", "random:vit_nano", "--data", "d"], "--out"),
        (["ingest", "a"], "OUT"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    assert err.startswith(
        f"selfray {words[0]}: " if words and words[0] in COMMANDS else "selfray: "
    )
    assert told in err


def _failing_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> list[str]:
        raise error

    broken = dataclasses.replace(COMMANDS["encoders"], run=fail)
    monkeypatch.setitem(COMMANDS, "encoders", broken)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("data: one\ntwo"), 2, "selfray encoders: data: one two\n"),
        (RunStopped("not finite"), 1, "selfray encoders: not finite\n"),
        (Interrupted("saved at step 3"), 130, "selfray encoders: saved at step 3\n"),
        (KeyboardInterrupt(), 130, "selfray encoders: interrupted\n"),
        (OSError(28, "No space left on device", "run/x"), 2,
         "selfray encoders: run/x: No space left on device. Make room there, then repeat the "
         "command.\n"),
        (OSError(errno.EISDIR, "Is a directory", ".d.partial", None, "d"), 2,
         "selfray encoders: d: Is a directory. A folder stands where a file must be: give the path "
         "of a file.\n"),
        (OSError(errno.ENOTEMPTY, "Directory not empty", "d"), 2,
         "selfray encoders: d: Directory not empty. Give an empty folder, or a path where nothing "
         "is yet.\n"),
        (OSError(errno.EPERM, "Operation not permitted", "d"), 2,
         "selfray encoders: d: Operation not permitted. Give a path to which you have the rights."
         "\n"),
    ],
)  # fmt: skip
def test_how_a_command_ends_decides_the_exit_code(
    error: BaseException,
    code: int,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _failing_with(error, monkeypatch)
    assert main(["encoders"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize(
    ("place", "advice"),
    [("file/x", "A file stands where"), ("nowhere/x", "Give a path in a folder that exists")],
)
def test_a_place_that_cannot_be_written_is_named(
    place: str,
    advice: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / place

    def write(arguments: object) -> list[str]:
        path.write_text("")
        return []

    monkeypatch.setitem(COMMANDS, "encoders", dataclasses.replace(COMMANDS["encoders"], run=write))
    assert main(["encoders"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"selfray encoders: {path}: ") and advice in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("defect", [ZeroDivisionError("a defect"), OSError(errno.ENOENT, "gone")])
def test_a_defect_keeps_its_traceback(defect: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    _failing_with(defect, monkeypatch)
    with pytest.raises(type(defect)):
        main(["encoders"])


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_causes_no_complaint(unbuffered: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "selfray", "--help"],
        stdout=writing,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        text=True,
        check=False,
    )
    os.close(writing)
    assert done.stderr == ""


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["--version"])
    assert ending.value.code == 0
    assert capsys.readouterr().out.split()[0] == "selfray"
