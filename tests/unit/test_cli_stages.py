"""Each command calls its stage with what was typed; the stages' signatures are the real ones."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest

from selfray.cli import main


def _replaced(where: str, name: str, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """A stand-in that refuses arguments which the stage does not take."""
    module = importlib.import_module(where)
    stand_in = create_autospec(getattr(module, name))
    monkeypatch.setattr(module, name, stand_in)
    return stand_in


CALLS: list[tuple[str, str, str, dict[str, Any]]] = [
    (
        "phantom d --patients 3 --size 64 --seed 5 --sites B D",
        "selfray.data.phantom",
        "write_phantom",
        {"out": Path("d"), "patients": 3, "size": 64, "seed": 5, "sites": ("B", "D")},
    ),
    (
        "ingest s d --size 64 --table t.csv --key-file k --licence CC0",
        "selfray.data.ingest",
        "ingest",
        {"source": Path("s"), "out": Path("d"), "size": 64, "intensity": "minmax",
         "table": Path("t.csv"), "key_file": Path("k"), "licence": "CC0"},
    ),
    (
        "features random:vit_nano --data d --out f --batch-size 4 --patch-tokens",
        "selfray.features",
        "extract_features",
        {"encoder": "random:vit_nano", "data": Path("d"), "out": Path("f"), "batch_size": 4,
         "patch_tokens": True, "precision": "exact", "backend": "auto"},
    ),
    (
        "features a --data d --out f --precision int8 --backend openvino",
        "selfray.features",
        "extract_features",
        {"encoder": "a", "data": Path("d"), "out": Path("f"), "batch_size": None,
         "patch_tokens": False, "precision": "int8", "backend": "openvino"},
    ),
    (
        "export a --to onnx --out o",
        "selfray.export.stage",
        "export_encoder",
        {"name": "a", "to": "onnx", "out": Path("o")},
    ),
    (
        "evaluate a b --data d --out e --tasks metadata --probes sgd linear --columns view site "
        "--sites --probe-seeds 2 --training-list a t --baseline b --seed 3",
        "selfray.evaluate",
        "evaluate",
        {"encoders": ["a", "b"], "data": Path("d"), "out": Path("e"), "tasks": ["metadata"],
         "probes": ["sgd", "linear"], "columns": ["view", "site"], "label_efficiency": False,
         "sites": True, "probe_seeds": 2, "decoders": ("linear",), "preset": None,
         "labels": (), "decoder_steps": None, "segmentation_size": None,
         "report": None,
         "training_lists": [("a", Path("t"))], "baseline": "b", "seed": 3},
    ),
    (
        "evaluate --compare d e --out f --baseline b",
        "selfray.evaluate",
        "compare",
        {"evaluations": [Path("d"), Path("e")], "out": Path("f"), "baseline": "b"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("line", "where", "name", "expected"), CALLS)
def test_a_command_calls_its_stage_with_what_was_typed(
    line: str,
    where: str,
    name: str,
    expected: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = _replaced(where, name, monkeypatch)
    if name in ("evaluate", "compare"):
        _replaced(where, "results_table", monkeypatch).return_value = "the table"
    assert main(shlex.split(line)) == 0
    positional, named = stage.call_args
    parameters = list(stage.__signature__.parameters)
    assert dict(zip(parameters, positional, strict=False)) | named == expected
    assert capsys.readouterr().out.endswith(f"wrote {expected['out']}\n")


def test_pretrain_passes_config_directory_and_whether_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = _replaced("selfray.pretrain", "pretrain", monkeypatch)
    words = "pretrain demo --data d e --out r --init x --guard 0.02 --resume must --steps 5"
    assert main(words.split()) == 0
    (config, out), named = stage.call_args
    assert (config.data, config.init, config.guard) == (("d", "e"), "x", 0.02)
    assert (config.recipe, config.steps, out, named) == ("demo", 5, Path("r"), {"resume": "must"})
    assert capsys.readouterr().out == "wrote r\n"


def test_preview_draws_and_does_not_begin_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _replaced("selfray.pretrain", "pretrain", monkeypatch)
    preview = _replaced("selfray.preview", "write_preview", monkeypatch)
    assert main(["pretrain", "demo", "--data", "d", "--out", "r", "--preview", "crops.png"]) == 0
    (config, file), named = preview.call_args
    assert (config.data, file, named) == (("d",), Path("crops.png"), {})
    assert not run.called
    assert capsys.readouterr().out == "wrote crops.png\n"


def test_summary_says_where_the_page_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = _replaced("selfray.summary", "write_summary", monkeypatch)
    stage.return_value = Path("r/summary.html")
    assert main(["summary", "r"]) == 0
    stage.assert_called_once_with(Path("r"))
    assert capsys.readouterr().out == "wrote r/summary.html\n"
