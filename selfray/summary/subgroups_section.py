"""Subgroups: whether an encoder serves all patients alike."""

from __future__ import annotations

from dataclasses import dataclass, field

from selfray.summary.charts import interval_chart
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import probe_name
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.number_cells import (
    Line,
    by_probe,
    count_cell,
    encoder_heads,
    first_shown,
    head,
    measure_title,
    number_cell,
    table,
)
from selfray.summary.results_section import bar_of
from selfray.summary.verdict import readable_names

_METRICS = ("auroc", "r2", "mae", "dice")
_GAP = "_gap"


@dataclass
class _Grouped:
    """One metric of one target, group by group.

    Attributes:
        groups: By subgroup, the line of each encoder.
        gaps: The line of each encoder.
    """

    groups: dict[str, dict[str, Line]] = field(default_factory=dict)
    gaps: dict[str, Line] = field(default_factory=dict)


_Attribute = dict[tuple[str, str], _Grouped]
"""By target and metric."""


def subgroups_section(evaluation: Evaluation, note: str) -> str:
    """What results by group of patients add to the results of one evaluation.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when nothing was grouped.
    """
    lines = [
        line
        for line in evaluation.results
        if isinstance(line.get("grouped_by"), str) and "trained_on" not in line
    ]
    parts = [
        _of_probe(probe_name(probe), _grouped(found), evaluation, note)
        for probe, found in by_probe(lines).items()
    ]
    if not any(parts):
        return ""
    return (
        "<h3>Subgroups</h3><p>The same predictions, scored group by group. A <em>gap</em> is the "
        "largest value among the groups minus the smallest; its interval allows for the two having "
        "been picked as the extremes. A gap whose 95 % interval contains 0 shows nothing. A gap "
        "whose interval does not is a reason to look at the groups, not yet a cause: they may "
        "differ in disease, in view or in machine.</p>" + "".join(parts)
    )


def _grouped(lines: list[Line]) -> dict[str, _Attribute]:
    """By attribute."""
    found: dict[str, _Attribute] = {}
    for line in lines:
        encoder, metric = line["encoder"], line["metric"].removesuffix(_GAP)
        if metric not in _METRICS:
            continue
        attribute = found.setdefault(line["grouped_by"], {})
        grouped = attribute.setdefault((line["target"], metric), _Grouped())
        if line["metric"].endswith(_GAP):
            grouped.gaps[encoder] = line
        elif "subgroup" in line:
            grouped.groups.setdefault(str(line["subgroup"]), {})[encoder] = line
    return found


def _of_probe(
    probe: str, attributes: dict[str, _Attribute], evaluation: Evaluation, note: str
) -> str:
    if not attributes:
        return ""
    names = readable_names(evaluation.encoders)
    first = {n: first_shown(measured, evaluation.findings) for n, measured in attributes.items()}
    parts = [_gap_charts(probe, attributes, first, names, note)]
    for name, measured in attributes.items():
        caption = (
            f"{note}<b>By {escaped(listed([name]))}, probe {escaped(probe)}.</b> Images, patients "
            "and positives of the test split; 95 % intervals by resampling patients. Where a group "
            "has too few patients, no number is given."
        )
        shown = first[name]
        tables = _table(name, shown, measured[shown], names) + _gaps_table(name, measured, names)
        parts.append(figure(tables, caption))
        others = [m for m in measured if m != shown]
        if others:
            tables = "".join(_table(name, m, measured[m], names) for m in others)
            parts.append(
                f"<details><summary>Other targets by {escaped(listed([name]))}</summary>"
                f"{figure(tables, caption)}</details>"
            )
    return "".join(parts)


def _gap_charts(
    probe: str,
    attributes: dict[str, _Attribute],
    first: dict[str, tuple[str, str]],
    names: dict[str, str],
    note: str,
) -> str:
    charts = []
    for attribute, measured in attributes.items():
        gaps = measured[first[attribute]].gaps
        bars = [
            bar_of(name, k, line)
            for k, (encoder, name) in enumerate(names.items())
            if (line := gaps.get(encoder)) is not None and line["value"] is not None
        ]
        if bars:
            measure = measure_title(*first[attribute])
            charts.append(
                interval_chart(
                    bars,
                    title=f"By {shortened(listed([attribute]))}",
                    axis=f"gap ({measure}), 95 % interval",
                    zero=0,
                    zero_label="no gap",
                )
            )
    caption = (
        f"{note}<b>Gaps between groups, probe {escaped(probe)}.</b> An interval that reaches the "
        "dashed line shows no gap."
    )
    return figure(f'<div class="charts">{"".join(charts)}</div>', caption) if charts else ""


def _table(
    attribute: str, measured: tuple[str, str], grouped: _Grouped, names: dict[str, str]
) -> str:
    title = measure_title(*measured)
    lines = [line for of_group in grouped.groups.values() for line in of_group.values()]
    counts = [("n", "Images"), ("n_patients", "Patients"), ("n_positive", "Positives")]
    counts = [c for c in counts if any(line.get(c[0]) is not None for line in lines)]
    heads = head(f"{escaped(title)}, by {escaped(listed([attribute]))}", "name")
    heads += "".join(head(name) for _, name in counts) + encoder_heads(names.values())
    rows = []
    for group, of_group in grouped.groups.items():
        known = next(iter(of_group.values()))
        rows.append(
            f'<tr><th scope="row">{escaped(group)}</th>'
            + "".join(count_cell(known.get(column)) for column, _ in counts)
            + "".join(number_cell(of_group.get(encoder)) for encoder in names)
            + "</tr>"
        )
    if grouped.gaps:
        empty = '<td data-value=""></td>' * len(counts)
        gaps = "".join(number_cell(grouped.gaps.get(encoder)) for encoder in names)
        rows.append(
            f'<tr class="total"><th scope="row">gap: largest minus smallest</th>{empty}{gaps}</tr>'
        )
    # Not sortable: the gap stays below the groups.
    return table(heads, rows, told=f"{title}, by {listed([attribute])}", kind="groups")


def _gaps_table(attribute: str, measured: _Attribute, names: dict[str, str]) -> str:
    """The gaps of all targets; empty where there are not several."""
    gaps = {target: grouped.gaps for target, grouped in measured.items() if grouped.gaps}
    if len(gaps) < 2:
        return ""
    title = f"Gap by {listed([attribute])}"
    rows = [
        f'<tr><th scope="row">{escaped(measure_title(*target))}</th>'
        + "".join(number_cell(found.get(encoder)) for encoder in names)
        + "</tr>"
        for target, found in gaps.items()
    ]
    return table(head(escaped(title), "name") + encoder_heads(names.values()), rows, told=title)
