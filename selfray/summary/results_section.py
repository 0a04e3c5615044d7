"""Results of an evaluation: tables, intervals, paired differences."""

from __future__ import annotations

from typing import Any

from selfray.summary.charts import SERIES, Bar, interval_chart, span
from selfray.summary.inputs import Evaluation
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.verdict import (
    MEASURES,
    Measure,
    cell_text,
    comparisons,
    outcome,
    readable_names,
    signed,
    subjects,
)

_SIGNS = {"better": "▲", "worse": "▼", "undecided": "·"}
_REAL_TARGETS = (
    ("age", "age_years", "years"),
    ("weight", "weight_kg", "kg"),
    ("BMI", "bmi", "kg/m²"),
)
_KNN = Measure("over the findings", "AUROC", "Findings, k-NN macro-AUROC", "macro", "auroc", 0.5)


def results_section(evaluation: Evaluation, note: str) -> str:
    """What one evaluation adds to the section.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.
    """
    name = evaluation.dataset.get("name", evaluation.path.name)
    head = f"<h2>Results on {escaped(name)}</h2>"
    if not evaluation.results:
        return f"{head}<p>No result is recorded yet.</p>"
    return (
        head
        + _main_table(evaluation, note)
        + _main_charts(evaluation, note)
        + _differences(evaluation, note)
        + _findings(evaluation, note)
        + _real_targets(evaluation, note)
    )


def _main_table(evaluation: Evaluation, note: str) -> str:
    columns = [(m, "linear") for m in MEASURES] + [(_KNN, "knn")]
    columns = [c for c in columns if any(_line(evaluation, e, *c) for e in evaluation.encoders)]
    head = "".join(f'<th scope="col">{m.column}</th>' for m, _ in columns)
    rows = []
    for k, (encoder, name) in enumerate(readable_names(evaluation.encoders).items()):
        cells = "".join(_cell(_line(evaluation, encoder, *column)) for column in columns)
        rows.append(f"<tr>{_name_cell(k, encoder, name)}{cells}</tr>")
    table = _table(f'<th scope="col">Encoder</th>{head}', rows)
    caption = (
        f"{note}Frozen features, probes fitted on the train split, their penalty (or k) chosen on "
        "the validate split, scored on the test split. In brackets, 95 % intervals by resampling "
        "patients. Higher is better; AUROC of chance is 0.5, R² of the mean is 0."
    )
    return figure(table, caption)


def _line(
    evaluation: Evaluation, encoder: str, measure: Measure, probe: str
) -> dict[str, Any] | None:
    return evaluation.result(encoder, measure.target, measure.metric, probe)


def _main_charts(evaluation: Evaluation, note: str) -> str:
    charts = []
    for measure in MEASURES:
        bars = _bars(evaluation, measure.target, measure.metric)
        if bars:
            title, axis = measure.column.split(", ")
            charts.append(
                interval_chart(
                    bars,
                    title=title,
                    axis=f"{axis}, 95 % interval",
                    zero=measure.ignorance,
                    zero_label="chance" if measure.metric == "auroc" else "the mean of all",
                )
            )
    caption = (
        f"{note}<b>What each encoder knows.</b> Dot: estimate on the test split; bar: 95 % "
        "interval. Dashed: an encoder that knows nothing."
    )
    return figure(f'<div class="charts">{"".join(charts)}</div>', caption) if charts else ""


def _bars(evaluation: Evaluation, target: str, metric: str) -> list[Bar]:
    """A bar for each encoder that has the number."""
    lines = {
        name: evaluation.result(encoder, target, metric)
        for encoder, name in readable_names(evaluation.encoders).items()
    }
    return [
        Bar(
            shortened(name),
            k,
            line["value"],
            line["ci_low"],
            line["ci_high"],
            cell_text(line).partition(" ")[0],
            cell_text(line),
        )
        for k, (name, line) in enumerate(lines.items())
        if line is not None and line["value"] is not None
    ]


