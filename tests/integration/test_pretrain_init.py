"""Continuing from an encoder: where every tensor comes from, the fresh head, the guard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import pytest
import torch
from micro_run import in_child, micro_config, write_dataset
from safetensors.torch import load, load_file, save_file

from selfray.config import PretrainConfig
from selfray.errors import InputError, RunStopped
from selfray.initialise import initialise
from selfray.models.published import load_encoder
from selfray.pretrain import pretrain as run_pretrain
from selfray.probe import Probe
from selfray.run_directory import RunDirectory


@pytest.fixture(scope="module")
def source(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, whose encoder and heads others continue from."""
    config = micro_config(micro_data, steps=3, heads__separate=True, seed=9)
    return run_pretrain(config, tmp_path_factory.mktemp("source") / "run")


@pytest.fixture
def encoder(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source / "encoder", tmp_path / "encoder"))


def _config(micro_data: Path, encoder: Path | str, **changes: Any) -> PretrainConfig:
    return micro_config(micro_data, init=str(encoder), heads__separate=True, **changes)


def _images(side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal((3, 1, side, side))).float()


def test_before_step_0_the_teacher_is_the_exported_encoder_bit_for_bit(
    micro_data: Path, source: Path
) -> None:
    networks, lines, fresh_head = initialise(_config(micro_data, source))
    theirs = load_encoder(str(source))
    for mine, other in zip(
        networks.teacher["encoder"](_images(28)), theirs.model(_images(28)), strict=True
    ):
        assert torch.equal(mine, other)
    assert (networks.mean, networks.std) == pytest.approx((theirs.mean, theirs.std), abs=1e-12)
    for head in ("dino_head", "ibot_head"):
        saved = load_file(source / "encoder" / f"{head}.safetensors")
        for network in (networks.student, networks.teacher):
            assert all(torch.equal(network[head].state_dict()[n], t) for n, t in saved.items())
    assert not fresh_head
    count = len(theirs.model.state_dict())
    assert lines[0] == f"encoder: {count} of {count} tensors from {source}"
    assert [line.split(" from ")[0] for line in lines[1:3]] == [
        "dino_head: 8 of 8 tensors",
        "ibot_head: 8 of 8 tensors",
    ]


