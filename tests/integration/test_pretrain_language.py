"""Pre-training with reports: the control of a run on images alone, and what reports can be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from micro_run import (
    command_line,
    in_child,
    micro_config,
    micro_language_config,
    records,
    terminate,
    within_step,
    write_dataset,
)
from safetensors.torch import load_file
from two_ranks import on_ranks

from selfray import pretrain_language
from selfray.checkpoint import load_newest
from selfray.cli import main
from selfray.config import ContrastiveConfig
from selfray.data.dataset import RadiographDataset
from selfray.data.report_loader import with_reports
from selfray.errors import InputError, Interrupted
from selfray.initialise import initialise, initialise_encoder, initialise_image_text
from selfray.models.published import load_encoder
from selfray.models.text_encoder import TextEncoder, small_text_encoder, train_tokenizer
from selfray.models.text_tower import open_text_tower
from selfray.pretrain import build_loader, pretrain
from selfray.pretrain_language import build_report_loader
from selfray.pretrain_language import pretrain_language as run_language

REPORTS = (
    "FINDINGS: The heart is normal in size. No effusion.\nIMPRESSION: Normal study.",
    "FINDINGS: There is an effusion. The heart is enlarged.\nIMPRESSION: 1. Effusion.",
)
ODD = (
    "",
    None,
    "INDICATION: Cough.",
    "FINDINGS: Nodule of ___ mm on [**2020-1-1**]. XXXX.",
    "FINDINGS: 心臓は正常です。胸水はありません。\nIMPRESSION: Без патологии.",
    "FINDINGS: " + "The lungs are clear and so are the angles. " * 40,
    "IMPRESSION: " + "word" * 300,
    "No heading at all, only a sentence.",
)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "reported", reports=REPORTS).directory


@pytest.fixture(scope="module")
def config(reported: Path) -> ContrastiveConfig:
    return micro_language_config(reported, evaluate_every=4)


@pytest.fixture(scope="module")
def whole(config: ContrastiveConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing interrupted."""
    return run_language(config, tmp_path_factory.mktemp("runs") / "whole")


def _assert_same_end(run: Path, other: Path) -> None:
    last = "checkpoints/step_00000008/tensors.safetensors"
    files = [p.relative_to(other) for p in (other / "text_encoder").iterdir()]
    for file in (last, "encoder/model.safetensors", "tokenizer.json", "DONE", *files):
        assert (run / file).read_bytes() == (other / file).read_bytes(), file
    assert records(run) == records(other)


def _text_encoder() -> TextEncoder:
    tokenizer = train_tokenizer(REPORTS, 300)
    return small_text_encoder(tokenizer, width=16, depth=1, heads=2, max_tokens=32, seed=0)


