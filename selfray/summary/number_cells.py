"""Cells and tables of numbers with intervals, and what is said where there is no number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from selfray.summary.charts import SERIES
from selfray.summary.inputs import number
from selfray.summary.markup import escaped, listed
from selfray.summary.verdict import MEASURES

Line = dict[str, Any]

METRIC_NAMES = {
    "auroc": "AUROC", "auprc": "AUPRC", "r2": "R²", "mae": "MAE", "dice": "Dice", "iou": "IoU",
    "hd95": "HD95", "asd": "ASD",
}  # fmt: skip
_MARKERS = "●■◆▲▼✚✖★"  # as the charts draw the series


def by_probe(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by probe, the linear one first."""
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(str(line.get("probe", "linear")), []).append(line)
    return dict(sorted(found.items(), key=lambda item: item[0] != "linear"))


def first_shown(measured: Iterable[tuple[str, str]], findings: Sequence[str]) -> tuple[str, str]:
    """The target and metric that stands for all: a mean, a finding, or what is there.

    Args:
        measured: One or more.
        findings: Names of the findings.
    """
    there = list(measured)
    preferred = [("macro", "auroc"), ("macro", "dice"), *((name, "auroc") for name in findings)]
    return next((one for one in preferred if one in there), there[0])


def series_legend(names: Iterable[str]) -> str:
    """Colour and mark of each encoder, for several charts together."""
    items = "".join(
        f"<span>{series_mark(k)} {escaped(name)}</span>" for k, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'


def encoder_heads(names: Iterable[str]) -> str:
    """A column's head for each encoder."""
    return "".join(head(f"{series_mark(k)} {escaped(name)}") for k, name in enumerate(names))


def encoder_head(series: int, name: str) -> str:
    """A row's head for an encoder."""
    return f'<th scope="row">{series_mark(series)} {escaped(name)}</th>'


def head(content: str, kind: str = "") -> str:
    """A column's head; content is HTML."""
    attribute = f' class="{kind}"' if kind else ""
    return f'<th scope="col"{attribute}>{content}</th>'


def table(heads: str, rows: Sequence[str], *, told: str, kind: str = "sortable") -> str:
    """A table that scrolls sideways where it must.

    Args:
        heads: Cells of the head, HTML.
        rows: Each with its `<tr>`, HTML.
        told: What it is, for readers that hear it.
        kind: Class; `sortable` can be sorted by a click.
    """
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(told)}">'
        f'<table class="{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def number_cell(line: Line | None) -> str:
    """A number with its interval below it; without a number, the reason.

    Args:
        line: Of `results.jsonl`, or None where there is none.
    """
    if line is None or line["value"] is None:
        why = (line or {}).get("reason") or "not recorded"
        return f'<td data-value=""><span class="why">{escaped(why)}</span></td>'
    return f'<td data-value="{line["value"]!r}">{fixed(line["value"])}{interval(line)}</td>'


def interval(line: Line, digits: int = 3) -> str:
    """The interval of a line, HTML; empty where it has none."""
    if line["ci_low"] is None or line["ci_high"] is None:
        return ""
    low, high = fixed(line["ci_low"], digits), fixed(line["ci_high"], digits)
    return f' <span class="ci">[{low}, {high}]</span>'


def count_cell(value: Any) -> str:
    """A count, empty where it is not known."""
    known = number(value)
    return (
        '<td data-value=""></td>' if known is None else f'<td data-value="{known}">{known:,}</td>'
    )


def fixed(value: float, digits: int = 3) -> str:
    """With a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "−")


def measure_title(target: str, metric: str) -> str:
    """`Findings, macro-AUROC`, `pleural effusion, AUROC`, `Anatomy, mean Dice`. Not escaped."""
    for measure in MEASURES:
        if (measure.target, measure.metric) == (target, metric):
            return measure.column
    if target == "macro":
        return f"Anatomy, mean {METRIC_NAMES.get(metric, metric)}"
    return f"{listed([target])}, {METRIC_NAMES.get(metric, metric)}"


def series_mark(series: int) -> str:
    """Colour and mark of a series, as the charts draw it."""
    colour, mark = f"var(--series-{series % SERIES})", _MARKERS[series % SERIES]
    return f'<span class="mark" style="color:{colour}" aria-hidden="true">{mark}</span>'
