"""Reports of a small dataset whose findings are planted in the pixels and told in the reports."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.errors import InputError
from selfray.evaluate import ReportTask, compare, evaluate
from selfray.evaluate import report_writing as writing
from selfray.evaluate.report_studies import report_studies
from selfray.evaluate.reported import score_reports
from selfray.field_options import add_report_fields, report_config
from selfray.generate import generate
from selfray.models import language_memory, small_decoder
from selfray.report_config import DecoderConfig, LanguageStage, ReportConfig
from selfray.summary import write_summary

SIDE = 64
ENCODER = "random:vit_pico/16@64"
SPLITS = ("train",) * 40 + ("validate",) * 10 + ("test",) * 24
WITH = "There is a small left pleural effusion."
WITHOUT = "No pleural effusion."
CONFIG = ReportConfig(
    visual_tokens=2,
    batch_size=8,
    micro_batch=8,
    max_target_tokens=40,
    max_new_tokens=24,
    precision="float32",
    checkpoint_every=40,
    language=LanguageStage(steps=120, learning_rate=3e-3),
    decoder=DecoderConfig(width=32, depth=1, heads=2, vocabulary=300),
)


def write_dataset(out: Path, report=lambda there, row: None, **info) -> RadiographDataset:
    """Every other image has a bright lower left quarter, and its report an effusion.

    `report` may give another text, from whether there is one and the row's number.
    """
    noise = np.random.default_rng(3)
    described = {"name": "quarters", "origin": "test", "licence": "MIT", "synthetic": True}
    writer = DatasetWriter(
        out,
        DatasetInfo(
            **described | info, findings=("pleural_effusion",), mask_labels=(), pixels="8 bit"
        ),
    )
    for row, split in enumerate(SPLITS):
        there = row % 2
        image = noise.normal(90, 8, (SIDE, SIDE))
        image[SIDE // 2 :, : SIDE // 2] += 120 * there
        text = f"INDICATION: cough\nFINDINGS: {WITH if there else WITHOUT}\nIMPRESSION: as above."
        writer.add(
            {
                "image": encode_png(np.clip(image, 0, 255).astype(np.uint8)),
                "image_id": f"i{row}",
                "patient_id": f"p{row}",
                "study_id": f"s{row}",
                "split": split,
                "view": "PA",
                "pleural_effusion": there,
                "report": report(there, row) or text,
            }
        )
    return writer.finish()


def judged(data: RadiographDataset, out: Path, *encoders: str, **change) -> list[dict]:
    config = replace(CONFIG, **change)
    evaluate(
        encoders or (ENCODER,), data.directory, out, tasks=["reports"], report=ReportTask(config)
    )
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def value(lines: list[dict], writer: str, target: str, metric: str, **others) -> float:
    keys = {"probe": writer, "target": target, "metric": metric} | others
    (line,) = (
        x
        for x in lines
        if all(x.get(k) == v for k, v in keys.items()) and ("reference" in x) == bool(others)
    )
    return line["value"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RadiographDataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "quarters")


@pytest.fixture(scope="module")
def evaluation(data: RadiographDataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "evaluation"
    judged(data, out, ENCODER, "pixels:pca")
    return out


@pytest.fixture(scope="module")
def lines(evaluation: Path) -> list[dict]:
    return [json.loads(line) for line in (evaluation / "results.jsonl").read_text().splitlines()]


def test_what_is_in_the_image_is_written_and_another_image_loses_it(lines):
    """A half of the images has it, so that another patient's is wrong in about half."""
    mine = [line for line in lines if line["encoder"] == ENCODER]
    assert value(mine, "language-model", "macro", "clinical_f1") == 1
    assert value(mine, "language-model", "findings", "bleu_4") == pytest.approx(1)
    assert value(mine, "other-patients-image", "macro", "clinical_f1") < 0.8
    assert value(mine, "nearest-neighbour", "macro", "clinical_f1") == 1
    assert value(mine, "other-patients-neighbour", "macro", "clinical_f1") < 0.8
    gains = {
        (line["probe"], line["reference_probe"]): line
        for line in mine
        if "reference_probe" in line
        and (line["target"], line["metric"]) == ("macro", "clinical_f1_difference")
    }
    for pair in (
        ("language-model", "other-patients-image"),
        ("language-model", "other-patients-neighbour"),
        ("nearest-neighbour", "other-patients-neighbour"),
    ):
        assert gains[pair]["ci_low"] > 0 and gains[pair]["p_value"] < 0.01


