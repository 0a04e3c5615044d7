"""Paired differences between encoders, with their p-values."""

from __future__ import annotations

from collections.abc import Iterable

from selfray.summary.charts import Bar, interval_chart
from selfray.summary.inputs import Evaluation
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.number_cells import Line, head, number_cell, table
from selfray.summary.verdict import (
    Measure,
    comparisons,
    measures,
    outcome,
    probability,
    readable_names,
    signed,
    subjects,
)

_SIGNS = {"better": "▲", "worse": "▼", "undecided": "·"}


def differences_section(evaluation: Evaluation, note: str) -> str:
    """Who is better than whom: a table of the pairs, charts and findings by encoder.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when nothing was compared.
    """
    pairs = comparisons(evaluation)
    if not pairs:
        return ""
    names = readable_names(evaluation.encoders)
    first, *others = [
        (names[s], _charts(evaluation, s, note) + _findings(evaluation, s, note))
        for s in subjects(evaluation.encoders)
    ]
    folded = "".join(
        f"<details><summary>{escaped(name)} against the others</summary>{content}</details>"
        for name, content in others
        if content
    )
    return f"<h3>Paired differences</h3>{_table(evaluation, pairs, note)}{first[1]}{folded}"


def _table(evaluation: Evaluation, pairs: list[tuple[str, str]], note: str) -> str:
    names = readable_names(evaluation.encoders)
    lines = {
        pair: [evaluation.difference(*pair, m.target, m.metric) for m in measures(evaluation)]
        for pair in pairs
    }
    columns = [
        (k, m)
        for k, m in enumerate(measures(evaluation))
        if any(row[k] is not None for row in lines.values())
    ]
    heads = head("Encoder") + head("against", "name")
    heads += "".join(head(escaped(m.column)) for _, m in columns)
    rows = [
        f'<tr><th scope="row">{escaped(names[subject])}</th>'
        f'<td class="name">{escaped(names[reference])}</td>'
        + "".join(_cell(row[k]) for k, _ in columns)
        + "</tr>"
        for (subject, reference), row in lines.items()
    ]
    caption = (
        f"{note}<b>Who is better, on the same patients.</b> ▲ better than the one that it is held "
        "against, ▼ worse, · undecided: the 95 % interval of the paired difference, in brackets, "
        "contains zero. The signs follow the intervals; where p says otherwise, the case is "
        f"borderline.{_tests(line for row in lines.values() for line in row)}"
    )
    return figure(table(heads, rows, told="Paired differences"), caption)


def _tests(lines: Iterable[Line | None]) -> str:
    """Where the p-values of a table come from, HTML; empty where there is none."""
    tests = names_of_tests(line for line in lines if line is not None)
    return f" p: two-sided, {tests}; Holm: corrected over the findings." if tests else ""


def names_of_tests(lines: Iterable[Line]) -> str:
    """Names of the tests that gave p-values, HTML."""
    tested = [line for line in lines if line["p_value"] is not None and line.get("test")]
    return escaped(" or ".join(dict.fromkeys(str(line["test"]) for line in tested)))


def _cell(line: Line | None) -> str:
    if line is None:
        return number_cell(None)
    how = outcome(line)
    low, high = signed(line["ci_low"]), signed(line["ci_high"])
    tested = [probability(line["p_value"])] if line["p_value"] is not None else []
    tested += [f"Holm {probability(line['p_holm'])}"] if line["p_holm"] is not None else []
    told = f'<span class="ci">{escaped("; ".join(tested))}</span>' if tested else ""
    return (
        f'<td data-value="{line["value"]!r}"><span class="{how}"><span aria-label="{how}">'
        f"{_SIGNS[how]}</span> {signed(line['value'])}</span> "
        f'<span class="ci">[{low}, {high}]</span>{told}</td>'
    )


def _charts(evaluation: Evaluation, subject: str, note: str) -> str:
    """One encoder's differences from the others."""
    name = readable_names(evaluation.encoders)[subject]
    charts = []
    for measure in measures(evaluation):
        bars = _bars(evaluation, subject, measure)
        if bars:
            axis = f"difference in {measure.unit}, 95 % interval"
            title = shortened(measure.column, 44)
            charts.append(
                interval_chart(bars, title=title, axis=axis, zero=0, zero_label="no difference")
            )
    if not charts:
        return ""
    caption = (
        f"{note}<b>{escaped(name)} minus the other, on the same patients.</b> Right of the dashed "
        f"line, {escaped(name)} is better; an interval that crosses it decides nothing."
    )
    return figure(f'<div class="charts">{"".join(charts)}</div>', caption)


def _bars(evaluation: Evaluation, subject: str, measure: Measure) -> list[Bar]:
    bars = []
    for k, (reference, name) in enumerate(readable_names(evaluation.encoders).items()):
        line = evaluation.difference(subject, reference, measure.target, measure.metric)
        if line is not None:
            value, low, high = line["value"], line["ci_low"], line["ci_high"]
            told = f"{signed(value)} [{signed(low)}, {signed(high)}]"
            label = f"against {shortened(name, 28)}"
            bars.append(Bar(label, k, value, low, high, signed(value), told))
    return bars


def _findings(evaluation: Evaluation, subject: str, note: str) -> str:
    """One encoder's differences in each finding."""
    names = readable_names(evaluation.encoders)
    lines = {
        (finding, reference): line
        for finding in evaluation.findings
        for reference in names
        if (line := evaluation.difference(subject, reference, finding, "auroc")) is not None
    }
    if not lines:
        return ""
    references = [r for r in names if any(reference == r for _, reference in lines)]
    heads = head("Finding") + "".join(head(f"against {escaped(names[r])}") for r in references)
    rows = [
        f'<tr><th scope="row">{escaped(listed([finding]))}</th>'
        + "".join(_cell(lines.get((finding, r))) for r in references)
        + "</tr>"
        for finding in dict.fromkeys(finding for finding, _ in lines)
    ]
    name = escaped(names[subject])
    caption = (
        f"{note}<b>{name} minus the others, finding by finding.</b> Differences in AUROC, 95 % "
        f"intervals.{_tests(lines.values())}"
    )
    shown = figure(table(heads, rows, told=f"Differences by finding: {names[subject]}"), caption)
    return f"<details><summary>{name}, finding by finding</summary>{shown}</details>"
