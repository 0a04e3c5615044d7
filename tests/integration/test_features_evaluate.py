"""Features and evaluation, end to end on a small dataset whose labels are planted in the pixels."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.errors import InputError, Interrupted
from selfray.evals.bootstrap import PatientResamples
from selfray.evaluate import compare, evaluate, results_table
from selfray.evaluate.patch_tokens import PatchTokens
from selfray.feature_directory import open_features
from selfray.features import extract_features
from selfray.models.encoder import Encoder, Tokens
from selfray.models.preprocessing import Preprocessing
from selfray.models.published import load_encoder

SIZE = 32


def planted(finding: float, female: bool, age: float, noise: np.random.Generator) -> np.ndarray:
    """A finding is a bright corner, sex a bright edge, age the brightness of the middle."""
    image = noise.normal(100, 12, (SIZE, SIZE))
    image[:10, :10] += 40 * finding
    image[:, -4:] += 25 * female
    image[12:20, 12:20] += age - 50
    return np.clip(image, 0, 255).astype(np.uint8)


def write_dataset(
    out: Path,
    *,
    patients: int = 90,
    splits: tuple[str, ...] = ("train", "validate", "test"),
    **change,
) -> Path:
    """Two images a patient; `change` maps a column to a function of (row, split) that sets it."""
    info = DatasetInfo(
        name="planted",
        origin="test",
        licence="MIT",
        synthetic=True,
        findings=("effusion", "noise"),
        mask_labels=(),
        pixels="8 bit",
    )
    writer = DatasetWriter(out, info, rows_per_shard=64)
    noise = np.random.default_rng(7)
    for patient in range(patients):
        split = splits[patient % len(splits)]
        female, age = bool(noise.integers(2)), float(noise.uniform(20, 80))
        for image in range(2):
            finding = int(noise.integers(2))
            row = {
                "image": encode_png(planted(finding, female, age, noise)),
                "image_id": f"i{patient}-{image}",
                "patient_id": f"p{patient}",
                "study_id": f"s{patient}",
                "split": split,
                "sex": "F" if female else "M",
                "age_years": age,
                "effusion": finding if noise.random() < 0.9 else None,
                "noise": int(noise.integers(2)),
            }
            row |= {column: value(row, split) for column, value in change.items()}
            writer.add(row)
    writer.finish()
    return out


class Means(torch.nn.Module):
    """Means over a grid of cells; it counts the images it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.fail_after: int | None = None
        self.poison_row: int | None = None

    def forward(self, images: torch.Tensor) -> Tokens:
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        patches = torch.nn.functional.avg_pool2d(images[:, :1], 8)  # [B, 1, 4, 4]
        patches = torch.cat([patches, patches**2, patches.abs(), 1 + patches], dim=1)
        cls = patches.flatten(1)[:, :4].clone()
        if self.poison_row is not None and self.seen <= self.poison_row < self.seen + len(images):
            cls[self.poison_row - self.seen] = torch.nan
        self.seen += len(images)
        return Tokens(cls, patches.flatten(2).transpose(1, 2))


def stand_in(name: str) -> Encoder:
    return Encoder(
        name,
        Means(),
        Preprocessing(32, (0.5,) * 3, (0.25,) * 3, 32),
        width=4,
        grid=(4, 4),
        weights_sha256=name.ljust(64, "0"),
        synthetic=True,
    )


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> dict[str, Encoder]:
    """Stand-ins by name, given out by `load_encoder`."""
    loaded: dict[str, Encoder] = {}
    monkeypatch.setattr(
        "selfray.features.load_encoder", lambda name: loaded.setdefault(name, stand_in(name))
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # images in order, so that they can be counted
    return loaded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "planted")


def read_lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def find(lines: list[dict], **fields) -> dict:
    """The one line with these fields; of all test images where no subgroup is asked for."""
    fields = {"grouped_by": None} | fields
    found = [line for line in lines if all(line.get(k) == v for k, v in fields.items())]
    assert len(found) == 1, (fields, found)
    return found[0]


