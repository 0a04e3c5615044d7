"""`selfray generate`: which images are left out, which encoder is taken, which prompt fits."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_model_data import TEXTS

from selfray.cli import main
from selfray.evals.report_model import ReportModel
from selfray.evals.report_model_directory import save_report_model
from selfray.models.encoder import Encoder
from selfray.models.published import load_encoder
from selfray.models.small_decoder import small_decoder
from selfray.report_config import ReportConfig

NAME = "random:vit_pico/16@64"
CONFIG = ReportConfig(max_new_tokens=12, precision="float32")


def report_model_of(encoder: Encoder, name: str, evaluation: Path) -> Path:
    """An untrained report model, where `selfray evaluate` puts one."""
    tokens = np.random.default_rng(0).normal(size=(4, *encoder.grid, encoder.width))
    language = small_decoder(TEXTS, width=32, depth=1, heads=2, vocabulary=300, seed=0)
    model = ReportModel(language, encoder.width, visual_side=0, projector_layers=1, seed=0)
    model.scale_by(tokens.astype(np.float16), np.arange(4))
    directory = evaluation / "reports" / name.replace(":", "-").replace("/", "-") / "seed-0/model"
    about = {"encoder": name, "weights_sha256": encoder.weights_sha256, "config": asdict(CONFIG)}
    save_report_model(model, directory, about=about, whole=False)
    return directory


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    report_model_of(load_encoder(NAME), NAME, tmp_path / "evaluation")
    return tmp_path / "evaluation"


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Twenty, more than are written at a time."""
    files = [tmp_path / f"name of patient {k}.png" for k in range(20)]
    for k, file in enumerate(files):
        pixels = np.random.default_rng(k).integers(0, 256, (64, 64), np.uint8)
        Image.fromarray(pixels).save(file)
    return [str(file) for file in files]


def test_bad_images_cost_no_report_of_others_and_have_the_number_of_the_output(
    evaluation: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(evaluation), *images]) == 0
    whole = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines() if line)
    for bad in (1, 16):  # the second and the seventeenth, of both batches
        content = Path(images[bad]).read_bytes()
        Path(images[bad]).write_bytes(content[: len(content) // 2])
    Path(images[18]).unlink()
    assert main(["generate", str(evaluation), *images]) == 2
    said = capsys.readouterr()
    found = dict(line.split(": ", 1) for line in said.out.splitlines() if line)
    assert found == {k: text for k, text in whole.items() if k not in ("2", "17", "19")}
    lines = said.err.splitlines()
    assert [line.split(": ")[:2] for line in lines[:-1]] == [
        ["generate", "image 2"], ["generate", "image 17"], ["generate", "image 19"],
    ]  # fmt: skip
    assert lines[-1] == "selfray generate: left out 3 of 20 images; the lines above say why"
    assert "name of patient" not in said.err and str(tmp_path) not in said.err