def test_neighbours_are_shuffled_as_the_images_that_the_language_model_is_given(evaluation):
    """Here both write without an error what an image shows, so that they agree on any image."""
    table = pq.read_table(evaluation / "reports.parquet").to_pylist()
    rows = [row for row in table if row["encoder"] == ENCODER]
    written = {
        writer: {row["image_id"]: row["generated"] for row in rows if row["writer"] == writer}
        for writer in ("other-patients-image", "other-patients-neighbour", "nearest-neighbour")
    }
    assert written["other-patients-neighbour"] == written["other-patients-image"]
    assert written["other-patients-neighbour"] != written["nearest-neighbour"]


def test_reports_of_before_a_writer_was_added_are_judged_without_it(evaluation):
    table = pq.read_table(evaluation / "reports.parquet")
    older = table.filter(pc.field("encoder") == ENCODER)
    older = older.filter(pc.field("writer") != "other-patients-neighbour")
    found = score_reports({ENCODER: older}, seed=0)
    assert {x["probe"] for x in found} == {
        "language-model", "other-patients-image", "nearest-neighbour", "most-frequent",
    }  # fmt: skip
    assert {x["probe"] for x in found if "reference" in x} == {"language-model"}


def test_the_table_holds_both_texts_of_every_test_study_and_writer(evaluation, data):
    table = pq.read_table(evaluation / "reports.parquet").to_pylist()
    assert len(table) == 24 * 5 * 2
    truth = dict(zip(data.column("image_id"), data.column("pleural_effusion"), strict=True))
    for row in table:
        assert row["reference"] == (WITH if truth[row["image_id"]] else WITHOUT)
        assert row["prompt"] == "Indication: cough" and row["section"] == "findings"
    common = {row["generated"] for row in table if row["writer"] == "most-frequent"}
    assert len(common) == 1 and common <= {WITH, WITHOUT}


def test_differences_of_encoders_are_mirrored_and_those_of_writers_name_them(lines):
    key = ("language-model", "findings", "rouge_l_difference")
    found = {
        (x["encoder"], x["reference"]): x
        for x in lines
        if (x["probe"], x["target"], x["metric"]) == key and "reference_probe" not in x
    }
    one, other = found[ENCODER, "pixels:pca"], found["pixels:pca", ENCODER]
    assert one["value"] == pytest.approx(-other["value"])
    assert one["p_value"] == other["p_value"]
    writers = {(x["probe"], x["reference_probe"]) for x in lines if "reference_probe" in x}
    assert writers == {
        ("language-model", "other-patients-image"),
        ("language-model", "nearest-neighbour"),
        ("language-model", "other-patients-neighbour"),
        ("language-model", "most-frequent"),
        ("nearest-neighbour", "other-patients-neighbour"),
    }


def test_what_cannot_be_computed_says_which_file_is_missing(lines):
    (line,) = (
        x
        for x in lines
        if x["metric"] == "radgraph_rg_er"
        and (x["encoder"], x["probe"]) == (ENCODER, "language-model")
    )
    assert line["value"] is None and "--radgraph" in line["reason"]


def test_reports_of_no_phantom_have_no_findings_read_and_say_so(tmp_path):
    data = write_dataset(tmp_path / "data", synthetic=False)
    found = judged(data, tmp_path / "out", language=replace(CONFIG.language, steps=2), seed=5)
    assert [model.parent.name for model in (tmp_path / "out").rglob("model")] == ["seed-5"]
    clinical = [line for line in found if line["metric"].startswith("clinical")]
    assert clinical and all("chexbert.pth" in line["reason"] for line in clinical)
    assert value(found, "nearest-neighbour", "findings", "rouge_l") is not None


