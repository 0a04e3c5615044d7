"""The summary's results: leaks first, who is best, ranks, calibration, records, protocols."""

from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.calibration import calibration_curve
from summary_directories import (
    FINDINGS,
    Page,
    result,
    write_evaluation,
    write_judged_evaluation,
    write_predictions,
)

from selfray.summary import calibration_section, records_section, write_summary
from selfray.summary.charts import Bar, interval_chart, scatter_chart, share_styles
from selfray.summary.inputs import read_evaluation
from selfray.summary.predictions import read_predictions
from selfray.summary.protocols_section import protocols_section

ENCODERS = ("run", "other/encoder", "pixels:pca")
SIX = ("runs/first", "a/b", "a/c", "runs/second", "pixels:pca", "random:vit_small/14@224")
FOURTEEN = tuple(f"finding_{k}" for k in range(14))
LEAK = {"kind": "patients", "encoder": "run", "sentence": "run saw 12 <patients>.", "count": 12}


def text_of(evaluation: Path) -> str:
    return write_summary(evaluation).read_text(encoding="utf-8")


def describe(evaluation: Path, **fields: object) -> None:
    info = json.loads((evaluation / "evaluation.json").read_text())
    (evaluation / "evaluation.json").write_text(json.dumps(info | fields))


def rows_of(html: str, told: str) -> list[str]:
    """Rows of the body of the table with that label."""
    region = html[html.index(f'aria-label="{told}"') :]
    body = region[region.index("<tbody>") : region.index("</tbody>")]
    return re.findall(r"<tr>.*?</tr>", body)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_judged_evaluation(tmp_path_factory.mktemp("judged") / "e", leaks=[LEAK])


@pytest.fixture(scope="module")
def page(judged: Path) -> str:
    return text_of(judged)


def test_a_leak_stands_above_every_number(page: str) -> None:
    body = page[page.index("<body>") :]
    sentence = body.index("run saw 12 &lt;patients&gt;.")
    assert 'class="banner leak" role="alert"' in body[:sentence]
    assert sentence < body.index("<h1>") and not re.search(r"\d\.\d", body[:sentence])
    marked = [row for row in rows_of(page, "Encoders by task") if "⚠" in row]
    assert len(marked) == 2 and all('title="run"' in row for row in marked)  # both protocols


@pytest.mark.parametrize(
    ("leaks", "quiet", "loud"),
    [
        ([], True, False),
        (None, False, False),
        ("x", False, False),
        ([{"kind": "k"}], False, True),
        (
            [{"kind": "pre-training", "encoder": "run", "sentence": "run is from here."}],
            True,
            False,
        ),
    ],
)
def test_what_is_said_of_leaks_follows_the_list(
    tmp_path: Path, leaks: object, quiet: bool, loud: bool
) -> None:
    evaluation = write_evaluation(tmp_path / "e", [result("run", "macro", "auroc", 0.8)])
    describe(evaluation, **({} if leaks is None else {"leaks": leaks}))
    html = text_of(evaluation)
    assert ("No leak found: patients, studies, images and what is known" in html) == quiet
    assert ('role="alert"' in html) == loud == ("numbers below are too good" in html)
    assert ("run is from here." in html) == (quiet and leaks != [])
    assert "⚠" not in html


def test_the_main_table_has_a_row_an_encoder_and_protocol(page: str, judged: Path) -> None:
    rows = rows_of(page, "Encoders by task")
    assert len(rows) == 3 * 2
    evaluation = read_evaluation(judged)
    columns = [("macro", "auroc"), ("macro", "auprc"), ("macro", "dice"), ("sex", "auroc")]
    columns += [("age_years", "r2"), ("weight_kg", "r2"), ("bmi", "r2"), ("view", "auroc")]
    order = [(encoder, probe) for encoder in ENCODERS for probe in ("linear", "knn")]
    for (encoder, probe), row in zip(order, rows, strict=True):
        shown = [float(v) for v in re.findall(r'data-value="([^"]+)"', row)]
        lines = [evaluation.result(encoder, *column, probe) for column in columns]
        assert shown == [line["value"] for line in lines if line]
        assert "cls+patch_mean, 3 seeds" in row
        assert row.count("<b>") == (8 if encoder == "run" else 0)
        assert row.count("†") == (8 if encoder == "other/encoder" else 0)
    assert "<b>Bold</b>: best" in page and "<b>†</b>: may be the best too" in page


def test_parts_of_the_data_are_no_number_of_the_main_table(judged: Path) -> None:
    evaluation = read_evaluation(judged)
    lines = [evaluation.result("run", "macro", "auroc"), evaluation.result("run", "macro", "dice")]
    assert [line and line["value"] for line in lines] == [0.9, 0.9]


def test_without_flags_nobody_is_called_best(tmp_path: Path) -> None:
    lines = [result(e, "macro", "auroc", v) for e, v in (("a", 0.8), ("b", 0.7))]
    html = text_of(write_evaluation(tmp_path / "e", lines))
    assert "Bold" not in html and "†" not in html


