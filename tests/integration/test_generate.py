"""`selfray generate`: which images are left out, which encoder is taken, which prompt fits."""

from __future__ import annotations

import re
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_model_data import TEXTS

from selfray import generate
from selfray.cli import main
from selfray.evals.report_model import ReportModel
from selfray.evals.report_model_directory import save_report_model
from selfray.models import language_memory
from selfray.models.encoder import Encoder
from selfray.models.encoder_directory import save_encoder
from selfray.models.published import load_encoder
from selfray.models.small_decoder import small_decoder
from selfray.report_config import ReportConfig

NAME = "random:vit_pico/16@64"
CONFIG = ReportConfig(max_new_tokens=12, precision="float32")


def report_model_of(
    encoder: Encoder,
    name: str,
    evaluation: Path,
    positions: int = 4096,
    grid: tuple[int, int] | None = None,
) -> Path:
    """An untrained report model, where `selfray evaluate` puts one."""
    grid = grid or encoder.grid
    tokens = np.random.default_rng(0).normal(size=(4, *grid, encoder.width))
    language = small_decoder(TEXTS, width=32, depth=1, heads=2, vocabulary=300, seed=0)
    language.network.config.max_position_embeddings = positions
    model = ReportModel(language, encoder.width, visual_side=0, projector_layers=1, seed=0)
    with torch.no_grad():  # so that what is written depends on what is seen, not on the last word
        for weight in model.network.model.layers.parameters():
            weight.mul_(20 if weight.ndim == 2 else 1)
    model.scale_by(tokens.astype(np.float16), np.arange(4))
    directory = evaluation / "reports" / name.replace(":", "-").replace("/", "-") / "seed-0/model"
    about = {
        "encoder": name,
        "weights_sha256": encoder.weights_sha256,
        "grid": list(grid),
        "config": asdict(CONFIG),
    }
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