def test_a_finished_evaluation_runs_nothing_again(data, evaluation, monkeypatch):
    monkeypatch.setattr(writing, "train_report_model", lambda *a, **k: pytest.fail("trained"))
    monkeypatch.setattr(writing, "generate_reports", lambda *a, **k: pytest.fail("written"))
    before = (evaluation / "results.jsonl").read_bytes()
    judged(data, evaluation, ENCODER, "pixels:pca")
    assert (evaluation / "results.jsonl").read_bytes() == before


def test_an_interrupted_writing_goes_on_with_what_is_there(data, evaluation, tmp_path, monkeypatch):
    real, asked = writing.generate_reports, []

    def broken(model, tokens, rows, prompts, **settings):
        asked.append(len(rows))
        for k, batch in enumerate(real(model, tokens, rows, prompts, **settings)):
            if len(asked) == 1 and k == 1:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(writing, "generate_reports", broken)
    monkeypatch.setattr(writing, "_WRITING_BATCH", 10)
    with pytest.raises(KeyboardInterrupt):
        judged(data, tmp_path / "out", ENCODER)
    (kept,) = (tmp_path / "out").rglob(".language-model.jsonl")
    with kept.open("a") as file:
        file.write('[3, "a torn li')  # as a kill leaves it
    judged(data, tmp_path / "out", ENCODER)
    assert asked == [24, 14, 24]
    whole, resumed = (
        [r for r in pq.read_table(out / "reports.parquet").to_pylist() if r["encoder"] == ENCODER]
        for out in (evaluation, tmp_path / "out")
    )
    assert resumed == whole
    assert not list((tmp_path / "out").rglob(".*.jsonl"))


def test_a_training_is_not_gone_on_with_for_an_encoder_of_other_weights(
    data, tmp_path, monkeypatch
):
    """Whoever removes the kept tokens and parts, as errors advise, leaves the checkpoints."""

    def tokens(weights: str):
        array = np.zeros((len(SPLITS), 2, 2, 8), np.float16)
        rows = np.arange(len(SPLITS))
        return lambda _: writing.ImageTokens("run", weights, torch.device("cpu"), array, rows)

    def judge(weights: str) -> None:
        writing.judge_reports(tokens(weights), data, tmp_path / "out", config=CONFIG)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(writing, "train_report_model", interrupted)
        judge("a" * 64)
    for part in (tmp_path / "out").glob("*.parquet"):
        part.unlink()
    monkeypatch.setattr(writing, "train_report_model", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(InputError, match="out is of other weights_sha256 than now"):
        judge("b" * 64)


def test_a_language_model_of_other_weights_at_the_same_path_is_noticed(data, evaluation, tmp_path):
    (made,) = evaluation.glob("reports/random*/seed-0/model")
    language = tmp_path / "lm"
    shutil.copytree(made, language, ignore=shutil.ignore_patterns("projector*", "report_model*"))
    out, few = tmp_path / "out", replace(CONFIG.language, steps=2)
    judged(data, out, ENCODER, language_model=str(language), language=few)
    before = (out / "results.jsonl").read_bytes()
    weights = load_file(language / "model.safetensors")
    changed = {name: tensor * 1.01 for name, tensor in weights.items()}
    save_file(changed, language / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="is of other language model than now"):
        judged(data, out, ENCODER, language_model=str(language), language=few)
    assert (out / "results.jsonl").read_bytes() == before


@pytest.mark.parametrize("candidates", [1, 3])
def test_generate_writes_for_files_what_the_evaluation_wrote(data, tmp_path, candidates):
    """Drawn reports too: what is drawn depends on the image, not on its place."""
    evaluation = tmp_path / "evaluation"
    judged(data, evaluation, ENCODER, "pixels:pca", image_dropout=0.1, candidates=candidates)
    rows = data.rows("test")[:4]
    files = []
    for row in rows.tolist():
        files.append(tmp_path / f"{row}.png")
        Image.fromarray(data.pixels(row)).save(files[-1])
    reports = list(generate(evaluation, files, encoder=ENCODER, prompt="Indication: cough"))
    table = pq.read_table(evaluation / "reports.parquet").to_pylist()
    written = {
        row["image_id"]: row["generated"]
        for row in table
        if (row["encoder"], row["writer"]) == (ENCODER, "language-model")
    }
    assert reports == [written[data.column("image_id")[row]] for row in rows]
    with pytest.raises(InputError, match="report models of 2 encoders"):
        list(generate(evaluation, files))
    with pytest.raises(InputError, match="holds no report model"):
        list(generate(tmp_path, files))


def test_a_report_model_that_does_not_fit_into_memory_is_refused(evaluation, tmp_path, monkeypatch):
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "black.png")
    monkeypatch.setattr(language_memory, "free_memory", lambda device: 1000)
    with pytest.raises(InputError, match=r"cpu has 0\.0 GB free. Write where there is more"):
        list(generate(evaluation, [tmp_path / "black.png"], encoder=ENCODER))


