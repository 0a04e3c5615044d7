"""Label efficiency: what encoders do with few of the training patients."""

from __future__ import annotations

import re

from selfray.summary.curve_charts import Course, share_chart
from selfray.summary.inputs import Evaluation, number
from selfray.summary.judged_cells import probe_name
from selfray.summary.markup import escaped, figure
from selfray.summary.number_cells import (
    Line,
    by_probe,
    encoder_head,
    head,
    measure_title,
    number_cell,
    series_legend,
    table,
)
from selfray.summary.verdict import MEASURES, cell_text, readable_names

_Measured = tuple[str, str]
"""Target and metric."""
_MAIN_METRICS = ("auroc", "r2")
_OPEN = [(m.target, m.metric) for m in MEASURES]


def efficiency_section(evaluation: Evaluation, note: str) -> str:
    """What probes of parts of the training patients add to the results of one evaluation.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when no probe was fitted on parts.
    """
    lines = [
        line
        for line in evaluation.results
        if _place(line.get("trained_on")) and "grouped_by" not in line
    ]
    if not lines:
        return ""
    names = readable_names(evaluation.encoders)
    parts = "".join(
        _of_probe(probe_name(probe), found, names, note) for probe, found in by_probe(lines).items()
    )
    return (
        "<h3>Label efficiency</h3><p>How much an encoder is worth where few labels are at hand: "
        "probes fitted on a part of the training patients, judged on the same test images.</p>"
        + parts
    )


def _place(trained_on: object) -> tuple[int, float] | None:
    """Where a part of the training patients belongs in the order, None for other parts."""
    for kind, pattern in enumerate((r"(\d+(?:\.\d+)?) % of patients", r"(\d+) a class")):
        found = re.fullmatch(pattern, trained_on) if isinstance(trained_on, str) else None
        if found and float(found[1]) > 0:
            return kind, float(found[1])
    return None


def _of_probe(probe: str, lines: list[Line], names: dict[str, str], note: str) -> str:
    found: dict[_Measured, dict[tuple[str, str], Line]] = {}
    for line in lines:
        if line["metric"] in _MAIN_METRICS:
            cells = found.setdefault((line["target"], line["metric"]), {})
            # Of draws without both classes there are further lines, with the reason.
            if line["value"] is not None:
                cells[line["encoder"], line["trained_on"]] = line
            else:
                cells.setdefault((line["encoder"], line["trained_on"]), line)
    shown = [m for m in _OPEN if m in found] or list(found)[:1]
    folded = [m for m in found if m not in shown]
    what = f"{note}<b>Probe {escaped(probe)} by the number of training patients.</b> "
    content = _charts(shown, found, names)
    tables = "".join(_table(measured, found[measured], names) for measured in shown)
    drawn = max(int(number(line.get("probe_seeds")) or 1) for line in lines)
    caption = (
        f"{what}Line: estimate on the test split"
        + (f", of a part the mean over {drawn} draws of patients" if drawn > 1 else "")
        + "; band and brackets: 95 % interval by resampling test patients. Dashed, where the axis "
        "reaches it: an encoder that knows nothing. “8 a class”: fitted on 8 patients with a "
        "finding and 8 without it. Higher is better."
    )
    html = figure(content + tables, caption)
    if folded:
        html += (
            "<details><summary>Each of the other targets</summary>"
            + figure(
                _charts(folded, found, names)
                + "".join(_table(measured, found[measured], names) for measured in folded),
                f"{what}As above, target by target.",
            )
            + "</details>"
        )
    return html


def _charts(
    shown: list[_Measured],
    found: dict[_Measured, dict[tuple[str, str], Line]],
    names: dict[str, str],
) -> str:
    charts = []
    for target, metric in shown:
        courses = _courses(found[target, metric], names)
        if courses:
            charts.append(
                share_chart(
                    courses,
                    title=measure_title(target, metric).rpartition(", ")[0],
                    axis=measure_title(target, metric).rpartition(", ")[2],
                    zero=0.5 if metric == "auroc" else 0.0,
                )
            )
    legend = series_legend(names.values())
    return f'{legend}<div class="charts">{"".join(charts)}</div>' if charts else ""


def _courses(cells: dict[tuple[str, str], Line], names: dict[str, str]) -> list[Course]:
    """The course of each encoder that has a number at some share."""
    courses = []
    for series, (encoder, name) in enumerate(names.items()):
        points = {
            place[1]: line
            for (of, part), line in cells.items()
            if of == encoder and line["value"] is not None
            if (place := _place(part)) and place[0] == 0
        }
        if points:
            shares = sorted(points)
            lines = [points[share] for share in shares]
            courses.append(
                Course(
                    name,
                    series,
                    shares,
                    [line["value"] for line in lines],
                    [line["ci_low"] for line in lines],
                    [line["ci_high"] for line in lines],
                    [cell_text(line) for line in lines],
                )
            )
    return courses


def _table(measured: _Measured, cells: dict[tuple[str, str], Line], names: dict[str, str]) -> str:
    parts = sorted({part for _, part in cells}, key=lambda part: _place(part) or (2, 0.0))
    title = measure_title(*measured)
    heads = head(escaped(title), "name") + "".join(
        head(escaped(part.replace(" of patients", ""))) for part in parts
    )
    rows = [
        f"<tr>{encoder_head(k, name)}"
        + "".join(number_cell(cells.get((encoder, part))) for part in parts)
        + "</tr>"
        for k, (encoder, name) in enumerate(names.items())
        if any(of == encoder for of, _ in cells)
    ]
    return table(heads, rows, told=f"{title}, by part of the training patients")