def _differences(evaluation: Evaluation, note: str) -> str:
    pairs = comparisons(evaluation)
    if not pairs:
        return ""
    first, *others = [
        _difference_charts(evaluation, s, note) for s in subjects(evaluation.encoders)
    ]
    folded = "".join(
        f"<details><summary>Charts of {escaped(name)}</summary>{charts}</details>"
        for name, charts in others
        if charts
    )
    table = _differences_table(evaluation, pairs, note)
    return f"<h3>Paired differences</h3>{table}{first[1]}{folded}"


def _differences_table(evaluation: Evaluation, pairs: list[tuple[str, str]], note: str) -> str:
    names = readable_names(evaluation.encoders)
    lines = {
        pair: [evaluation.difference(*pair, m.target, m.metric) for m in MEASURES] for pair in pairs
    }
    shown = [k for k in range(len(MEASURES)) if any(row[k] is not None for row in lines.values())]
    head = '<th scope="col">Encoder</th><th scope="col" class="name">against</th>'
    head += "".join(f'<th scope="col">{MEASURES[k].column}</th>' for k in shown)
    rows = [
        f'<tr><th scope="row">{escaped(names[subject])}</th>'
        f'<td class="name">{escaped(names[reference])}</td>'
        + "".join(_difference_cell(row[k]) for k in shown)
        + "</tr>"
        for (subject, reference), row in lines.items()
    ]
    caption = (
        f"{note}<b>Who is better, on the same patients.</b> ▲ better than the one "
        "that it is held against, ▼ worse, · undecided: the 95 % interval of the paired "
        "difference, in brackets, contains zero."
    )
    return figure(_table(head, rows), caption)


def _difference_cell(line: dict[str, Any] | None) -> str:
    if line is None:
        return _cell(None)
    how = outcome(line)
    low, high = signed(line["ci_low"]), signed(line["ci_high"])
    return (
        f'<td data-value="{line["value"]!r}"><span class="{how}"><span aria-label="{how}">'
        f"{_SIGNS[how]}</span> {signed(line['value'])}</span> "
        f'<span class="ci">[{low}, {high}]</span></td>'
    )


def _difference_charts(evaluation: Evaluation, subject: str, note: str) -> tuple[str, str]:
    """The encoder's name, and its differences from the others as charts."""
    name = readable_names(evaluation.encoders)[subject]
    charts = []
    for measure in MEASURES:
        bars = _difference_bars(evaluation, subject, measure)
        if bars:
            title, axis = measure.column.split(", ")
            axis = f"difference in {axis}, 95 % interval"
            charts.append(
                interval_chart(bars, title=title, axis=axis, zero=0, zero_label="no difference")
            )
    if not charts:
        return name, ""
    caption = (
        f"{note}<b>{escaped(name)} minus the other, on the same patients.</b> Right of the dashed "
        f"line, {escaped(name)} is better; an interval that crosses it decides nothing."
    )
    return name, figure(f'<div class="charts">{"".join(charts)}</div>', caption)


def _difference_bars(evaluation: Evaluation, subject: str, measure: Measure) -> list[Bar]:
    bars = []
    for k, (reference, name) in enumerate(readable_names(evaluation.encoders).items()):
        line = evaluation.difference(subject, reference, measure.target, measure.metric)
        if line is not None:
            value, low, high = line["value"], line["ci_low"], line["ci_high"]
            told = f"{signed(value)} [{signed(low)}, {signed(high)}]"
            label = f"against {shortened(name, 28)}"
            bars.append(Bar(label, k, value, low, high, signed(value), told))
    return bars


def _findings(evaluation: Evaluation, note: str) -> str:
    if not evaluation.findings:
        return ""
    bars = {f: _bars(evaluation, f, "auroc") for f in evaluation.findings}
    bars = {f: defined for f, defined in bars.items() if defined}
    limits = span([bar for defined in bars.values() for bar in defined], 0.5) if bars else None
    charts = [
        interval_chart(
            defined,
            title=listed([finding]),
            axis="AUROC, 95 % interval",
            zero=0.5,
            zero_label="chance",
            limits=limits,
        )
        for finding, defined in bars.items()
    ]
    caption = f"{note}<b>Each finding.</b> Linear probes, same axis in all; dashed: chance."
    return (
        "<h3>Each finding</h3>"
        + (figure(f'<div class="charts">{"".join(charts)}</div>', caption) if charts else "")
        + _findings_table(
            evaluation,
            "auroc",
            f"{note}AUROC of linear probes, 95 % intervals.{_reasons(evaluation)}",
        )
        + _findings_table(
            evaluation,
            "auprc",
            f"{note}AUPRC (average precision) of linear probes, 95 % intervals. An encoder that "
            "knows nothing has the prevalence.",
        )
    )


