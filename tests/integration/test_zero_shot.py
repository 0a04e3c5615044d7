"""`evaluate --probes zero-shot`: findings by words, for encoders that learned from reports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from micro_run import micro_language_config
from safetensors.torch import load_file, save_file
from scipy.special import logit
from sklearn.metrics import roc_auc_score

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.evals.zero_shot import NEGATIVE, POSITIVE
from selfray.evaluate import evaluate
from selfray.evaluate import judge as judge_module
from selfray.models.published import load_encoder
from selfray.models.text_tower import SHARED_SPACE, open_text_tower
from selfray.pretrain_language import pretrain_language

REPORTS = (
    "FINDINGS: No effusion. The heart is normal.\nIMPRESSION: Normal.",
    "FINDINGS: There is an effusion. The heart is normal.\nIMPRESSION: Effusion.",
)
PATIENTS = 96


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An effusion makes the lower half bright."""
    info = DatasetInfo("planted", "test", "MIT", True, ("effusion",), (), "8 bit")
    writer = DatasetWriter(tmp_path_factory.mktemp("data") / "planted", info)
    noise = np.random.default_rng(0)
    for patient in range(PATIENTS):
        finding = patient % 2
        pixels = noise.integers(0, 120, (28, 28))
        pixels[14:] += 120 * finding
        writer.add(
            {"image": encode_png(pixels.astype(np.uint8)), "image_id": f"i{patient}",
             "patient_id": f"p{patient}", "study_id": f"s{patient}",
             "split": ("train", "validate", "test")[patient // 2 % 3], "sex": "FM"[patient % 2],
             "view": "PA", "age_years": 40.0 + patient % 7, "effusion": finding,
             "report": REPORTS[finding]}
        )  # fmt: skip
    return writer.finish().directory


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = micro_language_config(
        data, steps=60, batch_size=8, checkpoint_every=60, encoder__layerscale_init=1.0,
        encoder__drop_path=0.0, optimizer__learning_rate=3e-2, crops__jitter=0.0,
        text__sentences=0,
    )  # fmt: skip
    return pretrain_language(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def out(data: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    without = "random:vit_pico/14@28"
    return evaluate(
        [str(run), without, "pixels:16x16"], data, tmp_path_factory.mktemp("out") / "e",
        probes=["linear", "zero-shot"],
    )  # fmt: skip


def _lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").open()]


def test_an_encoder_of_reports_finds_what_it_read_of(out: Path, run: Path) -> None:
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    truth = {f"i{p}": p % 2 for p in range(PATIENTS)}
    mine = [r for r in table if r["probe"] == "zero-shot" and r["encoder"] == str(run)]
    assert len(mine) == PATIENTS // 3
    labels = [truth[r["image_id"]] for r in mine]
    expected = roc_auc_score(labels, [r["prediction"] for r in mine])
    stated = [
        line for line in _lines(out)
        if line["probe"] == "zero-shot" and line["target"] == "effusion"
        and line["encoder"] == str(run) and line["metric"] == "auroc" and not line.get("subgroup")
    ]  # fmt: skip
    assert stated[0]["value"] == pytest.approx(expected)
    # Of 16 images each, an AUROC by chance has a standard deviation of 0.10 (Mann-Whitney).
    assert expected > 0.5 + 4 * 0.10


def test_a_prediction_is_the_softmax_by_the_texts_and_the_images_features(
    out: Path, run: Path, data: Path
) -> None:
    table = pq.read_table(out / "predictions.parquet").to_pylist()
    mine = {
        r["image_id"]: r["prediction"]
        for r in table
        if r["probe"] == "zero-shot" and r["encoder"] == str(run)
    }

    dataset, encoder, tower = (
        RadiographDataset(data),
        load_encoder(str(run)),
        open_text_tower(str(run)),
    )
    assert tower is not None
    row = int(dataset.rows("test")[3])
    image = tower.images(encoder(dataset.pixels(row))[0]).double()
    means = [
        torch.nn.functional.normalize(
            tower.texts([t.format(finding="effusion").capitalize() for t in templates])
            .double().mean(0), dim=0,
        )
        for templates in (POSITIVE, NEGATIVE)
    ]  # fmt: skip
    logits = tower.logit_scale * torch.stack([image @ mean for mean in means], 1)
    expected = float(logits.softmax(1)[0, 0])
    assert mine[dataset.column("image_id")[row]] == pytest.approx(expected, abs=1e-4)


def test_a_text_side_or_prompts_that_changed_are_judged_again(
    out: Path, run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = shutil.copytree(run, tmp_path / "run")
    asked = []
    ask = judge_module._ask_with_words
    monkeypatch.setattr(judge_module, "_ask_with_words", lambda *a: asked.append(a[1]) or ask(*a))

    def scores() -> np.ndarray:
        evaluate([str(mine)], data, tmp_path / "out", probes=["zero-shot"])
        table = pq.read_table(tmp_path / "out" / "predictions.parquet")
        return table["prediction"].to_numpy()

    first = scores()
    assert (scores() == first).all()
    assert len(asked) == 1  # what is there is kept

    file = mine / "text_encoder" / SHARED_SPACE
    tensors = load_file(file)
    save_file({**tensors, "logit_scale": tensors["logit_scale"] * 2}, file)
    # Twice the factor is twice the logit of each score.
    np.testing.assert_allclose(logit(scores()), 2 * logit(first), rtol=1e-4)
    assert len(asked) == 2

    tokenizer = mine / "text_encoder" / "tokenizer.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), indent=1))
    scores()
    assert len(asked) == 3

    monkeypatch.setattr(
        judge_module, "prompts", lambda name: ((f"{name} is seen.",), (f"{name} is not seen.",))
    )
    scores()
    assert len(asked) == 4


def test_encoders_without_a_text_side_and_records_say_why_not(out: Path, run: Path) -> None:
    undefined = {
        (e["name"], target): why
        for e in json.loads((out / "evaluation.json").read_text())["encoders"]
        for target, probe, *_, why in e["undefined"]
        if probe == "zero-shot"
    }
    for encoder in ("random:vit_pico/14@28", "pixels:16x16"):
        assert undefined[encoder, "effusion"] == "the encoder has no text encoder beside it"
    assert undefined[str(run), "age_years"] == "only findings can be put into words"
    assert (str(run), "effusion") not in undefined