def test_features_are_the_encoders_own_in_the_datasets_order(tmp_path, data, encoders):
    out = extract_features("a", data, tmp_path / "f", batch_size=7, patch_tokens=True)
    features = open_features(out)
    assert isinstance(features.cls, np.memmap) and features.cls.dtype == np.float32
    dataset = RadiographDataset(data)
    encoder = stand_in("fresh")
    for row in (0, 8, 179):
        cls, patches = encoder.features(encoder.preprocess(dataset.pixels(row))[None])
        np.testing.assert_array_equal(features.cls[row], cls[0])
        np.testing.assert_allclose(features.patch_mean[row], patches[0].mean(dim=(1, 2)), rtol=1e-6)
        tokens = np.load(out / "patch_tokens.npy", mmap_mode="r")
        np.testing.assert_array_equal(tokens[row], patches[0].permute(1, 2, 0).half())
    assert features.rows["image_id"].to_pylist() == list(dataset.column("image_id"))
    assert not {"image", "mask", "finding_mask"} & set(features.rows.column_names)
    assert features.manifest["dataset"]["fingerprint"] == dataset.fingerprint


def test_an_interrupted_extraction_continues_after_the_last_flushed_rows(
    tmp_path, data, encoders, monkeypatch
):
    monkeypatch.setattr("selfray.feature_directory.CHUNK_ROWS", 40)
    whole = open_features(extract_features("a", data, tmp_path / "whole", batch_size=10))
    encoders["a"].model.fail_after = encoders["a"].model.seen + 90
    with pytest.raises(Interrupted):
        extract_features("a", data, tmp_path / "f", batch_size=10)
    assert not (tmp_path / "f").exists()
    encoders["a"].model.fail_after, encoders["a"].model.seen = None, 0
    again = open_features(extract_features("a", data, tmp_path / "f", batch_size=10))
    assert encoders["a"].model.seen == 180 - 80  # 90 rows were done, 80 flushed
    np.testing.assert_array_equal(again.cls, whole.cls)
    np.testing.assert_array_equal(again.patch_mean, whole.patch_mean)
    assert not (tmp_path / "f.partial").exists()


