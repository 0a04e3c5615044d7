"""Checkpoints: whole or not there, damage found by name, older ones intact."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from selfray import checkpoint
from selfray.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_newest,
    rotate,
    save_checkpoint,
)
from selfray.errors import InputError


def _tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b.step": torch.tensor(float(seed)),
        "c": torch.randn(4, 3, generator=generator).T,  # not contiguous
        "nan": torch.tensor([torch.nan, -0.0]),
    }


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        bits = [t.contiguous().view(torch.int32) for t in (found[name], tensor)]
        assert torch.equal(*bits), name


@pytest.fixture
def two(tmp_path: Path) -> Path:
    for step in (3, 12):
        save_checkpoint(tmp_path, step, _tensors(step))
    return tmp_path


def test_what_was_saved_comes_back_bit_for_bit(two: Path) -> None:
    newest, damaged = load_newest(two)
    assert newest is not None
    assert (newest.step, damaged) == (12, [])
    _assert_same(newest.tensors, _tensors(12))
    assert [step for step, _ in list_checkpoints(two)] == [3, 12]


def test_whoever_may_read_the_manifest_may_read_the_tensors(two: Path) -> None:
    files = [path.stat().st_mode for path in (two / "step_00000012").iterdir()]
    assert len(files) == 2 and len(set(files)) == 1


def test_without_a_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize("file", ["tensors.safetensors", "checkpoint.json"])
def test_every_flipped_bit_is_found_and_the_one_before_is_used(two: Path, file: str) -> None:
    path = two / "step_00000012" / file
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        changed = bytearray(whole)
        changed[position] ^= 1 << (position % 8)
        path.write_bytes(changed)
        try:
            same = json.loads(changed) == json.loads(whole)  # white space
        except ValueError:
            same = False
        if file == "checkpoint.json" and same:
            continue
        newest, damaged = load_newest(two)
        assert newest is not None
        assert newest.step == 3, f"bit {position % 8} of byte {position}"
        assert len(damaged) == 1
        assert "step_00000012" in damaged[0]


@pytest.mark.parametrize("file", ["tensors.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("how", ["missing", "empty", "half"])
def test_a_file_that_is_not_whole_is_found(two: Path, file: str, how: str) -> None:
    path = two / "step_00000012" / file
    whole = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes(whole[: len(whole) // 2] if how == "half" else b"")
    newest, damaged = load_newest(two)
    assert newest is not None
    assert newest.step == 3
    assert "step_00000012" in damaged[0]


def test_a_checkpoint_under_another_steps_name_is_damaged(two: Path) -> None:
    (two / "step_00000012").rename(two / "step_00000020")
    with pytest.raises(InputError, match="it says step 12"):
        load_checkpoint(two / "step_00000020")


def test_when_all_are_damaged_nothing_is_begun_afresh(two: Path) -> None:
    for _, path in list_checkpoints(two):
        (path / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged, .*step_00000012"):
        load_newest(two)


def test_a_checkpoint_of_another_format_says_so(two: Path) -> None:
    manifest = two / "step_00000012" / "checkpoint.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2}))
    with pytest.raises(InputError, match="is of format 2, this program knows 1"):
        load_checkpoint(two / "step_00000012")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_said_and_older_checkpoints_are_intact(
    two: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(tensors: object, file: Path) -> None:
        file.write_bytes(b"half of it")
        raise OSError(number, "no room")

    monkeypatch.setattr(checkpoint, "save_file", fill)
    with pytest.raises(InputError, match=r"step 15 could not be written .* make room"):
        save_checkpoint(two, 15, _tensors(15))
    assert sorted(path.name for path in two.iterdir()) == ["step_00000003", "step_00000012"]
    for step in (3, 12):
        _assert_same(load_checkpoint(two / f"step_{step:08d}").tensors, _tensors(step))


def test_what_a_killed_process_left_is_ignored_and_removed(two: Path) -> None:
    partial = two / ".step_00000015.partial"
    partial.mkdir()
    (partial / "tensors.safetensors").write_bytes(b"half")
    newest, damaged = load_newest(two)
    assert newest is not None
    assert (newest.step, damaged) == (12, [])
    save_checkpoint(two, 18, _tensors(18))
    assert not partial.exists()


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(two: Path) -> None:
    (two / "step_00000012" / "tensors.safetensors").write_bytes(b"")
    save_checkpoint(two, 12, _tensors(12))
    _assert_same(load_checkpoint(two / "step_00000012").tensors, _tensors(12))


def test_only_the_newest_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, step, {"a": torch.zeros(1)})
    rotate(tmp_path, 2, protected={2, 99})
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 5]