def test_p_values_stand_with_the_differences(page: str) -> None:
    assert "p = 0.012" in rows_of(page, "Paired differences")[0]
    by_finding = rows_of(page, "Differences by finding: run")
    assert len(by_finding) == len(FINDINGS)
    assert all(row.count("p = 0.012; Holm p = 0.046") == 2 for row in by_finding)
    assert "p: two-sided, DeLong; Holm: corrected over the findings" in page


def test_ranks_have_a_chart_for_each_main_measure(page: str) -> None:
    charts = [svg["aria-label"] or "" for svg in Page(page).all("svg")]
    ranks = [told for told in charts if "rank (1: best)" in told]
    assert [told.split(". ")[0] for told in ranks] == [
        "Findings, macro-AUROC", "Sex, AUROC", "Age, R²", "Weight, R²", "BMI, R²",
    ]  # fmt: skip
    assert all("run: rank 1 [1, 2], best in 75 %" in told for told in ranks)
    assert all("PCA of the pixels: rank 3 [2, 3], best in 25 %" in told for told in ranks)


def test_findings_are_told_with_their_prevalence(page: str) -> None:
    for told in ("AUROC", "AUPRC", "Sensitivity at 90 % specificity", "Brier score",
                 "Expected calibration error"):  # fmt: skip
        rows = rows_of(page, f"Findings: {told}")
        assert len(rows) == len(FINDINGS)
        assert all('data-value="0.21">21.0 %<span class="ci">84</span>' in row for row in rows)


def test_reliability_is_that_of_scikit_learn(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, list] = {}

    def keep(curves: list, *, title: str) -> str:
        drawn[title] = curves
        return ""

    monkeypatch.setattr(calibration_section, "reliability_chart", keep)
    calibration_section.calibration_section(read_evaluation(judged), "")
    rows = pq.read_table(judged / "predictions.parquet").to_pylist()
    rows = [r for r in rows if r["trained_on"] == "all" and r["probe_seed"] == 0]
    assert set(drawn) == {"All findings", *FINDINGS}
    for title, curves in drawn.items():
        wanted = FINDINGS if title == "All findings" else (title,)
        for k, encoder in enumerate(ENCODERS):
            ours = [r for r in rows if r["encoder"] == encoder and r["target"] in wanted]
            known = [r for r in ours if r["label"] is not None]
            found, predicted = calibration_curve(
                [r["label"] for r in known],
                [r["prediction"] for r in known],
                n_bins=10,
                strategy="quantile",
            )
            np.testing.assert_allclose(curves[k][2], predicted, rtol=1e-9)
            np.testing.assert_allclose(curves[k][3], found, rtol=1e-9)


def test_scores_that_are_no_probabilities_have_no_reliability(tmp_path: Path) -> None:
    evaluation = write_judged_evaluation(tmp_path / "e")
    table = pq.read_table(evaluation / "predictions.parquet")
    logits = pa.array(10 * table["prediction"].to_numpy())
    at = table.column_names.index("prediction")
    pq.write_table(table.set_column(at, "prediction", logits), evaluation / "predictions.parquet")
    assert "Reliability" not in calibration_section.calibration_section(
        read_evaluation(evaluation), ""
    )


def test_dots_lie_where_truth_and_prediction_say() -> None:
    noise = np.random.default_rng(3)
    truth, predicted = noise.uniform(20, 80, 50), noise.uniform(0, 100, 50)
    svg = scatter_chart(
        truth, predicted, series=0, title="", axis="age", limits=(20.0, 80.0), told=""
    )
    dots = np.array(re.findall(r"M([\d.]+) ([\d.]+)h0", svg), float)
    left, bottom, right, top = np.array(
        re.findall(r'd="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)" clip[^>]*dasharray', svg)[0], float
    )  # of the line of equal values, from corner to corner
    x = left + (truth - 20) / 60 * (right - left)
    y = bottom + (predicted.clip(20, 80) - 20) / 60 * (top - bottom)
    wanted = np.column_stack([x, y])
    distances = np.abs(dots[:, None] - wanted[None]).max(axis=2)
    assert 45 <= len(dots) <= 50  # few share a place
    # A quarter of a pixel from rounding to half pixels, and a tenth from the line's own digits.
    assert distances.min(axis=0).max() <= 0.35 and distances.min(axis=1).max() <= 0.35


def test_no_extreme_value_and_no_identifier_is_on_the_page(page: str, judged: Path) -> None:
    truth = np.concatenate([np.arange(20.0, 80.0), [140.0, 0.5]])
    assert records_section._limits(truth, "weight_kg") == (23.0, 76.0)
    old = np.concatenate([truth, np.full(20, 95.0)])
    assert records_section._limits(old, "age_years") == (23.0, 90.0)
    assert "secret-" not in page and "image-" not in page
    assert (judged / "predictions.parquet").read_bytes().count(b"secret-")  # and there it is


def test_a_record_has_at_most_so_many_dots(tmp_path: Path) -> None:
    evaluation = write_judged_evaluation(tmp_path / "e", images=3000)
    section = records_section.records_section(read_evaluation(evaluation), "")
    panels = re.findall(r"<svg.*?</svg>", section[section.index("<h4>Age") :])
    assert len(panels) == 9
    for first in (0, 3, 6):
        dots = sum(panel.count("h0") for panel in panels[first : first + 3])
        assert 1500 < dots <= 2000  # those on one place are one


