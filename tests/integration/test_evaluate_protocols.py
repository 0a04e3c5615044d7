"""What an evaluation adds to linear probes: parts of the data, sites, records, tables, leaks."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.errors import InputError
from selfray.evaluate import compare, evaluate, judge
from selfray.evaluate.benchmark import open_benchmark
from selfray.features import extract_features

SITES, VIEWS = ("A", "B"), ("PA", "AP", "LL")


def write_dataset(out: Path, patients: int = 240) -> Path:
    """One image a patient: a finding brightens it, site B is bright where site A is dark."""
    info = DatasetInfo("planted", "test", "MIT", True, ("effusion",), (), "8 bit")
    writer = DatasetWriter(out, info)
    noise = np.random.default_rng(3)
    for patient in range(patients):
        site, view = patient % 2, int(noise.integers(3))
        finding = int(noise.integers(2))
        pixels = noise.normal(100, 10, (32, 32))
        pixels[:12, :12] += (25 if site else 40) * finding
        pixels[12:20, 20:] += 40 * site
        pixels[24:, 8 * view : 8 * view + 8] += 60
        writer.add(
            {"image": encode_png(np.clip(pixels, 0, 255).astype(np.uint8)),
             "image_id": f"i{patient}", "patient_id": f"p{patient}", "study_id": f"s{patient}",
             "split": ("train", "validate", "test", "test")[patient // 2 % 4],
             "site": SITES[site], "view": VIEWS[view], "sex": "FM"[patient // 8 % 2],
             "age_years": float(noise.uniform(20, 80)), "effusion": finding}
        )  # fmt: skip
    writer.finish()
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "planted")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return evaluate(
        ["pixels:16x16", "pixels:pca"],
        data,
        tmp_path_factory.mktemp("evaluation") / "e",
        columns=["view", "site"],
        label_efficiency=True,
        sites=True,
    )


def lines_of(out: Path, **fields) -> list[dict]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [line for line in lines if all(line.get(k) == v for k, v in fields.items())]


def test_any_column_is_predicted_and_a_category_is_one_value_against_the_others(out):
    common = {"encoder": "pixels:16x16", "probe": "linear", "metric": "auroc", "grouped_by": None}
    common |= {"trained_on": None}
    for target in ("view=PA", "view=AP", "view=LL", "site=A"):
        (line,) = lines_of(out, target=target, **common)
        assert line["task"] == "metadata" and line["ci_low"] > 0.9
    (mean,) = lines_of(out, target="view", **common)
    values = [lines_of(out, target=f"view={v}", **common)[0]["value"] for v in VIEWS]
    assert mean["value"] == pytest.approx(np.mean(values))


def test_probes_on_more_patients_end_at_the_probe_on_all(out):
    common = {"encoder": "pixels:16x16", "probe": "linear", "metric": "auroc"}
    parts = {
        line["trained_on"]: line
        for line in lines_of(out, target="effusion", grouped_by=None, **common)
        if "trained_on" in line and not line["trained_on"].startswith("site ")
    }
    assert {"5 % of patients", "10 % of patients", "50 % of patients"} <= set(parts)
    (whole,) = lines_of(out, target="effusion", grouped_by=None, trained_on=None, **common)
    assert parts["100 % of patients"]["value"] == pytest.approx(whole["value"], abs=1e-6)
    assert parts["50 % of patients"]["probe_seeds"] == 5
    assert parts["8 a class"]["value"] is not None
    assert "32 a class" not in parts or parts["32 a class"]["value"] is None


def test_a_site_is_judged_by_the_probe_of_another(out, data):
    table = pq.read_table(out / "predictions.parquet").to_pandas()
    dataset = RadiographDataset(data)
    site = dict(zip(dataset.column("image_id"), dataset.column("site"), strict=True))
    one = table.query("encoder == 'pixels:16x16' and target == 'effusion'")
    for trained in SITES:
        predicted = one[one["trained_on"] == f"site {trained}"]
        assert len(predicted) == len(set(predicted["image_id"])) > 30
        for tested in SITES:
            (line,) = lines_of(
                out, encoder="pixels:16x16", target="effusion", trained_on=f"site {trained}",
                grouped_by="site", subgroup=tested,
            )  # fmt: skip
            here = predicted[[site[i] == tested for i in predicted["image_id"]]]
            few = min((here["label"] == 1).sum(), (here["label"] == 0).sum()) < 20
            if few:
                assert line["value"] is None and line["reason"].startswith("too few")
            else:
                expected = roc_auc_score(here["label"], here["prediction"])
                assert line["value"] == pytest.approx(expected)


def test_subgroups_have_their_number_and_the_gap_or_say_too_few(out):
    common = {"encoder": "pixels:16x16", "target": "effusion", "trained_on": None}
    by_sex = lines_of(out, grouped_by="sex", metric="auroc", **common)
    assert {line["subgroup"] for line in by_sex} == {"F", "M"}
    assert sum(line["n"] for line in by_sex) == lines_of(out, grouped_by=None, **common)[0]["n"]
    by_age = lines_of(out, grouped_by="age", metric="auroc", **common)
    assert any(line["value"] is None and "too few" in line["reason"] for line in by_age)
    for line in by_sex + by_age:
        assert (line["value"] is None) == ("reason" in line)


def test_the_mean_over_findings_has_subgroups_where_every_group_has_enough_patients(out):
    common = {"encoder": "pixels:16x16", "trained_on": None, "grouped_by": "sex"}
    (gap,) = lines_of(out, target="macro", metric="auroc_gap", **common)
    groups = lines_of(out, target="macro", metric="auroc", **common)
    alone = lines_of(out, target="effusion", metric="auroc", **common)
    assert [line["value"] for line in groups] == [line["value"] for line in alone]
    values = [line["value"] for line in groups]
    assert gap["value"] == pytest.approx(max(values) - min(values))
    assert not lines_of(out, target="macro", metric="auroc", **common | {"grouped_by": "age"})


def test_the_best_is_marked_and_ranked(out):
    for target in ("effusion", "macro", "sex"):
        lines = lines_of(
            out, target=target, metric="auroc", probe="linear", trained_on=None, grouped_by=None
        )
        best = max(lines, key=lambda line: line["value"])
        assert best["best"] is True
        assert [line for line in lines if "best" in line] == [best]
        ranks = lines_of(out, target=target, metric="rank", probe="linear")
        places = rankdata([-line["value"] for line in lines])
        assert [line["encoder"] for line in ranks] == [line["encoder"] for line in lines]
        assert [line["value"] for line in ranks] == list(places)
        assert sum(line["probability_best"] for line in ranks) == pytest.approx(1)


def test_differences_have_p_values_and_findings_are_corrected_for_their_number(out):
    lines = [line for line in lines_of(out, probe="linear") if "reference" in line]
    assert {line["test"] for line in lines} == {"DeLong", "permutation"}
    for line in lines:
        assert 0 <= line["p_value"] <= line.get("p_holm", 1) <= 1
    assert all("p_holm" in line for line in lines if line["target"] == "effusion")


def test_tables_for_a_spreadsheet_and_a_paper_hold_the_same_numbers(out):
    rows = list(csv.DictReader((out / "results.csv").open()))
    lines = lines_of(out)
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        assert row["value"] == ("" if line["value"] is None else repr(line["value"]))
    tex = (out / "results.tex").read_text()
    (line,) = lines_of(out, encoder="pixels:pca", target="sex", metric="auroc", probe="linear",
                       grouped_by=None, trained_on=None)  # fmt: skip
    assert f"{line['value']:.3f}" in tex
    columns = tex.split(r"\midrule")[0].split(r"\toprule")[1].count("&")
    for row in tex.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines():
        assert row.count("&") == columns and row.endswith(r"\\")


def test_what_was_seen_in_training_is_said_loudly(tmp_path, data, capsys):
    seen = tmp_path / "seen.txt"
    seen.write_text("i4\ni5\nnot-here\n")
    listed = evaluate(
        ["pixels:16x16"], data, tmp_path / "e", training_lists=[("pixels:16x16", seen)]
    )
    assert "LEAK" in capsys.readouterr().err
    (leak,) = json.loads((listed / "evaluation.json").read_text())["leaks"]
    assert leak["encoder"] == "pixels:16x16" and leak["count"] == 2
    assert set(leak["image_ids"]) == {"i4", "i5"} and leak["splits"] == ["test"]
    other = tmp_path / "other.txt"
    other.write_text('"archive/one.dcm"\n')
    both = [("pixels:16x16", seen), ("pixels:16x16", other)]
    again = evaluate(["pixels:16x16"], data, tmp_path / "both", training_lists=both)
    assert len(json.loads((again / "evaluation.json").read_text())["leaks"]) == 1
    capsys.readouterr()
    evaluate(["pixels:16x16"], data, tmp_path / "none", training_lists=both[1:])
    assert "none of 1 lines" in capsys.readouterr().err
    clean = evaluate(["pixels:16x16"], data, tmp_path / "clean")
    assert json.loads((clean / "evaluation.json").read_text())["leaks"] == []


def test_a_part_that_is_done_is_not_done_again(tmp_path, data, monkeypatch):
    fitted = []
    original = judge.fit_probes

    def counted(train, validate):
        fitted.append(len(fitted))
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return original(train, validate)

    monkeypatch.setattr(judge, "fit_probes", counted)
    encoders = ["pixels:16x16", "pixels:pca"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(encoders, data, tmp_path / "e")
    assert not (tmp_path / "e" / "results.jsonl").exists()
    evaluate(encoders, data, tmp_path / "e")
    assert len(fitted) == 3  # the first encoder's once, the second's again
    whole = evaluate(encoders, data, tmp_path / "whole")
    for name in ("results.jsonl", "predictions.parquet"):
        assert (tmp_path / "e" / name).read_bytes() == (whole / name).read_bytes()


def test_parts_of_other_options_are_there_when_these_are_asked_for_again(
    tmp_path, data, monkeypatch
):
    fitted = []
    original = judge.fit_probes
    monkeypatch.setattr(judge, "fit_probes", lambda *a: fitted.append(1) or original(*a))
    tasks = ("classification", "metadata", "classification")
    written = []
    for task in tasks:
        evaluate(["pixels:16x16"], data, tmp_path / "e", tasks=[task], probes=["linear"])
        written.append((tmp_path / "e" / "results.jsonl").read_bytes())
    assert written[2] == written[0] != written[1]
    assert len(fitted) == 2


def test_a_trained_probe_is_judged_like_any_other(tmp_path, data, monkeypatch):
    monkeypatch.setattr("selfray.evals.fine_tuning.FEWEST_STEPS", 20)
    monkeypatch.setattr("selfray.evals.fine_tuning.PASSES", 1)
    out = evaluate(
        ["random:vit_pico/16@32", "pixels:16x16"],
        data,
        tmp_path / "e",
        tasks=["classification"],
        probes=["linear", "fine-tune-last-1"],
        probe_seeds=2,
    )
    (line,) = lines_of(out, probe="fine-tune-last-1", target="effusion", metric="auroc",
                       grouped_by=None)  # fmt: skip
    assert line["encoder"] == "random:vit_pico/16@32" and line["probe_seeds"] == 2
    table = pq.read_table(out / "predictions.parquet").to_pandas()
    table = table.query("probe == 'fine-tune-last-1' and target == 'effusion'")
    by_seed = [roc_auc_score(t["label"], t["prediction"]) for _, t in table.groupby("probe_seed")]
    assert line["value"] == pytest.approx(np.mean(by_seed))


def test_bad_input_is_refused_in_one_line(tmp_path, data):
    lone = extract_features("pixels:16x16", data, tmp_path / "features")
    cases = [
        ({"columns": ["scaner"]}, "Did you mean 'scanner'"),
        ({"columns": ["patient_id"]}, "is no target"),
        ({"probes": ["linaer"]}, "Did you mean 'linear'"),
        ({"probes": []}, "no probe"),
        ({"decoders": ["lienar"]}, "Did you mean 'linear'"),
        ({"probe_seeds": 0}, "probe_seeds is 0"),
        ({"preset": "vindr"}, "unknown"),
        ({"preset": "vindr-cxr", "tasks": ["metadata"]}, "Leave --tasks out"),
        ({"labels": ["heart"]}, "for --tasks segmentation"),
        ({"preset": "vindr-cxr"}, "VinDr"),
        ({"training_lists": [("other", data)]}, "none of the encoders"),
        ({"training_lists": [(str(lone), data)]}, "cannot be read"),
        ({"tasks": ["segmentation"]}, "needs an encoder to run"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError, match=message) as raised:
            evaluate([str(lone)], data, tmp_path / "e", **changes)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "e").exists()


def test_one_site_cannot_be_held_against_another(tmp_path, data):
    single = tmp_path / "single"
    info = DatasetInfo("single", "test", "MIT", True, ("effusion",), (), "8 bit")
    writer = DatasetWriter(single, info)
    for row in RadiographDataset(data).table.to_pylist():
        row["image"] = row["image"]["bytes"]
        writer.add({k: v for k, v in row.items() if v is not None} | {"site": "A"})
    writer.finish()
    with pytest.raises(InputError, match="one site"):
        evaluate(["pixels:16x16"], single, tmp_path / "e", sites=True)
    assert open_benchmark(single, ["classification"]).held_out.groups.keys() == {
        "sex", "view", "age",
    }  # fmt: skip


def test_a_perfect_score_of_few_patients_is_no_certainty(out):
    for line in lines_of(out, metric="auroc", probe="linear"):
        if line["value"] == 1 and line["ci_low"] is not None and "trained_on" not in line:
            assert line["ci_low"] < 1 == line["ci_high"]
    (site,) = lines_of(out, encoder="pixels:16x16", target="site=A", metric="auroc",
                       probe="linear", grouped_by=None, trained_on=None)  # fmt: skip
    assert site["value"] == 1
    rarer = min(site["n_positive"], site["n"] - site["n_positive"])
    assert site["ci_low"] == pytest.approx(0.025 ** (1 / rarer))


def test_only_evaluations_of_one_dataset_are_joined(tmp_path, data, out):
    fewer = tmp_path / "fewer"
    info = DatasetInfo("planted", "test", "MIT", True, ("effusion",), (), "8 bit")
    writer = DatasetWriter(fewer, info)
    for number, row in enumerate(RadiographDataset(data).table.to_pylist()):
        row["image"] = row["image"]["bytes"]
        if row["split"] != "train" or number % 3:
            writer.add({k: v for k, v in row.items() if v is not None})
    writer.finish()
    one = evaluate(["pixels:16x16"], data, tmp_path / "one")
    other = evaluate(["pixels:pca"], fewer, tmp_path / "other")
    for given, into, message in (
        ([one, other], tmp_path / "joined", "on another dataset"),
        ([one], tmp_path / "joined", "two or more"),
        ([one, out], one, "is one of the evaluations"),
    ):
        with pytest.raises(InputError, match=message):
            compare(given, into)
    assert not (tmp_path / "joined").exists()


def test_a_feature_directory_that_is_judged_can_be_interrupted_too(tmp_path, data, monkeypatch):
    features = extract_features("pixels:16x16", data, tmp_path / "f")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(judge, "knn_scores", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate([str(features)], data, tmp_path / "e")
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"judged"}
    evaluate([str(features)], data, tmp_path / "e")
    assert (tmp_path / "e" / "results.jsonl").exists()


def test_features_that_are_not_finite_are_refused_by_neighbours_too(tmp_path, data):
    features = extract_features("pixels:16x16", data, tmp_path / "f")
    values = np.load(features / "cls.npy")
    values[7, 3] = np.nan
    np.save(features / "cls.npy", values)
    with pytest.raises(InputError, match="row 7 are not finite"):
        evaluate([str(features)], data, tmp_path / "e", probes=["knn"])