def test_the_model_of_another_encoder_is_refused(evaluation, tmp_path):
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "black.png")
    (model,) = evaluation.glob("reports/random*/seed-0/model")
    with pytest.raises(InputError, match="other weights than the encoder"):
        list(generate(model, [tmp_path / "black.png"], encoder="random:vit_pico/8@64"))


def test_evaluations_of_the_same_studies_are_joined_and_others_refused(data, evaluation, tmp_path):
    judged(data, tmp_path / "one", ENCODER)
    judged(data, tmp_path / "other", "pixels:16x16")
    compare([tmp_path / "one", tmp_path / "other"], tmp_path / "joined")
    found = (tmp_path / "joined" / "results.jsonl").read_text().splitlines()
    joined = [json.loads(line) for line in found]
    assert {line["encoder"] for line in joined} == {ENCODER, "pixels:16x16"}
    assert any(line.get("reference") == "pixels:16x16" for line in joined)
    judged(data, tmp_path / "short", "pixels:16x16", target="impression")
    with pytest.raises(InputError, match="another part of the reports"):
        compare([tmp_path / "one", tmp_path / "short"], tmp_path / "wrong")


def test_two_report_models_of_one_encoder_are_compared_by_their_evaluations_names(
    data, evaluation, lines, tmp_path
):
    """The numbers stay those of each evaluation."""
    steps = replace(CONFIG.language, steps=2)
    short = judged(data, tmp_path / "short", ENCODER, language=steps)
    joined = compare([evaluation, tmp_path / "short"], tmp_path / "joined")
    rows = [json.loads(line) for line in (joined / "results.jsonl").read_text().splitlines()]
    names = [f"{ENCODER} (evaluation)", f"{ENCODER} (short)", "pixels:pca"]
    assert {row["encoder"] for row in rows} == set(names)
    for name, of in zip(names, (lines, short), strict=False):
        for metric, target in (("clinical_f1", "macro"), ("bleu_4", "findings")):
            mine = [row for row in of if row["encoder"] == ENCODER]
            both = [row for row in rows if row["encoder"] == name]
            written = [value(x, "language-model", target, metric) for x in (mine, both)]
            assert written[0] == written[1]
    pairs = {(row["encoder"], row["reference"]) for row in rows if "reference" in row}
    assert (names[0], names[1]) in pairs and (names[1], names[0]) in pairs
    described = json.loads((joined / "evaluation.json").read_text())
    assert sorted(of["name"] for of in described["encoders"]) == sorted(names)
    assert described["report"] is None  # they differ
    assert names[1] in write_summary(joined).read_text()


def test_the_nearest_neighbour_is_that_of_scikit_learn(data, evaluation):
    """By cosine of the mean patch token, each feature less its training mean, over its spread."""
    studies = report_studies(data, "findings", ())
    (kept,) = evaluation.glob("reports/tokens/*/last-block/patch_tokens.npy")
    tokens = np.load(kept)[:, -1].astype(np.float64).mean(axis=(1, 2))
    rows = np.sort(np.concatenate([of.rows for of in studies.values()]))
    at = {row: k for k, row in enumerate(rows.tolist())}
    train, test = (tokens[[at[row] for row in studies[split].rows]] for split in ("train", "test"))
    scale = lambda x: (x - train.mean(axis=0)) / train.std(axis=0)  # noqa: E731
    nearest = NearestNeighbors(n_neighbors=1, metric="cosine").fit(scale(train))
    wanted = [studies["train"].targets[k] for k in nearest.kneighbors(scale(test))[1][:, 0]]
    table = pq.read_table(evaluation / "reports.parquet").to_pylist()
    key = (ENCODER, "nearest-neighbour")
    assert [r["generated"] for r in table if (r["encoder"], r["writer"]) == key] == wanted