def reports_in(said: str) -> dict[str, str]:
    """Reports by the number before them; untrained, they may hold line ends."""
    parts = re.split(r"^(\d+): ", said, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_bad_images_cost_no_report_of_others_and_have_the_number_of_the_output(
    evaluation: Path, images: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(evaluation), *images]) == 0
    whole = reports_in(capsys.readouterr().out)
    assert list(map(int, whole)) == list(range(1, 21)) and len(set(whole.values())) > 15
    for bad in (1, 16):  # the second and the seventeenth, of both batches
        content = Path(images[bad]).read_bytes()
        Path(images[bad]).write_bytes(content[: len(content) // 2])
    Path(images[18]).unlink()
    assert main(["generate", str(evaluation), *images]) == 2
    said = capsys.readouterr()
    assert reports_in(said.out) == {
        k: text for k, text in whole.items() if k not in ("2", "17", "19")
    }
    lines = said.err.splitlines()
    assert [line.split(": ")[:2] for line in lines[:-1]] == [
        ["generate", "image 2"], ["generate", "image 17"], ["generate", "image 19"],
    ]  # fmt: skip
    assert lines[-1] == "selfray generate: left out 3 of 20 images; the lines above say why"
    assert "name of patient" not in said.err and str(tmp_path) not in said.err


@pytest.fixture
def moved(evaluation: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """An evaluation of `runE` and another encoder, by relative names, and where `runE` is now."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    vit = load_encoder(NAME).vit
    with torch.no_grad():
        vit.norm.weight.mul_(2)  # weights that are those of no other encoder
    save_encoder(vit, Path("runE"), mean=0.5, std=0.3, card={"synthetic": True, "data": []})
    report_model_of(load_encoder("runE"), "runE", evaluation)
    shutil.move("runE", "elsewhere/runMoved")
    return evaluation, tmp_path / "elsewhere/runMoved"


def test_an_encoder_that_has_moved_is_known_by_its_weights(
    moved: tuple[Path, Path], images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation, place = moved
    (model,) = evaluation.glob("reports/runE/*/model")
    shutil.copytree(place, "runE")
    assert main(["generate", str(evaluation), images[0], "--encoder", "runE"]) == 0
    shutil.rmtree("runE")
    expected = capsys.readouterr().out
    for given in (evaluation, model):
        assert main(["generate", str(given), images[0], "--encoder", str(place)]) == 0
        assert capsys.readouterr().out == expected
    other = ["generate", str(evaluation), images[0], "--encoder", NAME]
    assert main(other) == 0 and capsys.readouterr().out != expected


def test_an_encoder_that_is_not_there_any_more_is_asked_for_by_its_option(
    moved: tuple[Path, Path], images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation, _ = moved
    (model,) = evaluation.glob("reports/runE/*/model")
    for words in ([str(model)], [str(evaluation), "--encoder", "runE"]):
        assert main(["generate", words[0], images[0], *words[1:]]) == 2
        assert capsys.readouterr().err == (
            "selfray generate: encoder 'runE', which the report model was trained with, is not "
            "found from here. Say by --encoder where it is now.\n"
        )
    assert main(["generate", str(evaluation), images[0], "--encoder", "runF"]) == 2
    assert capsys.readouterr().err.endswith(
        f"no report model of runF, and no encoder is there. Did you mean 'runE'? Allowed: {NAME}, "
        "runE.\n"
    )


def test_an_encoder_of_other_weights_is_refused(
    moved: tuple[Path, Path], images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation, place = moved
    for name in ("random:vit_pico/8@64", "runE"):
        if name == "runE":  # another encoder has its place
            vit = load_encoder(NAME).vit
            save_encoder(vit, Path(name), mean=0.5, std=0.3, card={"synthetic": True, "data": []})
        assert main(["generate", str(evaluation), images[0], "--encoder", name]) == 2
        assert f"{name} has other weights than the encoder that" in capsys.readouterr().err
    assert place.exists()


def test_a_prompt_is_refused_where_a_report_would_end_beyond_the_positions(
    images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Read here: 16 patches, the prompt, and the line end of the template, then 12 of a report."""
    report_model_of(load_encoder(NAME), NAME, tmp_path / "evaluation", positions=100)
    words = ["generate", str(tmp_path / "evaluation"), images[0], "--prompt"]
    assert main([*words, "~" * 71]) == 0  # bytes that no report has are tokens of their own
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(generate, "generate_reports", lambda *a, **k: pytest.fail("written"))
    for length in (72, 10**6):
        assert main([*words, "~" * length]) == 2
        assert capsys.readouterr().err == (
            f"selfray generate: the prompt has {length} tokens, at most 71 fit beside 16 of the "
            "image and 12 of the report. Shorten --prompt.\n"
        )


def test_memory_is_planned_with_the_prompt_in_tokens(
    evaluation: Path, images: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The decoder of one block, width 32, has 300 tokens at most: 16 images at a time, float32."""
    a_token = 16 * (2 * 32 * 34 + 2 * 2 * 2 * 32 + 8 * 300)
    free = [10**9, 2000 * a_token]
    monkeypatch.setattr(language_memory, "free_memory", lambda device: free.pop(0))
    text = TEXTS[0] * 52  # 2,548 characters, of which merged pairs make half as many tokens
    assert main(["generate", str(evaluation), images[0], "--prompt", text]) == 0
    capsys.readouterr()
    free[:] = [10**9, 2000 * a_token]
    assert main(["generate", str(evaluation), images[0], "--prompt", "~" * 2500]) == 2
    said = capsys.readouterr().err
    assert "needs about" in said and "for weights" not in said


def test_a_model_of_features_without_patches_is_not_shown_patches(
    tmp_path: Path, images: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = report_model_of(load_encoder(NAME), NAME, tmp_path, grid=(1, 1))
    assert main(["generate", str(directory), images[0]]) == 2
    said = capsys.readouterr()
    assert not said.out and "was trained on 1 × 1 tokens an image" in said.err
