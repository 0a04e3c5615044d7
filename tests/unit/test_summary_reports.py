"""What a page says of written reports, and how it tells several evaluations apart."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from summary_directories import result, write_evaluation

from selfray.summary import pictures_section, write_summary
from selfray.summary.inputs import read_evaluation
from selfray.summary.reports_section import reports_verdict


def written(writer: str, metric: str, value: float | None, **fields) -> dict:
    line = result("run", fields.pop("target", "macro"), metric, value, task="reports", **fields)
    return line | {"probe": writer}


def against(writer: str, metric: str, value: float, **fields) -> dict:
    named = {"reference": "run", "reference_probe": writer}
    return written("language-model", f"{metric}_difference", value, **named, **fields)


def verdict(directory: Path, lines: list[dict]) -> tuple[str, list[tuple[str, str]]]:
    return reports_verdict(read_evaluation(write_evaluation(directory / "e", lines)))


def test_the_verdict_holds_the_language_model_against_each_other_writer(tmp_path: Path) -> None:
    opening, claims = verdict(
        tmp_path,
        [
            written("nearest-neighbour", "clinical_f1", 0.9),
            written("language-model", "clinical_f1", 0.3),
            written("language-model", "rouge_l", 0.2, target="findings"),
            against("nearest-neighbour", "clinical_f1", -0.6),  # intervals reach 0.05
            against("other-patients-image", "clinical_f1", 0.06),
            against("other-patients-neighbour", "clinical_f1", 0.04),
            against("most-frequent", "rouge_l", 0.2, target="findings"),  # another number
        ],
    )
    assert opening == (
        "On 812 held-out studies of 402 patients, clinical F1 (mean over the findings) of the "
        "language model's reports:"
    )
    assert claims == [
        (
            "run",
            "0.300 [0.250, 0.350], better than those it writes of another patient's image; "
            "worse than the report of the nearest neighbour; "
            "no clear difference from that of another patient's nearest neighbour",
        )
    ]


def test_without_findings_the_verdict_is_of_the_words(tmp_path: Path) -> None:
    lines = [
        written("language-model", "clinical_f1", None),
        written("language-model", "rouge_l", 0.2, target="impression"),
        against("nearest-neighbour", "rouge_l", 0.1, target="impression"),
    ]
    opening, claims = verdict(tmp_path, lines)
    assert "ROUGE-L of the language model's reports" in opening
    assert claims == [
        ("run", "0.200 [0.150, 0.250], better than the report of the nearest neighbour")
    ]


def test_reports_without_a_number_are_said_to_be_that(tmp_path: Path) -> None:
    opening, claims = verdict(tmp_path, [written("language-model", "clinical_f1", None)])
    assert opening.startswith("Reports were written") and not claims


def test_evaluations_of_one_page_have_their_names_and_share_what_is_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = {"kind": "pre-training", "encoder": "run", "sentence": "run saw the train split."}
    findings = [result("run", "macro", "auroc", 0.8), result("pixels:pca", "macro", "auroc", 0.7)]
    reports = [
        written("language-model", "clinical_f1", 0.3),
        written("language-model", "rouge_l", 0.2, target="findings"),
    ]
    for name, lines in (("a-reports", reports), ("b-findings", findings)):
        directory = write_evaluation(tmp_path / name, lines, fingerprint="f")
        file = directory / "evaluation.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"leaks": [noted]}))
    drawn = []

    def draw(evaluation, encoder, *, first):
        drawn.append((evaluation.path.name, encoder, first))
        return ""

    monkeypatch.setattr(pictures_section, "_of_evaluation", draw)
    page = write_summary(tmp_path).read_text()
    assert re.findall(r"<h2>(Results on [^<]*)", page) == [
        "Results on tiny: a-reports",
        "Results on tiny: b-findings",
    ]
    assert page.count("run saw the train split.") == 1
    assert page.count("No leak found in ") == 2
    # Once, and by the evaluation that has features to find neighbours by.
    assert drawn == [("b-findings", "run", True)]
    assert (
        "macro-AUROC over the findings" in page and "of the language model&#x27;s reports" in page
    )


def test_the_only_evaluation_of_a_page_needs_no_name(tmp_path: Path) -> None:
    directory = write_evaluation(tmp_path / "e", [result("run", "macro", "auroc", 0.8)])
    assert "<h2>Results on tiny</h2>" in write_summary(directory).read_text()