def test_everybody_gets_another_patients_image_each_once():
    patients = np.array([f"p{k}" for k in (0, 0, 0, 1, 2, 2, 3, 4, 4, 5)])
    for seed in range(20):
        found = writing.other_patients(patients, seed)
        assert sorted(found) == list(range(10))
        assert (patients[found] != patients).all()
    assert (writing.other_patients(patients, 0) != writing.other_patients(patients, 1)).any()
    with pytest.raises(InputError, match="3 of the 5 test studies"):
        writing.other_patients(np.array(["a", "a", "a", "b", "c"]), 0)


def test_a_study_is_read_by_its_first_frontal_image(tmp_path):
    info = DatasetInfo(
        name="n", origin="o", licence="MIT", synthetic=True, findings=(), mask_labels=(), pixels="8"
    )
    writer = DatasetWriter(tmp_path / "data", info)
    black = encode_png(np.zeros((SIDE, SIDE), np.uint8))
    views = {"train": ("LL", "PA", "PA"), "validate": ("AP", None), "test": ("LL",)}
    for split, of in views.items():
        for k, view in enumerate(of):
            writer.add(
                {"image": black, "image_id": f"{split}{k}", "patient_id": split, "view": view,
                 "study_id": split, "split": split, "report": "FINDINGS: Clear."}
            )  # fmt: skip
    found = report_studies(writer.finish(), "findings", ())
    assert {split: of.rows.tolist() for split, of in found.items()} == {
        "train": [1], "validate": [3], "test": [5],
    }  # fmt: skip


def test_studies_without_the_section_are_counted_and_a_split_of_none_refused(tmp_path):
    def report(there: int, row: int) -> str | None:
        return "IMPRESSION: Normal study." if row in (1, 3, 5) else None

    data = write_dataset(tmp_path / "some", report)
    train = report_studies(data, "findings", ())["train"]
    assert len(train.rows) == 37 and train.left_out == {"report without findings": 3}
    data = write_dataset(tmp_path / "none", lambda there, row: "IMPRESSION: Normal study.")
    with pytest.raises(InputError, match="no image of the train split has a report with findings"):
        report_studies(data, "findings", ())


def test_indications_that_leave_no_room_for_a_report_are_cut_and_counted(
    tmp_path, monkeypatch, capsys
):
    """Otherwise one long indication would stop the training, or be read beyond the positions."""
    monkeypatch.setattr(small_decoder, "_LONGEST", 100)
    long = "INDICATION: " + "Dry cough. " * 100

    def report(there: int, row: int) -> str:
        return f"{long if row in (3, 5, 60) else 'INDICATION: cough'}\nFINDINGS: {WITHOUT}"

    data = write_dataset(tmp_path / "data", report)
    judged(data, tmp_path / "out", language=replace(CONFIG.language, steps=2))
    said = capsys.readouterr().err
    why = "leave the report no room among the language model's positions and end early"
    assert f"2 of 40 training prompts {why}" in said and f"1 of 24 test prompts {why}" in said


def test_the_page_shows_both_texts_with_words_that_differ_marked(evaluation):
    page = write_summary(evaluation).read_text()
    assert "Reports by the language model" in page and "Clinical F1, macro" in page
    assert WITH in page and "Indication: cough" in page
    assert page.count('<td class="protocol">other patient&#x27;s neighbour</td>') == 2  # encoders


