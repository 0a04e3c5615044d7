"""The summary page: what it shows, what it never does, and what it says when things are missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity
from summary_directories import (
    Page,
    result,
    write_dataset,
    write_evaluation,
    write_run,
)

from selfray.data.dataset import RadiographDataset
from selfray.errors import InputError
from selfray.feature_directory import open_features
from selfray.features import extract_features
from selfray.summary import write_summary
from selfray.summary.inputs import POINTS, Curve, read_evaluation, read_run
from selfray.summary.pictures import choose_rows, nearest_neighbours, patch_colours
from selfray.summary.verdict import comparisons, evaluation_verdict, readable_names, run_verdict

HOSTILE = """<script>alert("x")</script>'$x^{font: 'a; style="font: 'b #00aa01 --> ]]>\x00\x1b"""


def comparison(value: float, low: float, high: float, **fields) -> dict:
    line = result("run", "macro", "auroc_difference", value, reference="pixels:pca", **fields)
    return line | {"ci_low": low, "ci_high": high}


def read(path: Path) -> Page:
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.unbalanced and not page.open
    return page


@pytest.fixture
def results() -> list[dict]:
    return [
        result("run", "macro", "auroc", 0.81234567),
        result("run", "macro", "auroc", 0.7654321, probe="knn"),
        result("run", "age_years", "r2", -0.25),
        result("run", "age_years", "mae", 6.5),
        result("run", "effusion", "auroc", 0.9, prevalence=0.125),
        result("run", "nodule", "auroc", None, reason="the test split lacks both classes"),
        result("pixels:pca", "macro", "auroc", 0.7),
        comparison(0.11, 0.04, 0.18),
    ]


def test_the_table_holds_the_numbers_of_the_results(tmp_path: Path, results: list[dict]) -> None:
    page = read(write_summary(write_evaluation(tmp_path / "e", results)))
    shown = {float(v) for td in page.all("td") if (v := td.get("data-value"))}
    wanted = {r["value"] for r in results if r["value"] is not None}
    assert wanted | {812, 0.125} == shown
    assert "[0.762, 0.862]" in page.words and "−0.250" in page.words
    assert "Not defined: nodule (the test split lacks both classes)." in page.words
    assert "age, MAE (years)" in page.words and "[6.450, 6.550]" in page.words


def test_the_page_asks_nothing_of_the_network(tmp_path: Path, results: list[dict]) -> None:
    write_run(tmp_path / "d/runs/run")
    write_evaluation(tmp_path / "d/evaluation", results)
    path = write_summary(tmp_path / "d")
    page = read(path)
    assert not re.search(r"https?:|url\(\s*['\"]?[^#)'\"]|@import|//\w", path.read_text())
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            asked = attributes.get(name) or "#"
            beside = asked.startswith("./") and (path.parent / unquote(asked)).is_file()
            assert beside or asked.startswith(("#", "data:"))
    assert {s.get("id") for s in page.all("section")} == {
        "results", "training", "pictures", "provenance"
    }  # fmt: skip
    assert all(s.get("role") == "img" and s.get("aria-label") for s in page.all("svg"))


def test_hostile_names_are_text(tmp_path: Path) -> None:
    lines = [result(HOSTILE, t, "auroc", 0.8, reason=HOSTILE) for t in ("macro", "sex", HOSTILE)]
    lines.append(result(HOSTILE, "macro", "auroc_difference", 0.1, reference="pixels:pca"))
    lines.append(result("pixels:pca", "macro", "auroc", 0.7))
    out = write_evaluation(tmp_path / "e", lines, name=HOSTILE, origin=HOSTILE)
    info = json.loads((out / "evaluation.json").read_text())
    info |= {"findings": [HOSTILE], "command": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    (out / "evaluation.json").write_text(json.dumps(info))
    path = write_summary(out)
    page = read(path)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in path.read_text() and "\x00" not in path.read_text()
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert '<script>alert("x")</script>' in page.words


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.04, 0.18, "better than"),
        (-0.2, -0.1, "worse than"),
        (-0.1, 0.2, "no clear difference from"),
    ],
)
def test_the_verdict_follows_the_interval(
    tmp_path: Path, low: float, high: float, words: str
) -> None:
    lines = [result("run", "macro", "auroc", 0.8), result("pixels:pca", "macro", "auroc", 0.7)]
    lines.append(comparison((low + high) / 2, low, high))
    evaluation = write_evaluation(tmp_path / "e", lines)
    opening, [(who, claim)] = evaluation_verdict(read_evaluation(evaluation))
    assert opening == "On 812 held-out images of 402 patients, macro-AUROC over the findings:"
    assert (who, claim) == ("run", f"0.800 [0.750, 0.850], {words} PCA of the pixels")
    page = read(write_summary(evaluation))
    assert claim in page.words and "�" not in page.words
    assert sum(span.get("class") in {"better", "worse"} for span in page.all("span")) == (
        low > 0 or high < 0
    )


def test_each_pair_of_encoders_is_compared_once_and_baselines_not_with_each_other(
    tmp_path: Path,
) -> None:
    encoders = ["a", "random:vit_nano", "b", "pixels:pca"]
    lines = [result(e, "macro", "auroc", 0.7) for e in encoders]
    lines += [
        result(e, "macro", "auroc_difference", 0.0, reference=o)
        for e in encoders
        for o in encoders
        if e != o
    ]
    assert comparisons(read_evaluation(write_evaluation(tmp_path / "e", lines))) == [
        ("a", "random:vit_nano"),
        ("a", "pixels:pca"),
        ("a", "b"),
        ("b", "random:vit_nano"),
        ("b", "pixels:pca"),
    ]
    only = [line for line in lines if line.get("reference", "a") == "a"]
    compared = comparisons(read_evaluation(write_evaluation(tmp_path / "o", only)))
    assert compared == [("random:vit_nano", "a"), ("pixels:pca", "a"), ("b", "a")]


