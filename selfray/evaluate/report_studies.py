"""Which images of a dataset a report is written for, from what, and what the radiologist wrote."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from selfray.data.dataset import SPLITS, RadiographDataset
from selfray.data.report_text import Sections, parse_report, says_something
from selfray.errors import InputError

# A report is of a study. Of its images the frontal one shows most, the standing one (PA) best.
_VIEWS = ("PA", "AP", None)


@dataclass(frozen=True)
class ReportStudies:
    """Studies of one split whose reports say something in the section that is to be written.

    Attributes:
        rows: int64 [n], the image of each study that is read: its first PA one, else AP, else of
            unknown view, else any.
        prompts: n texts, what is known before the image is read: a line a section, may be empty.
        targets: n texts, by the radiologist.
        left_out: Number of studies by the reason why they are not here.
    """

    rows: np.ndarray
    prompts: list[str]
    targets: list[str]
    left_out: dict[str, int]


def report_studies(
    data: RadiographDataset, target: str, prompt_sections: Sequence[str]
) -> dict[str, ReportStudies]:
    """Find the studies of each split.

    Args:
        data: Its column `report` is read.
        target: `findings`, `impression`, or `report` for both.
        prompt_sections: Names of sections that the prompt gives where the report has them.

    Raises:
        InputError: A split has no report that says something in that section.
    """
    reports, studies = data.column("report"), data.column("study_id")
    views = data.column("view")
    found = {}
    for split in SPLITS:
        rows, prompts, targets = [], [], []
        left_out: Counter[str] = Counter()
        for row in _one_image_a_study(data.rows(split), studies, views):
            sections = parse_report(reports[row] or "")
            text = _target(sections, target)
            if not text:
                left_out[_reason(reports[row], sections, target)] += 1
                continue
            rows.append(row)
            prompts.append(_prompt(sections, prompt_sections))
            targets.append(text)
        if not rows:
            raise InputError(
                f"{data.directory}: no image of the {split} split has a report with {target}. Give "
                "`selfray ingest` the reports (--reports), or write another part (--report.target)."
            )
        found[split] = ReportStudies(np.array(rows), prompts, targets, dict(left_out))
    return found


def _one_image_a_study(rows: np.ndarray, studies: np.ndarray, views: np.ndarray) -> list[int]:
    """The image of each study that shows most, in the order of the rows."""
    chosen: dict[object, int] = {}
    places = [_place(view) for view in views.tolist()]
    for row in rows.tolist():
        study = studies[row] if studies[row] is not None else ("image", row)
        if study not in chosen or places[row] < places[chosen[study]]:
            chosen[study] = row
    return sorted(chosen.values())


def _place(view: str | None) -> int:
    return _VIEWS.index(view) if view in _VIEWS else len(_VIEWS)


def _target(sections: Sections, target: str) -> str:
    """What is to be written, without sections of placeholders alone: nobody could learn those."""
    texts = {name: getattr(sections, name) for name in _names(target)}
    said = {name: text for name, text in texts.items() if says_something(text)}
    return Sections(**said).text() if target == "report" else said.get(target, "")


def _reason(report: str | None, sections: Sections, target: str) -> str:
    """Why a study without a target is left out."""
    if not report:
        return "no report"
    there = any(getattr(sections, name) for name in _names(target))
    return f"empty {target}" if there else f"report without {target}"


def _names(target: str) -> tuple[str, ...]:
    return ("findings", "impression") if target == "report" else (target,)


def _prompt(sections: Sections, names: Sequence[str]) -> str:
    known = {name: getattr(sections, name) for name in names}
    return "\n".join(f"{name.capitalize()}: {text}" for name, text in known.items() if text)