def test_the_page_says_which_findings_were_found_missed_and_invented(evaluation, tmp_path):
    copy = tmp_path / "e"
    shutil.copytree(evaluation, copy)
    table = pq.read_table(copy / "reports.parquet")
    rows = table.to_pylist()
    for row in rows:
        row["reference_findings"] = ["nodule", "rib_fracture"]
        row["generated_findings"] = ["nodule", "atelectasis"]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), copy / "reports.parquet")
    page = write_summary(copy).read_text()
    told = [
        '<span class="found">found: nodule</span>',
        '<span class="missed">missed: rib fracture</span>',
        '<span class="invented">invented: atelectasis</span>',
    ]
    assert page.count(" · ".join(told)) == 10  # five of each encoder
    assert "<summary>Reports through PCA of the pixels</summary>" in page
    for row in rows:
        row["reference_findings"] = row["generated_findings"] = []
    pq.write_table(pa.Table.from_pylist(rows, table.schema), copy / "reports.parquet")
    assert write_summary(copy).read_text().count("no finding in either") == 10


def test_options_of_reports_need_the_task(data, tmp_path):
    with pytest.raises(InputError, match="is for --tasks reports"):
        evaluate((ENCODER,), data.directory, tmp_path / "out", report=ReportTask(CONFIG))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("reader", "package"), [("chexbert", "f1chexbert"), ("radgraph", "radgraph")]
)
def test_readers_that_cannot_be_opened_are_refused_before_anything_is_computed(
    data, tmp_path, monkeypatch, reader, package
):
    """A language model may have been trained for days when they are needed."""
    found = ModuleType(package)
    for name in (package, f"{package}.{package}"):
        monkeypatch.setitem(sys.modules, name, found)

    def refused(match: str) -> None:
        task = ReportTask(CONFIG, **{reader: tmp_path / "weights"})
        with pytest.raises(InputError, match=match):
            evaluate((ENCODER,), data.directory, tmp_path / "out", tasks=["reports"], report=task)
        assert not (tmp_path / "out").exists()

    refused(f"{tmp_path / 'weights'} has no .*StanfordAIMI/RRG_scorers")
    for name in (package, f"{package}.{package}"):
        monkeypatch.setitem(sys.modules, name, None)
    refused(f"needs the package {package}")


def test_the_options_that_a_task_names_give_the_same_task():
    config = replace(CONFIG, prompt_sections=(), activation_checkpointing=True)
    task = ReportTask(config, chexbert=Path("weights"))
    parser = argparse.ArgumentParser()
    add_report_fields(parser)
    options = task.options()
    assert options[-2:] == ["--chexbert", "weights"]
    assert report_config(parser.parse_args(options[:-2])) == task.config


def test_a_test_split_of_one_patient_is_refused_before_training(data, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "train_report_model", lambda *a, **k: pytest.fail("trained"))
    real = RadiographDataset.column

    def column(self: RadiographDataset, name: str) -> np.ndarray:
        values = real(self, name)
        return np.full(len(values), "p", object) if name == "patient_id" else values

    monkeypatch.setattr(RadiographDataset, "column", column)
    with pytest.raises(InputError, match="24 of the 24 test studies"):
        judged(data, tmp_path / "out")


def test_intervals_over_seeds_stay_within_0_and_1_and_missing_ones_have_a_reason(data, tmp_path):
    steps = replace(CONFIG.language, steps=4)
    evaluate(
        (ENCODER,), data.directory, tmp_path / "out", tasks=["reports"], probe_seeds=2,
        report=ReportTask(replace(CONFIG, language=steps)),
    )  # fmt: skip
    found = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    for line in map(json.loads, found):
        if "reference" not in line and line["value"] is not None:
            if line["ci_low"] is None:
                assert "no interval" in line["reason"]
            else:
                assert 0 <= line["ci_low"] <= line["value"] <= line["ci_high"] <= 1
    table = pq.read_table(tmp_path / "out" / "reports.parquet").to_pylist()
    seeds = {(row["writer"], row["seed"]) for row in table}
    drawn = ("language-model", "other-patients-image", "other-patients-neighbour")
    assert {of for of in seeds if of[1] == 1} == {(writer, 1) for writer in drawn}
    assert len(seeds) == 2 * len(drawn) + 2
