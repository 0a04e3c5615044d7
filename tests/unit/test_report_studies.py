"""Which studies have something to learn from, or to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from selfray.data.dataset import DatasetInfo, DatasetWriter, RadiographDataset, encode_png
from selfray.data.report_loader import supervising_sentences, with_reports
from selfray.data.report_text import says_something
from selfray.evaluate.report_studies import report_studies

CLEAR = "FINDINGS: The lungs are clear.\nIMPRESSION: Normal."
EMPTY = (
    "FINDINGS: ___.\nIMPRESSION: ___",
    "FINDINGS: XXXX. XXXX, XXXX.\nIMPRESSION: 1. XXXX",
    "XXXX",
    "FINDINGS: [**2101-3-4**].\nIMPRESSION: ...",
)
HALF_EMPTY = "FINDINGS: XXXX.\nIMPRESSION: No effusion on XXXX."


def dataset(out: Path, train: Sequence[str | None]) -> RadiographDataset:
    info = DatasetInfo("n", "o", "MIT", True, (), (), "8 bit")
    writer = DatasetWriter(out, info)
    black = encode_png(np.zeros((8, 8), np.uint8))
    for row, report in enumerate([*train, CLEAR, CLEAR]):
        split = {len(train): "validate", len(train) + 1: "test"}.get(row, "train")
        writer.add(
            {"image": black, "image_id": f"i{row}", "patient_id": f"p{row}", "split": split,
             "study_id": f"s{row}", "report": report}
        )  # fmt: skip
    return writer.finish()


@pytest.mark.parametrize(("target", "kept", "left_out"), [
    ("findings", [0], {"empty findings": 5, "report without findings": 1, "no report": 1}),
    # The third, a text without headings, is findings.
    ("impression", [0, 5], {"empty impression": 3, "report without impression": 2, "no report": 1}),
    ("report", [0, 5], {"empty report": 4, "report without report": 1, "no report": 1}),
])  # fmt: skip
def test_reports_of_placeholders_alone_are_left_out_as_empty(
    target: str, kept: list[int], left_out: dict[str, int], tmp_path: Path
) -> None:
    reports = [CLEAR, *EMPTY, HALF_EMPTY, "INDICATION: Cough.", None]
    train = report_studies(dataset(tmp_path / "data", reports), target, ())["train"]
    assert train.rows.tolist() == kept
    assert train.left_out == left_out


def test_an_empty_section_is_no_part_of_what_is_written(tmp_path: Path) -> None:
    train = report_studies(dataset(tmp_path / "data", [CLEAR, HALF_EMPTY]), "report", ())["train"]
    assert train.targets == [CLEAR, "IMPRESSION: No effusion on ___."]


def test_images_with_empty_reports_are_not_learned_from(tmp_path: Path) -> None:
    found = with_reports([dataset(tmp_path / "data", [CLEAR, *EMPTY, HALF_EMPTY])], "train")
    assert [row for _, row in found.places] == [0, 5]
    assert found.left_out == len(EMPTY)
    assert supervising_sentences(HALF_EMPTY) == ["No effusion on ___."]


@pytest.mark.parametrize(("text", "says"), [
    ("", False), ("___", False), ("12. ___ (3)", False), ("a", True), ("心影增大。", True),
])  # fmt: skip
def test_letters_of_any_script_say_something(text: str, says: bool) -> None:
    assert says_something(text) is says