@pytest.mark.parametrize("kind", ["features", "patch tokens"])
def test_an_extraction_stopped_while_its_plan_was_written_begins_anew(
    tmp_path, data, monkeypatch, kind
):
    encoder, out = "random:vit_pico/16@64", tmp_path / "last-block"

    def extract() -> None:
        if kind == "features":
            extract_features(encoder, data, out)
            return
        dataset = RadiographDataset(data)
        rows = np.sort(dataset.rows("test"))
        PatchTokens(load_encoder(encoder), dataset, rows, tmp_path).of_last_block()

    def stopped(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises((Interrupted, KeyboardInterrupt)):
        patch.setattr("selfray.data.dataset.os.fsync", stopped)
        extract()
    left = {file.name for file in (tmp_path / "last-block.partial").iterdir()}
    assert left == {"lock", ".plan.json.partial"}
    extract()
    assert (out / "manifest.json").exists() and not (out / ".plan.json.partial").exists()


def test_an_extraction_stopped_just_before_its_end_is_taken_up_again(
    tmp_path, data, encoders, monkeypatch
):
    rename = Path.rename

    def stopped(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        extract_features("a", data, tmp_path / "f")
    monkeypatch.setattr(Path, "rename", rename)
    seen = encoders["a"].model.seen
    features = open_features(extract_features("a", data, tmp_path / "f"))
    assert encoders["a"].model.seen == seen == len(features.cls)
    assert {p.name for p in (tmp_path / "f").iterdir()} == {
        "cls.npy", "patch_mean.npy", "rows.parquet", "manifest.json", "left_out.jsonl"
    }  # fmt: skip


def test_a_second_extraction_does_nothing(tmp_path, data, encoders):
    extract_features("a", data, tmp_path / "f")
    seen = encoders["a"].model.seen
    extract_features("a", data, tmp_path / "f")
    assert encoders["a"].model.seen == seen == 180


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("encoder", lambda e: setattr(e, "weights_sha256", "f" * 64)),
        (
            "preprocessing",
            lambda e: setattr(e, "preprocessing", Preprocessing(32, (0.4,) * 3, (0.25,) * 3)),
        ),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_features_of_another_encoder_are_refused_by_name(
    tmp_path, data, encoders, monkeypatch, what, change, finished
):
    monkeypatch.setattr("selfray.feature_directory.CHUNK_ROWS", 40)
    encoders["a"] = stand_in("a")
    encoders["a"].model.fail_after = None if finished else 90
    if finished:
        extract_features("a", data, tmp_path / "f")
    else:
        with pytest.raises(Interrupted):
            extract_features("a", data, tmp_path / "f")
    change(encoders["a"])
    with pytest.raises(InputError, match=f"features of another {what}"):
        extract_features("a", data, tmp_path / "f")


def test_features_of_another_dataset_are_refused_by_name(tmp_path, data, encoders):
    other = write_dataset(tmp_path / "other", patients=91)
    extract_features("a", data, tmp_path / "f")
    with pytest.raises(InputError, match="features of another dataset"):
        extract_features("a", other, tmp_path / "f")
    with pytest.raises(InputError, match="features of another dataset"):
        evaluate([str(tmp_path / "f")], other, tmp_path / "e")


def test_a_feature_that_is_not_finite_stops_with_its_row(tmp_path, data, encoders):
    encoders["a"] = stand_in("a")
    encoders["a"].model.poison_row = 101
    with pytest.raises(InputError, match="row 101 "):
        extract_features("a", data, tmp_path / "f")
    assert not (tmp_path / "f").exists()


def test_an_output_directory_that_holds_something_else_is_left_alone(tmp_path, data, encoders):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(InputError, match="thesis"):
        extract_features("a", data, tmp_path / "thesis")
    with pytest.raises(InputError, match="thesis"):
        evaluate(["pixels:16x16"], data, tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter1.tex"]


def test_pixel_components_are_those_of_the_training_images_alone(tmp_path, data):
    from sklearn.decomposition import PCA

    features = open_features(extract_features("pixels:pca", data, tmp_path / "f"))
    assert features.patch_mean is None
    dataset = RadiographDataset(data)
    import cv2

    pixels = np.stack(
        [
            cv2.resize(dataset.pixels(r), (56, 56), interpolation=cv2.INTER_AREA).ravel() / 255
            for r in range(len(dataset))
        ]
    )
    exact = PCA(svd_solver="full").fit(pixels[dataset.rows("train")]).transform(pixels)
    leading = np.abs(np.asarray(features.cls)[:, :5])  # a component's sign is arbitrary
    np.testing.assert_allclose(leading, np.abs(exact[:, :5]), atol=1e-3)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    out = tmp_path_factory.mktemp("evaluation") / "e"
    return evaluate(["pixels:16x16", "pixels:pca"], data, out, seed=3)


def test_planted_signals_are_found_and_noise_is_not(evaluation):
    lines = read_lines(evaluation)
    common = {"encoder": "pixels:16x16", "probe": "linear", "reference": None}
    for target in ("effusion", "sex"):
        line = find(lines, target=target, metric="auroc", **common)
        # Where no image is on the wrong side, m patients give 0.025 ** (1 / m): 0.78 of 15.
        assert line["value"] > 0.98 and line["ci_low"] > 0.75
    assert find(lines, target="age_years", metric="r2", **common)["ci_low"] > 0.8
    noise = find(lines, target="noise", metric="auroc", **common)
    assert noise["ci_low"] < 0.5 < noise["ci_high"]
    assert (
        find(
            lines,
            target="effusion",
            encoder="pixels:pca",
            probe="knn",
            metric="auroc",
            reference=None,
        )["value"]
        > 0.7
    )


def test_every_line_keeps_the_contract(evaluation):
    lines = read_lines(evaluation)
    for line in lines:
        assert {"encoder", "task", "target", "metric", "value", "ci_low", "ci_high"} <= set(line)
        assert {"n", "n_patients", "split", "seed", "features", "probe"} <= set(line)
        assert line["split"] == "test" and line["seed"] == 3
        if line["value"] is None:
            assert line["reason"]
        elif line["metric"] == "ece":
            assert line["ci_low"] is None  # its resamples are biased, see docs/statistics.md
        elif line["ci_low"] is None:  # of a perfect score that is no share, no resample differs
            assert line["value"] in (0, 1) and line["ci_high"] is None
        else:
            assert line["ci_low"] <= line["ci_high"]
            assert line["ci_low"] < line["ci_high"] or line["metric"].endswith(
                ("_difference", "rank")
            )
    effusion = find(lines, encoder="pixels:pca", target="effusion", metric="auroc", probe="linear")
    assert effusion["n_patients"] <= 30 and effusion["n"] < 60  # nulls are left out
    assert (
        find(lines, encoder="pixels:pca", target="noise", metric="auprc", probe="linear")["n"] == 60
    )
    description = json.loads((evaluation / "evaluation.json").read_text())
    assert description["dataset"]["synthetic"] is True
    assert [e["name"] for e in description["encoders"]] == ["pixels:16x16", "pixels:pca"]


def test_numbers_can_be_recomputed_from_the_predictions(evaluation):
    table = pq.read_table(evaluation / "predictions.parquet").to_pandas()
    values = []
    for target in ("effusion", "noise"):
        chosen = table.query("encoder == 'pixels:pca' and probe == 'linear' and target == @target")
        chosen = chosen.dropna(subset="label")
        values.append(roc_auc_score(chosen["label"], chosen["prediction"]))
        line = find(
            read_lines(evaluation),
            encoder="pixels:pca",
            target=target,
            metric="auroc",
            probe="linear",
        )
        assert line["value"] == pytest.approx(values[-1], abs=1e-12)
        assert line["prevalence"] == pytest.approx(chosen["label"].mean())
    macro = find(
        read_lines(evaluation), encoder="pixels:pca", target="macro", metric="auroc", probe="linear"
    )
    assert macro["value"] == pytest.approx(np.mean(values))


def bca(point: float, values: np.ndarray, left_out: np.ndarray, patients: int) -> list[float]:
    """Efron's interval, by the formulas of the book, expanded as for a mean of few values."""
    share = ((values < point).sum() + (values == point).sum() / 2) / len(values)
    influence = left_out.mean() - left_out
    a = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    reach = np.sqrt(patients / (patients - 1)) * stats.t(patients - 1).ppf(0.975)
    z0 = stats.norm.ppf(share)
    ends = [z0 + (z0 + z) / (1 - a * (z0 + z)) for z in (-reach, reach)]
    return [float(np.quantile(values, stats.norm.cdf(end))) for end in ends]


def test_intervals_and_paired_differences_are_of_resampled_patients(evaluation):
    """Recomputed from the predictions with a patient's images gathered by name."""
    table = pq.read_table(evaluation / "predictions.parquet").to_pandas()
    table = table.query("target == 'noise' and probe == 'linear'").dropna(subset="label")
    names = ("pixels:16x16", "pixels:pca")
    one, two = (table.query("encoder == @name") for name in names)
    label, patient = one["label"].to_numpy(), one["patient_id"].to_numpy()
    images = [np.flatnonzero(patient == name) for name in sorted(set(patient))]

    def aurocs(times: np.ndarray) -> list[float]:
        rows = np.concatenate([images[p] for p, n in enumerate(times) for _ in range(n)])
        sick, well = rows[label[rows] == 1], rows[label[rows] == 0]
        return [
            np.mean((1 + np.sign(p.to_numpy()[sick][:, None] - p.to_numpy()[well])) / 2)
            for p in (one["prediction"], two["prediction"])
        ]

    every = np.ones(len(images), int)
    points = np.array(aurocs(every))
    drawn = np.array([aurocs(n) for n in PatientResamples(patient, seed=3).multiplicity])
    left_out = np.array([aurocs(every - np.eye(len(images), dtype=int)[p]) for p in range(30)])
    of_class = min(len(set(patient[label == value])) for value in (0, 1))
    lines = read_lines(evaluation)
    single = find(lines, encoder=names[1], target="noise", metric="auroc", probe="linear")
    paired = find(
        lines, encoder=names[1], target="noise", metric="auroc_difference", probe="linear"
    )
    for line, weigh in ((single, [0, 1]), (paired, [-1, 1])):
        expected = bca(points @ weigh, drawn @ weigh, left_out @ weigh, of_class)
        np.testing.assert_allclose([line["ci_low"], line["ci_high"]], expected, atol=1e-6)


def test_paired_differences_are_antisymmetric_and_tighter_than_unpaired(evaluation):
    lines = read_lines(evaluation)
    for target, metric in (("macro", "auroc"), ("sex", "auroc"), ("age_years", "r2")):
        a, b = (
            find(lines, encoder=e, target=target, metric=f"{metric}_difference", probe="linear")
            for e in ("pixels:16x16", "pixels:pca")
        )
        assert a["reference"] == "pixels:pca"
        assert a["value"] == pytest.approx(-b["value"])
        assert a["ci_low"] == pytest.approx(-b["ci_high"])
    single = [
        find(lines, encoder=e, target="noise", metric="auroc", probe="linear")
        for e in ("pixels:16x16", "pixels:pca")
    ]
    paired = find(
        lines, encoder="pixels:pca", target="noise", metric="auroc_difference", probe="linear"
    )
    unpaired = np.hypot(*(line["ci_high"] - line["ci_low"] for line in single))
    assert paired["ci_high"] - paired["ci_low"] < unpaired


def test_an_encoder_compared_with_itself_differs_by_exactly_nothing(tmp_path, data):
    copy = str(extract_features("pixels:pca", data, tmp_path / "copy"))
    out = evaluate([copy, "pixels:pca"], data, tmp_path / "e", baseline="pixels:pca")
    differences = [line for line in read_lines(out) if "reference" in line]
    assert differences and {line["encoder"] for line in differences} == {copy}
    assert {(line["value"], line["ci_low"], line["ci_high"]) for line in differences} == {(0, 0, 0)}


def test_a_repeated_evaluation_gives_the_same_bytes_and_runs_no_encoder(tmp_path, data, encoders):
    first = evaluate(["a"], data, tmp_path / "e")
    before = (first / "results.jsonl").read_bytes()
    seen = encoders["a"].model.seen
    evaluate(["a"], data, tmp_path / "e")
    assert (first / "results.jsonl").read_bytes() == before
    assert encoders["a"].model.seen == seen
    assert find(read_lines(first), target="sex", metric="auroc", probe="linear")["features"] == (
        "cls+patch_mean"
    )


def test_an_interrupted_evaluation_goes_on_with_the_encoder_that_it_was_at(
    tmp_path, data, encoders
):
    whole = evaluate(["a", "b"], data, tmp_path / "whole")
    once = encoders["a"].model.seen
    encoders["b"].model.fail_after = encoders["b"].model.seen + 32
    with pytest.raises(Interrupted):
        evaluate(["a", "b"], data, tmp_path / "e")
    assert not (tmp_path / "e" / "results.jsonl").exists()
    encoders["b"].model.fail_after = None
    evaluate(["a", "b"], data, tmp_path / "e")
    assert encoders["a"].model.seen == 2 * once  # not a third time
    for name in ("results.jsonl", "predictions.parquet"):
        assert (tmp_path / "e" / name).read_bytes() == (whole / name).read_bytes()


def test_joined_evaluations_give_what_one_evaluation_of_all_gives(tmp_path, data, evaluation):
    parts = [
        evaluate([encoder], data, tmp_path / encoder[-3:], seed=3)
        for encoder in ("pixels:16x16", "pixels:pca")
    ]
    joined = compare(parts, tmp_path / "joined")
    for name in ("results.jsonl", "predictions.parquet", "held_out.parquet", "results.csv"):
        assert (joined / name).read_bytes() == (evaluation / name).read_bytes()


def test_evaluations_that_cannot_be_joined_are_refused_in_one_line(tmp_path, data, evaluation):
    other = write_dataset(tmp_path / "other", patients=45)
    foreign = evaluate(["pixels:16x16"], other, tmp_path / "foreign", seed=3)
    reseeded = evaluate(["pixels:16x16"], data, tmp_path / "reseeded", seed=4)
    fewer = evaluate(["pixels:16x16"], data, tmp_path / "fewer", seed=3, tasks=["classification"])
    relabelled = tmp_path / "relabelled"
    shutil.copytree(evaluation, relabelled)
    table = pq.read_table(relabelled / "held_out.parquet")
    labels = next(name for name in table.column_names if name.startswith("label: "))
    turned = pc.subtract(1.0, table[labels])
    at = table.column_names.index(labels)
    pq.write_table(table.set_column(at, labels, turned), relabelled / "held_out.parquet")
    old = tmp_path / "old"
    old.mkdir()
    (old / "results.jsonl").touch()
    (old / "evaluation.json").write_text('{"format": "selfray-evaluation", "version": 1}')
    for second, message in (
        (foreign, r"foreign and .* differ in test images \(\d+ and \d+\)\. Compare"),
        (reseeded, r"differ in seed \(4 and 3\)\. Compare"),
        (
            fewer,
            r"differ in tasks \(classification and classification \+ metadata\), targets \(only",
        ),
        (relabelled, r"differ in labels of the test images\. Compare"),
        (evaluation, "e is given to --compare twice"),
        (old, "version 1"),
        (data, "no finished evaluation"),
    ):
        with pytest.raises(InputError, match=message) as raised:
            compare([evaluation, second], tmp_path / "joined")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "joined").exists()


def test_one_patient_gives_values_and_no_interval(tmp_path):
    lone = write_dataset(
        tmp_path / "data",
        patients=45,
        patient_id=lambda row, split: "only" if split == "test" else row["patient_id"],
    )
    lines = read_lines(evaluate(["pixels:16x16", "pixels:pca"], lone, tmp_path / "e"))
    known = [line for line in lines if line["value"] is not None]
    assert len(known) > 10 and {line["n_patients"] for line in known} == {1}
    assert all(line["ci_low"] is None and line["ci_high"] is None for line in known)
    assert "[" not in results_table(tmp_path / "e")


def test_a_feature_directory_with_a_number_that_is_not_finite_is_refused(tmp_path, data):
    features = extract_features("pixels:16x16", data, tmp_path / "f")
    values = np.load(features / "cls.npy")
    values[RadiographDataset(data).rows("train")[3], 5] = np.nan
    np.save(features / "cls.npy", values)
    with pytest.raises(InputError, match="row 3 are not finite"):
        evaluate([str(features)], data, tmp_path / "e")


def test_an_encoders_path_may_hold_unusual_characters(tmp_path, data):
    odd = tmp_path / """<img src=x onerror="alert('ü')"> & $HOME; #1 %s"""
    extract_features("pixels:16x16", data, odd)
    out = evaluate([str(odd), "pixels:pca"], data, tmp_path / "e")
    assert {line["encoder"] for line in read_lines(out)} == {str(odd), "pixels:pca"}
    with pytest.raises(InputError, match="cannot be printed") as raised:
        evaluate([f"{odd}\n"], data, tmp_path / "f")
    assert "\n" not in str(raised.value)


def test_the_table_shows_each_encoder_with_intervals(evaluation):
    header, *rows = results_table(evaluation).splitlines()
    assert header.split()[0] == "encoder" and "macro-AUROC" in header and "BMI" not in header
    names = [re.split("  +", row)[0] for row in rows]
    assert names == [
        "pixels:16x16", "pixels:16x16, knn", "pixels:pca", "pixels:pca, knn",
        "pixels:16x16 minus pixels:pca",
    ]  # fmt: skip
    rows = [row for row, name in zip(rows, names, strict=True) if "knn" not in name]
    assert all(row.count("[") == 4 for row in rows)
    one, other, difference = (float(re.split("  +", row)[1].split()[0]) for row in rows)
    assert difference == pytest.approx(one - other, abs=0.0011)  # three numbers, each rounded
    assert re.search(r"  [+-]0\.\d+ \[[+-]", rows[2])


def test_a_finding_of_one_class_in_a_split_is_not_defined_and_says_why(tmp_path):
    def absent_in(split: str):
        return lambda row, where: 0 if where == split else row["noise"]

    for split in ("train", "validate", "test"):
        data = write_dataset(tmp_path / f"data-{split}", patients=45, noise=absent_in(split))
        out = evaluate(["pixels:16x16"], data, tmp_path / f"e-{split}", tasks=["classification"])
        line = find(read_lines(out), target="noise", metric="auroc", probe="linear")
        assert line["value"] is None and split in line["reason"]
        macro = find(read_lines(out), target="macro", metric="auroc", probe="linear")
        effusion = find(read_lines(out), target="effusion", metric="auroc", probe="linear")
        assert macro["value"] == effusion["value"]


def test_a_finding_that_is_never_labelled_is_not_defined(tmp_path):
    data = write_dataset(tmp_path / "data", patients=45, noise=lambda row, split: None)
    out = evaluate(["pixels:16x16"], data, tmp_path / "e")
    line = find(read_lines(out), target="noise", metric="auroc", probe="linear")
    assert line["value"] is None and line["n"] == 0 and "train" in line["reason"]


def test_bad_input_is_refused_in_one_line(tmp_path, data):
    none = write_dataset(
        tmp_path / "none", patients=9, effusion=lambda r, s: None, noise=lambda r, s: None
    )
    unvalidated = write_dataset(tmp_path / "unvalidated", patients=9, splits=("train", "test"))
    cases = [
        ({"encoders": ["pixels:16x16"], "data": none, "tasks": ["classification"]}, "no label"),
        ({"encoders": ["pixels:16x16"], "data": unvalidated}, "validate split"),
        ({"encoders": ["pixels:17x17"], "data": data}, "pixels:16x16"),
        (
            {"encoders": ["pixels:pca"], "data": data, "tasks": ["metdata"]},
            "Did you mean 'metadata'",
        ),
        ({"encoders": ["pixels:pca"], "data": data, "baseline": "pixels:pac"}, "Did you mean"),
        ({"encoders": [], "data": data}, "no encoder"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message) as raised:
            evaluate(**arguments, out=tmp_path / "e")
        assert "\n" not in str(raised.value)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven test patients: one alone has an effusion, five have a label for noise."""

    def effusion(row, split):
        alone = split != "test" or row["patient_id"] == "p5"
        return row["effusion"] if alone or row["effusion"] == 0 else None

    def noise(row, split):
        known = split != "test" or row["patient_id"] in ("p2", "p5", "p8", "p11", "p14")
        return row["noise"] if known else None

    out = tmp_path_factory.mktemp("tiny")
    data = write_dataset(out / "data", patients=21, effusion=effusion, noise=noise)
    return evaluate(["pixels:16x16", "pixels:pca"], data, out / "e", tasks=["classification"])


def test_every_interval_of_an_area_lies_within_0_and_1(tiny):
    ends = [
        line[end]
        for line in read_lines(tiny)
        if line["metric"] in ("auroc", "auprc")
        for end in ("ci_low", "ci_high")
        if line[end] is not None
    ]
    assert len(ends) >= 8 and min(ends) >= 0 and max(ends) <= 1


def test_one_patient_of_a_class_gives_values_and_no_interval(tiny):
    lines = [line for line in read_lines(tiny) if "grouped_by" not in line]
    alone = [line for line in lines if line["target"] == "effusion"]
    assert {line["probe"] for line in alone} == {"linear", "knn"}
    assert any("reference" in line for line in alone)
    assert all(line["value"] is not None and line["n_patients"] > 1 for line in alone)
    assert all(line["ci_low"] is None and line["ci_high"] is None for line in alone)
    others = [line for line in lines if line["target"] in ("noise", "macro")]
    bounded = [line for line in others if line["metric"] != "ece"]
    assert bounded and all(line["ci_low"] <= line["ci_high"] for line in bounded)


def test_a_wrong_encoder_is_refused_before_any_features_are_extracted(tmp_path, data):
    other = write_dataset(tmp_path / "other", patients=12)
    foreign = extract_features("pixels:16x16", other, tmp_path / "foreign")
    for wrong in ("nosuch", "random:vit_nosuch", "pixels:17x17", str(foreign)):
        with pytest.raises(InputError):
            evaluate(["pixels:16x16", wrong], data, tmp_path / "e")
        assert not (tmp_path / "e").exists()


def test_pixel_components_of_repeated_images_are_as_many_as_their_rank(tmp_path):
    noise = np.random.default_rng(5)
    images = [encode_png(planted(k % 2, k > 2, 20 + 9 * k, noise)) for k in range(6)]

    def image(row, split):
        return images[int(row["patient_id"][1:]) // 3 % 6] if split == "train" else row["image"]

    data = write_dataset(tmp_path / "data", patients=60, image=image)
    features = open_features(extract_features("pixels:pca", data, tmp_path / "f"))
    train = np.asarray(features.cls)[RadiographDataset(data).rows("train")]
    assert train.shape == (40, 5)  # six images and their mean
    assert train.std(axis=0).min() > 1e-3
    assert features.manifest["preprocessing"]["pca_components"] == 5


def test_a_full_disk_is_refused_in_one_line_and_the_command_can_be_repeated(tmp_path, data):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # 180 x 256 x 4 bytes are more than this; dataset.json, plan.json and the like are less.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"f\.partial needs 1 MB.*Make room") as raised:
            extract_features("pixels:16x16", data, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(raised.value)
    assert len(open_features(extract_features("pixels:16x16", data, tmp_path / "f")).cls) == 180


def test_an_arrays_room_is_taken_before_any_features_are_written(tmp_path, data, monkeypatch):
    def stopped(source, images):
        raise KeyboardInterrupt

    monkeypatch.setattr("selfray.pixel_baselines.Thumbnail.__call__", stopped)
    with pytest.raises(Interrupted):
        extract_features("pixels:16x16", data, tmp_path / "f")
    found = (tmp_path / "f.partial" / "cls.npy").stat()
    assert found.st_blocks * 512 >= found.st_size > 180_000  # no holes