def _reasons(evaluation: Evaluation) -> str:
    """Why findings are not defined, each reason once."""
    lacking: dict[str, list[str]] = {}
    for line in evaluation.results:
        finding, reason = line["target"], line.get("reason")
        if finding in evaluation.findings and line["value"] is None and reason:
            lacking.setdefault(str(reason), []).append(finding)
    told = [f"{listed(dict.fromkeys(names))} ({reason})" for reason, names in lacking.items()]
    return f" Not defined: {escaped('; '.join(told))}." if told else ""


def _findings_table(evaluation: Evaluation, metric: str, caption: str) -> str:
    names = readable_names(evaluation.encoders)
    head = '<th scope="col">Finding</th><th scope="col">Images</th><th scope="col">Prevalence</th>'
    rows = []
    for finding in evaluation.findings:
        lines = [evaluation.result(encoder, finding, metric) for encoder in names]
        known = next((line for line in lines if line), None)
        if known is None:
            known = next((r for r in evaluation.results if r["target"] == finding), {})
        n, prevalence = known.get("n"), known.get("prevalence")
        rows.append(
            f'<tr><th scope="row">{escaped(listed([finding]))}</th>'
            + _plain_cell(n, f"{n:,}" if n is not None else "")
            + _plain_cell(prevalence, f"{100 * prevalence:.1f} %" if prevalence is not None else "")
            + "".join(map(_cell, lines))
            + "</tr>"
        )
    return figure(_table(head + _encoder_heads(names), rows), caption)


def _real_targets(evaluation: Evaluation, note: str) -> str:
    """Age, weight and BMI: how far off, how well ordered."""
    names = readable_names(evaluation.encoders)
    rows = []
    for what, target, unit in _REAL_TARGETS:
        for metric, title in (("r2", "R²"), ("mae", f"MAE ({unit})"), ("pearson", "Pearson")):
            lines = [evaluation.result(encoder, target, metric) for encoder in names]
            if any(lines):
                cells = "".join(map(_cell, lines))
                rows.append(f'<tr><th scope="row">{what}, {title}</th>{cells}</tr>')
    if not rows:
        return ""
    caption = (
        f"{note}Ridge regressions, 95 % intervals. R²: share of the variance that is explained, "
        "higher is better; MAE: mean absolute error, lower is better; Pearson: correlation."
    )
    table = _table(f'<th scope="col">Target</th>{_encoder_heads(names)}', rows)
    return f"<h3>Age, weight and BMI</h3>{figure(table, caption)}"


def _encoder_heads(names: dict[str, str]) -> str:
    return "".join(
        f'<th scope="col">{_swatch(k)}{escaped(name)}</th>' for k, name in enumerate(names.values())
    )


def _table(head: str, rows: list[str]) -> str:
    return (
        f'<div class="scroll" tabindex="0"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _name_cell(series: int, encoder: str, name: str) -> str:
    return f'<th scope="row" title="{escaped(encoder)}">{_swatch(series)}{escaped(name)}</th>'


def _swatch(series: int) -> str:
    return f'<span class="swatch" style="background:var(--series-{series % SERIES})"></span>'


def _cell(line: dict[str, Any] | None) -> str:
    """The number in full is in `data-value`, for sorting and for whoever wants it."""
    if line is None or line["value"] is None:
        why = (line or {}).get("reason") or "not recorded"
        return f'<td data-value="" title="{escaped(why)}">not defined</td>'
    value, interval = cell_text(line).partition(" ")[::2]
    spread = f' <span class="ci">{interval}</span>' if interval else ""
    return f'<td data-value="{line["value"]!r}">{value}{spread}</td>'


def _plain_cell(value: float | None, text: str) -> str:
    return f'<td data-value="{"" if value is None else repr(value)}">{text}</td>'