def test_predictions_are_those_of_the_whole_train_split(tmp_path: Path) -> None:
    write_predictions(tmp_path, ("a", "b"), ("x",), 50)
    kept = read_predictions(tmp_path)
    assert set(kept) == {
        (e, t, "linear") for e in "ab" for t in ("x", "age_years", "weight_kg", "bmi")
    }
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    for (encoder, target, _), (labels, predictions) in kept.items():
        wanted = [
            (r["label"], r["prediction"])
            for r in rows
            if (r["encoder"], r["target"], r["trained_on"]) == (encoder, target, "all")
            and r["probe_seed"] == 0
            and r["label"] is not None
        ]
        assert list(zip(labels.tolist(), predictions.tolist(), strict=True)) == wanted


def test_predictions_of_version_1_are_read_and_broken_ones_passed_over(tmp_path: Path) -> None:
    old = {"image_id": ["i"], "patient_id": ["p"], "encoder": ["a"], "probe": ["linear"]}
    old |= {"target": ["x"], "label": [1.0], "prediction": [0.5]}
    pq.write_table(pa.table(old), tmp_path / "predictions.parquet")
    [(key, (labels, predictions))] = read_predictions(tmp_path).items()
    assert (key, labels.tolist(), predictions.tolist()) == (("a", "x", "linear"), [1.0], [0.5])
    pq.write_table(pa.table({"encoder": ["a"]}), tmp_path / "predictions.parquet")
    assert read_predictions(tmp_path) == {}
    pq.write_table(pa.table(old).slice(0, 0), tmp_path / "predictions.parquet")
    assert read_predictions(tmp_path) == {}
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1 cut short")
    assert read_predictions(tmp_path) == {}
    assert read_predictions(tmp_path / "none") == {}


def test_protocols_are_held_side_by_side_only_where_something_was_trained(
    tmp_path: Path, page: str
) -> None:
    assert "<h3>Protocols</h3>" not in page
    probes = ("linear", "attentive", "fine-tune-last-2")
    evaluation = write_judged_evaluation(tmp_path / "e", probes=probes)
    settings = [{"name": "run", "settings": {"attentive, seed 0": {"learning_rate": "<0.001>"}}}]
    describe(evaluation, encoders=settings)
    html = protocols_section(read_evaluation(evaluation), "")
    rows = rows_of(html, "Protocols: Findings, macro-AUROC")
    values = [[float(v) for v in re.findall(r'data-value="([^"]+)"', row)] for row in rows]
    np.testing.assert_allclose(
        values, [[0.9 - 0.07 * k - 0.02 * j for j in range(3)] for k in range(3)]
    )
    assert "fine-tuned, last 2 blocks" in html and "&lt;0.001&gt;" in html


def test_files_are_linked_where_they_are(tmp_path: Path) -> None:
    lines = [result("run", "macro", "auroc", 0.8)]
    evaluation = write_evaluation(tmp_path / "all" / "first #1?", lines)
    for name in ("results.csv", "predictions.parquet"):
        (evaluation / name).write_text("")
    links = [a["href"] or "" for a in Page(text_of(tmp_path / "all")).all("a")]
    files = [
        tmp_path / "all" / unquote(urlsplit(link).path) for link in links if link.startswith("./")
    ]
    assert [file.name for file in files] == ["results.csv", "results.jsonl", "predictions.parquet"]
    assert all(file.is_file() for file in files)


def test_one_value_without_an_interval_is_drawn() -> None:
    """A perfect score of the only encoder."""
    bar = Bar("alone", 0, 1.0, None, None, "1.000", "")
    chart = interval_chart([bar], title="t", axis="a", zero=None, zero_label="")
    assert "alone" in chart and "nan" not in chart


def test_charts_with_shared_styles_look_as_before() -> None:
    bars = [Bar(f'class="s0" style="x" {k}', k, 0.6, 0.5, 0.7, "0.6", "") for k in range(6)]
    chart = interval_chart(bars, title="t", axis="a", zero=0.5, zero_label="z")
    sheet, shared = share_styles(chart)
    styles = dict(re.findall(r"\.(s\d+)\{([^}]*)\}", sheet))
    assert len(styles) > 3 and len(shared) < 0.9 * len(chart)
    restored = re.sub(
        r'(<[^<>]*) class="(s\d+)"', lambda m: f'{m[1]} style="{styles[m[2]]}"', shared
    )
    assert Page(restored).tags == [
        (tag, dict(sorted(attributes.items(), key=lambda item: list(restored).index(item[0][0]))))
        for tag, attributes in Page(chart).tags
    ]


def test_a_page_of_six_encoders_and_fourteen_findings_stays_small(tmp_path: Path) -> None:
    evaluation = write_judged_evaluation(
        tmp_path / "e", encoders=SIX, findings=FOURTEEN, images=2500
    )
    html = text_of(evaluation)
    assert html.count("<svg") > 60
    assert len(html.encode()) < 500_000  # a few hundred kB