def _refused(config: ContrastiveConfig, run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a run is refused."""
    assert main(command_line(config, run)) == 2
    said = capsys.readouterr()
    line = said.err.strip().splitlines()
    assert len(line) == 1, said.err
    return line[0]


def test_a_run_gives_what_evaluate_and_summary_take(whole: Path) -> None:
    encoder = load_encoder(str(whole))
    assert encoder.width == 24
    card = json.loads((whole / "encoder" / "selfray.json").read_text())
    assert card["supervision"] == "reports"
    assert "images and their reports" in (whole / "encoder" / "README.md").read_text()
    steps = [r for r in records(whole) if r["kind"] == "step"]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert {"loss", "gradient_norm", "mean_cosine", "learning_rate", "weight_decay", "bad_images",
            "logit_scale", "pairs_found", "texts_cut"} <= set(steps[0])  # fmt: skip
    assert [r["step"] for r in records(whole) if r["kind"] == "probe"] == [0, 4, 8]
    transformers.AutoModel.from_pretrained(whole / "text_encoder")
    assert main(["summary", str(whole)]) == 0


def test_the_text_side_is_that_of_the_last_step(whole: Path, config: ContrastiveConfig) -> None:
    best = json.loads((whole / "checkpoints" / "best.json").read_text())["step"]
    tensors = load_file(whole / "checkpoints" / f"step_{best:08d}" / "tensors.safetensors")
    tower = open_text_tower(str(whole))
    assert tower is not None
    assert tower.logit_scale == pytest.approx(float(tensors["networks.logits.log_scale"].exp()))
    cls = torch.randn(3, 24)
    expected = cls @ tensors["networks.image_projection.weight"].T
    torch.testing.assert_close(
        tower.images(cls), expected / expected.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6
    )
    norms = tower.texts(["No effusion.", "Есть."]).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(2))


def test_the_same_config_gives_the_same_run_twice(
    config: ContrastiveConfig, whole: Path, tmp_path: Path
) -> None:
    _assert_same_end(run_language(config, tmp_path / "run"), whole)


def test_a_signal_saves_and_the_same_command_resumes_exactly(
    config: ContrastiveConfig,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command_line(config, tmp_path / "run")
    with monkeypatch.context() as patch:
        within_step(5, terminate, pretrain_language, patch)
        assert main(words) == 130
    assert "stopped at step 5, state saved" in capsys.readouterr().err
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "resuming" in said
    assert "reports:" not in said  # said once, when the run began
    _assert_same_end(tmp_path / "run", whole)


def test_parts_of_a_batch_and_dropout_resume_exactly_too(
    reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "bert"
    _save_bert(model)
    config = micro_language_config(
        reported, engine__accumulate=2, text__model=str(model), text__max_tokens=16,
        contrastive__loss="siglip",
    )  # fmt: skip
    other = run_language(config, tmp_path / "whole")
    assert "logit_bias" in records(other)[0]
    with monkeypatch.context() as patch:
        within_step(3, terminate, pretrain_language, patch)
        with pytest.raises(Interrupted):
            run_language(config, tmp_path / "run")
    run_language(config, tmp_path / "run")
    ours, theirs = (load_newest(run / "checkpoints")[0] for run in (tmp_path / "run", other))
    assert ours is not None
    assert theirs is not None
    for name, tensor in theirs.tensors.items():
        assert torch.equal(ours.tensors[name], tensor), name


def test_two_ranks_make_the_run_of_one(reported: Path, tmp_path: Path) -> None:
    config = micro_language_config(reported, steps=3, encoder__drop_path=0.0)
    assert in_child(lambda: run_language(config, tmp_path / "one")) == 0
    on_ranks(lambda rank: run_language(config, tmp_path / "two"))
    first, *rest = zip(records(tmp_path / "two"), records(tmp_path / "one"), strict=True)
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    assert first[0]["gradient_norm"] == pytest.approx(first[1]["gradient_norm"], rel=1e-5)
    # The warm-up's first step has learning rate 0; Adam then divides by gradients near 0.
    for mine, theirs in rest:
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


def test_a_run_begins_with_the_encoder_and_the_crops_of_its_pair(reported: Path) -> None:
    paired, config = micro_config(reported), micro_language_config(reported)
    student, _, _ = initialise(paired)
    begun = initialise_encoder(config)
    networks, _ = initialise_image_text(config, begun, _text_encoder())
    theirs = student.result.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in networks.result.state_dict().items())

    datasets = [RadiographDataset(reported)]
    places, slots = with_reports(datasets, "train").places, slice(0, 4)
    unflipped = micro_config(reported, crops__flip=0.0)
    for step in (0, 5):
        alone = build_loader(unflipped, datasets, slots).batch(step)
        ours = build_report_loader(config, places, networks.text_encoder.fits, slots).batch(step)
        assert ours.image_ids == alone.image_ids
        assert torch.equal(ours.images, alone.global_crops[0])


def test_a_preview_shows_crop_and_text(reported: Path, tmp_path: Path) -> None:
    words = command_line(micro_language_config(reported), tmp_path / "run")
    assert main([*words, "--preview", str(tmp_path / "preview.png")]) == 0
    assert (tmp_path / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "run").exists()


def test_the_texts_are_the_images_own_sentences_by_position(reported: Path) -> None:
    config = micro_language_config(reported, text__sentences=1, text__max_tokens=64)
    dataset = RadiographDataset(reported)
    places = with_reports([dataset], "train").places
    fits = _text_encoder().fits
    drawn: dict[str, set[str]] = {}
    for threads in (1, 3):
        changed = micro_language_config(reported, text__sentences=1, engine__loader_threads=threads)
        loader = build_report_loader(changed, places, fits, slice(0, 4))
        batches = list(loader.batches(3, 20))
        later = build_report_loader(config, places, fits, slice(0, 4)).batch(11)
        assert later.texts == batches[8].texts
        for batch in batches:
            for image_id, text in zip(batch.image_ids, batch.texts, strict=True):
                drawn.setdefault(image_id, set()).add(text)
    sentences = [
        {"The heart is normal in size.", "No effusion.", "Normal study."},
        {"There is an effusion.", "The heart is enlarged.", "1. Effusion."},
    ]
    for image_id, texts in drawn.items():
        assert texts <= sentences[int(image_id[1:]) % 2]
    assert any(len(texts) > 1 for texts in drawn.values())


def test_odd_reports_are_learned_from_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data", reports=ODD).directory
    run = tmp_path / "run"
    assert main(command_line(micro_language_config(data, text__sentences=0), run)) == 0
    said = capsys.readouterr().err
    train = [ODD[index % len(ODD)] for index in range(14)]
    without = sum(report in ("", None, "INDICATION: Cough.") for report in train)
    assert f"reports: {14 - without} training images have one; {without} without" in said
    steps = [r for r in records(run) if r["kind"] == "step"]
    assert sum(r["texts_cut"] for r in steps) > 0
    assert all(np.isfinite(r["loss"]) for r in steps)


def test_no_report_at_all_is_refused(
    micro_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = _refused(micro_language_config(micro_data), tmp_path / "run", capsys)
    assert "none of the 14 images in split 'train' has a report" in line
    assert not (tmp_path / "run").exists()


def test_one_report_alone_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = (REPORTS[0], *[None] * 23)
    data = write_dataset(tmp_path / "data", reports=reports).directory
    line = _refused(micro_language_config(data), tmp_path / "run", capsys)
    assert "only 1 of the 14 images in split 'train' has a report" in line
    assert not (tmp_path / "run").exists()


def test_an_encoder_that_cannot_be_continued_leaves_no_run_behind(
    reported: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for init, said in ((tmp_path / "none", "is no directory"), (whole, "does not fit the config")):
        config = micro_language_config(reported, init=str(init), encoder__arch="vit_nano")
        assert said in _refused(config, tmp_path / "run", capsys)
        assert not (tmp_path / "run").exists()


def test_a_run_of_images_alone_is_not_resumed_with_reports(
    reported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(micro_config(reported, steps=1), tmp_path / "run")
    capsys.readouterr()
    line = _refused(micro_language_config(reported, steps=1), tmp_path / "run", capsys)
    assert "another config (recipe: small -> clip-small)" in line


def _bert_config() -> transformers.BertConfig:
    return transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=24,
    )  # fmt: skip


def _tokenizer(**special: str) -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(train_tokenizer(REPORTS, 300))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **special)


def _save_bert(directory: Path) -> None:
    torch.manual_seed(0)
    transformers.BertModel(_bert_config()).save_pretrained(directory)
    _tokenizer(pad_token="[PAD]").save_pretrained(directory)


def test_a_decoder_without_a_pad_token_serves_too(reported: Path, tmp_path: Path) -> None:
    shape = transformers.GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    transformers.GPT2Model(shape).save_pretrained(tmp_path / "gpt")
    _tokenizer().save_pretrained(tmp_path / "gpt")
    config = micro_language_config(
        reported, steps=2, text__model=str(tmp_path / "gpt"), text__max_tokens=24
    )
    run = run_language(config, tmp_path / "run")
    assert not (run / "tokenizer.json").exists()
    tower = open_text_tower(str(run))
    assert tower is not None
    alone, longer = tower.texts(["No effusion."]), tower.texts(["No effusion.", "Heart. " * 5])
    torch.testing.assert_close(longer[:1], alone, rtol=1e-4, atol=1e-5)


def _pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save({}, model / "pytorch_model.bin")


def _without_tokenizer(model: Path) -> None:
    for file in model.glob("*token*"):
        file.unlink()


def _encoder_and_decoder(model: Path) -> None:
    transformers.T5Config(vocab_size=9, d_model=8).save_pretrained(model)


def _with_code(model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
    (model / "config.json").write_text(json.dumps(content))
    (model / "own.py").write_text("raise SystemExit('this code must not run')")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_pickled, "has no *.safetensors, and pickled weights are not read"),
        (_without_tokenizer, "its tokenizer is missing or another model's"),
        (_encoder_and_decoder, "holds a model of kind t5"),
        (_with_code, "cannot be opened as a text model"),
        (shutil.rmtree, "config.json is missing"),
        (lambda model: None, "text.max_tokens is 32, and"),
    ],
)
def test_a_text_model_that_cannot_be_one_is_refused(
    harm: Callable[[Path], None],
    said: str,
    reported: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "bert"
    _save_bert(model)
    harm(model)
    capsys.readouterr()
    config = micro_language_config(reported, text__model=str(model))
    assert said in _refused(config, tmp_path / "run", capsys)
    assert not (tmp_path / "run").exists()


def test_a_text_side_of_other_weights_is_refused(whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    file = run / "encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(InputError, match="belongs to other weights"):
        open_text_tower(str(run))
