"""The preview shows the crops and masks of the run's first step."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from micro_run import command_line, micro_config

from selfray.cli import main
from selfray.pretrain import build_loader
from selfray.preview import _caption, _pictures, tinted
from selfray.run_loop import open_data


def test_the_command_writes_a_png_and_no_run(
    micro_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "crops.png"
    words = command_line(micro_config(micro_data), tmp_path / "run")
    assert main([*words, "--preview", str(file)]) == 0
    assert capsys.readouterr().out == f"wrote {file}\n"
    picture = cv2.imread(str(file))
    assert picture is not None
    assert min(picture.shape[:2]) > 300
    orange = (picture[..., 2].astype(int) - picture[..., 0]) > 60
    assert 0.001 < orange.mean() < 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["crops.png"]


def test_a_preview_without_local_crops_or_of_one_image_is_drawn(
    micro_data: Path, tmp_path: Path
) -> None:
    config = micro_config(micro_data, crops__local_count=0, batch_size=2)
    words = command_line(config, tmp_path / "run")
    assert main([*words, "--preview", str(tmp_path / "crops.png")]) == 0


def test_what_is_drawn_is_what_the_first_step_gets(micro_data: Path) -> None:
    config = micro_config(micro_data, batch_size=4)
    datasets = open_data(config)
    batch = build_loader(config, datasets, slice(0, 4)).batch(0)
    for index in range(4):
        pictures = list(_pictures(np.zeros((56, 56), np.uint8), batch, index, 14))
        assert [title.split(",")[0] for title, _ in pictures] == [
            "image", "global crop 1", "global crop 2", "local crop 1", "local crop 2",
        ]  # fmt: skip
        assert torch.equal(torch.from_numpy(pictures[3][1]), batch.local_crops[0, index])
        assert f"{int(batch.masks[1, index].sum())} of 4 masked" in pictures[2][0]
    assert "micro (synthetic phantom)" in _caption(config, datasets)


def test_only_masked_patches_are_tinted() -> None:
    crop = np.full((28, 42 - 14), 100, np.uint8)
    mask = np.array([False, True, False, False])
    picture = tinted(crop, mask, 14)
    gray = (picture == 100).all(axis=2)
    np.testing.assert_array_equal(~gray[:14, 14:], True)
    assert gray.sum() == 3 * 14 * 14