def test_the_first_lines_say_where_every_tensor_came_from(
    micro_data: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pretrain(_config(micro_data, source, steps=1), tmp_path / "run")
    said = capsys.readouterr().err
    for part in ("encoder: ", "dino_head: 8 of 8", "ibot_head: 8 of 8", "teacher: copy"):
        assert part in said


@pytest.mark.parametrize(
    ("file", "name"),
    [("dino_head", "mlp.2.bias"), ("ibot_head", "last_layer.weight_v")],
)
def test_a_head_that_lacks_a_tensor_is_refused_by_its_name(
    micro_data: Path, encoder: Path, file: str, name: str
) -> None:
    head = encoder / f"{file}.safetensors"
    tensors = load(head.read_bytes())  # load_file would map what is overwritten below
    save_file({n: t for n, t in tensors.items() if n != name} | {"odd": tensors[name]}, head)
    with pytest.raises(InputError, match=rf"{file}.safetensors .* missing {name}; unexpected odd"):
        initialise(_config(micro_data, encoder))


def test_a_head_of_another_shape_is_refused(micro_data: Path, encoder: Path) -> None:
    with pytest.raises(
        InputError, match=r"last_layer.weight_g is \[16, 1\], the config asks for \[32, 1\]"
    ):
        initialise(_config(micro_data, encoder, heads__prototypes=32))


def test_a_damaged_head_is_refused(micro_data: Path, encoder: Path) -> None:
    (encoder / "dino_head.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"dino_head.safetensors cannot be read"):
        initialise(_config(micro_data, encoder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder__arch": "vit_nano"}, "missing blocks.2.attn.proj.bias"),
        ({"encoder__registers": 3}, "missing register_tokens"),
        ({"encoder__patch_size": 7, "crops__local_size": 14}, "patch_embed.proj.weight is"),
    ],
)
def test_an_encoder_that_fits_in_part_is_refused(
    micro_data: Path, source: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        run_pretrain(_config(micro_data, source, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_at_another_size_features_begin_where_the_sources_were(
    micro_data: Path, source: Path
) -> None:
    networks, lines, _ = initialise(_config(micro_data, source, encoder__image_size=42))
    theirs = load_encoder(str(source)).model
    assert torch.equal(networks.teacher["encoder"](_images(42)).cls, theirs(_images(42)).cls)
    assert "pos_embed resampled from 4 to 9 patches" in lines[0]


def test_without_a_head_only_heads_move_until_they_are_warm(
    micro_data: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (encoder / "dino_head.safetensors").unlink()
    config = _config(micro_data, encoder, steps=5, checkpoint_every=1, head_warmup=3)
    run = run_pretrain(config, tmp_path / "run")
    assert "dino_head: 8 tensors from random weights" in capsys.readouterr().err
    start = initialise(config)[0].state_dict()
    for step in range(1, 6):
        tensors = load_file(run / f"checkpoints/step_{step:08d}/tensors.safetensors")
        for name, before in start.items():
            now = tensors[f"networks.{name}"]
            if ".encoder." in name and step <= 3:
                assert torch.equal(now, before), f"{name} at step {step}"
            elif name.startswith("student") and not name.endswith("weight_g"):
                assert not torch.equal(now, before), f"{name} at step {step}"


def test_with_its_head_everything_moves_at_once(
    micro_data: Path, source: Path, tmp_path: Path
) -> None:
    config = _config(micro_data, source, steps=1, head_warmup=3, optimizer__freeze_last_layer=0.0)
    run = run_pretrain(config, tmp_path / "run")
    start = initialise(config)[0].student.state_dict()
    tensors = load_file(run / "checkpoints/step_00000001/tensors.safetensors")
    for name, before in start.items():
        if not name.endswith("weight_g"):
            assert not torch.equal(tensors[f"networks.student.{name}"], before), name


def _probes(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    return [record for record in records if record["kind"] == "probe"]


def test_the_start_is_probed_before_the_first_step(
    micro_data: Path, source: Path, tmp_path: Path
) -> None:
    run = run_pretrain(_config(micro_data, source, steps=2, evaluate_every=2), tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert (first["kind"], first["step"], first["n"]) == ("probe", 0, 8)
    assert set(first["auroc"]) == {"effusion", "nodule"}
    assert first["macro_auroc"] == pytest.approx(np.mean(list(first["auroc"].values())))
    assert [record["step"] for record in _probes(run)] == [0, 2]


def _scores(values: list[float | None], monkeypatch: pytest.MonkeyPatch) -> None:
    left = iter(values)
    fixed = {"auroc": {}, "sex_auroc": 0.5, "age_r2": 0.0, "n": 8}
    monkeypatch.setattr(Probe, "__call__", lambda *_: {"macro_auroc": next(left), **fixed})


def test_the_best_probe_is_marked_kept_and_exported(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scores([0.5, 0.6, 0.9, 0.7, 0.8], monkeypatch)
    config = micro_config(micro_data, evaluate_every=2, keep_checkpoints=1, checkpoint_every=100)
    run = run_pretrain(config, tmp_path / "run")
    assert json.loads((run / "checkpoints/best.json").read_text()) == {
        "step": 4,
        "macro_auroc": 0.9,
    }
    assert [p.name for p in sorted((run / "checkpoints").glob("step_*"))] == [
        "step_00000004",
        "step_00000008",
    ]
    best = load_file(run / "checkpoints/step_00000004/tensors.safetensors")
    exported = load_encoder(str(run)).model.state_dict()
    for name, tensor in exported.items():
        assert torch.equal(tensor, best[f"networks.teacher.encoder.{name}"]), name
    assert "encoder of step 4" in (run / "DONE").read_text()


@pytest.mark.parametrize(("continues", "best"), [(True, 0), (False, 2)])
def test_the_start_can_be_the_best_only_where_it_is_an_encoder(
    micro_data: Path,
    source: Path,
    tmp_path: Path,
    continues: bool,
    best: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _scores([0.9, 0.8, 0.7], monkeypatch)
    make = _config if continues else lambda data, _, **changes: micro_config(data, **changes)
    run = run_pretrain(make(micro_data, source, steps=4, evaluate_every=2), tmp_path / "run")
    assert json.loads((run / "checkpoints/best.json").read_text())["step"] == best
    said = f"holds the encoder of step {best}, the best probe"
    assert said in capsys.readouterr().err
    assert json.loads((run / "encoder" / "selfray.json").read_text())["step"] == best


def test_the_guard_finishes_the_run_and_keeps_the_best(
    micro_data: Path,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _scores([0.80, 0.79, 0.81, 0.74, 0.9], monkeypatch)
    config = _config(micro_data, source, evaluate_every=2, guard=0.05)
    run = tmp_path / "run"
    with pytest.raises(RunStopped, match=r"fell from 0.800 at step 0 to 0.740 at step 6"):
        run_pretrain(config, run)
    assert [record["step"] for record in _probes(run)] == [0, 2, 4, 6]
    best = load_file(run / "checkpoints/step_00000004/tensors.safetensors")
    exported = load_encoder(str(run)).model.norm.weight
    assert torch.equal(exported, best["networks.teacher.encoder.norm.weight"])
    assert "encoder of step 4" in (run / "DONE").read_text()
    capsys.readouterr()
    assert run_pretrain(config, run) == run
    assert "is finished (guard:" in capsys.readouterr().err


def test_killed_when_the_guard_finishes_a_run_the_same_command_finishes_it(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = micro_config(micro_data, evaluate_every=2, guard=0.05), tmp_path / "run"

    def doomed() -> None:
        _scores([0.80, 0.81, 0.70], monkeypatch)
        monkeypatch.setattr(RunDirectory, "finish", lambda *_: os.kill(os.getpid(), SIGKILL))
        run_pretrain(config, run)

    assert in_child(doomed) == -SIGKILL
    _scores([0.70], monkeypatch)
    with pytest.raises(RunStopped, match=r"fell from 0.800 at step 0 to 0.700 at step 4"):
        run_pretrain(config, run)
    assert "encoder of step 2" in (run / "DONE").read_text()


def test_a_fall_within_the_margin_goes_on(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _scores([0.80, 0.76, 0.76, 0.76, 0.76], monkeypatch)
    config = micro_config(micro_data, evaluate_every=2, guard=0.05)
    assert "8 steps" in (run_pretrain(config, tmp_path / "run") / "DONE").read_text()


def test_data_without_findings_trains_and_exports_the_last_step(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", findings=())
    run = run_pretrain(micro_config(data.directory, evaluate_every=4), tmp_path / "run")
    assert [record["macro_auroc"] for record in _probes(run)] == [None] * 3
    last = load_file(run / "checkpoints/step_00000008/tensors.safetensors")
    exported = load_encoder(str(run)).model.norm.weight
    assert torch.equal(exported, last["networks.teacher.encoder.norm.weight"])


def test_the_exported_encoder_opens_with_transformers(source: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModel.from_pretrained(source / "encoder").eval()
    ours = load_encoder(str(source)).model
    with torch.no_grad():
        hidden = theirs(_images(28).expand(-1, 3, -1, -1)).last_hidden_state
        torch.testing.assert_close(hidden[:, 0], ours(_images(28)).cls, rtol=0, atol=2e-5)
    card = (source / "encoder" / "README.md").read_text()
    assert "synthetic" in card