def test_names_are_short_and_distinct() -> None:
    names = readable_names(["/a/one/run", "/a/two/run", "microsoft/rad-dino", "random:vit_nano"])
    assert list(names.values()) == [
        "one/run", "two/run", "microsoft/rad-dino", "random weights (vit_nano)"
    ]  # fmt: skip
    alike = readable_names(["/run", "run", "./run", "run/", "PCA of the pixels", "pixels:pca"])
    assert len(set(alike.values())) == len(alike)


def test_encoders_with_one_name_keep_their_own_bars_and_rows(tmp_path: Path) -> None:
    lines = [result(e, "macro", "auroc", v) for e, v in (("runs/a", 0.6), ("runs/a/", 0.9))]
    page = read(write_summary(write_evaluation(tmp_path / "e", lines)))
    assert {td.get("data-value") for td in page.all("td")} >= {"0.6", "0.9"}
    charts = [svg["aria-label"] or "" for svg in page.all("svg")]
    assert "0.600" in charts[0] and "0.900" in charts[0]


def test_the_verdict_of_a_run_names_best_and_start(tmp_path: Path) -> None:
    words = run_verdict(read_run(write_run(tmp_path / "a")))
    assert "0.700, at step 4" in words and "+0.100 against the start" in words
    worse = read_run(write_run(tmp_path / "b", probes={0: 0.6, 4: 0.5}))
    assert "No later probe was better" in run_verdict(worse)


@pytest.mark.parametrize("metrics", ["", '{"kind": "step", "st', '[1]\n{"step": NaN}\nnull\n'])
def test_a_run_without_metrics_is_said_to_be_in_progress(tmp_path: Path, metrics: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "DONE").unlink()
    (run / "metrics.jsonl").write_text(metrics)
    page = read(write_summary(run))
    assert "In progress: step 0 of 8." in page.words and "No step is recorded yet." in page.words


def test_one_probe_and_missing_fields_still_make_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", probes={0: 0.6})
    lines = [{"kind": "step", "step": s, "loss": [float("nan"), None, "x", 2.0][s]} for s in (1, 3)]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (run / "environment.json").unlink()
    assert "No later probe is recorded" in read(write_summary(run)).words


def test_a_directory_with_nothing_to_show_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for directory, words in (("none", "not a directory"), ("empty", "neither a run")):
        with pytest.raises(InputError, match=words):
            write_summary(tmp_path / directory)
    assert not list((tmp_path / "empty").iterdir())


def test_a_curve_keeps_means_and_spikes_of_a_million_values() -> None:
    curve, noise = Curve(), np.random.default_rng(0)
    values = noise.normal(size=200_000)
    values[123_456] = 99
    for step, value in enumerate(values):
        curve.add(step, float(value))
    assert POINTS / 2 <= len(curve) <= POINTS and curve.thinned
    assert max(curve.greatest) == 99 and min(curve.least) == values.min()
    width = round(len(values) / len(curve))
    first = int(np.flatnonzero(np.array(curve.greatest) == 99)[0])
    assert abs(curve.steps[first] - 123_456) <= width
    whole = values[: 512 * (len(values) // 512)].reshape(-1, 512).mean(axis=1)
    np.testing.assert_allclose(curve.means[: len(whole)], whole, atol=1e-9)


def test_patch_colours_are_the_principal_components() -> None:
    patches = np.random.default_rng(0).normal(size=(2, 4, 4, 9)) * np.arange(1, 10)
    colours = patch_colours(patches).reshape(-1, 3)
    expected = PCA(3).fit_transform(patches.reshape(-1, 9))
    for k in range(3):
        order = np.corrcoef(colours[:, k].astype(float), expected[:, k])[0, 1]
        assert abs(order) > 0.99
    flat = patch_colours(np.ones((1, 2, 2, 5)))
    assert flat.shape == (1, 2, 2, 3)


def test_neighbours_are_of_other_patients_and_nearest(tmp_path: Path) -> None:
    dataset = RadiographDataset(write_dataset(tmp_path / "data"))
    features = open_features(
        extract_features("pixels:16x16", dataset.directory, tmp_path / "features")
    )
    patients, cosines = dataset.column("patient_id"), cosine_similarity(features.cls)
    rows = choose_rows(dataset, 4, healthy=False)
    assert len({patients[row] for row in rows}) == 4
    assert all(dataset.column("split")[row] == "test" for row in rows)
    for row, shown in zip(rows, nearest_neighbours(features, dataset), strict=True):
        others = np.sort(cosines[row][patients != patients[row]])[::-1][:5]
        np.testing.assert_allclose([n.cosine for n in shown[1:]], others, rtol=1e-5)


def test_missing_data_is_told_and_not_an_error(tmp_path: Path, results: list[dict]) -> None:
    gone = write_evaluation(tmp_path / "e", results, data=tmp_path / "gone")
    assert "gone is not a directory" in read(write_summary(gone)).words
    data = write_dataset(tmp_path / "data")
    other = write_evaluation(tmp_path / "o", results, data=data, fingerprint="0" * 64)
    assert "holds other data by now" in read(write_summary(other)).words
