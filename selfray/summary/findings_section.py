"""Each finding: how well it is told, with its prevalence beside it."""

from __future__ import annotations

from selfray.summary.charts import interval_chart, span
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import best_legend, judged_cell
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.number_cells import count_cell, encoder_heads, head, table
from selfray.summary.results_section import encoder_bars, undefined_reasons
from selfray.summary.verdict import readable_names

_METRICS = {
    "auroc": ("AUROC", "Chance has 0.5."),
    "auprc": ("AUPRC", "Average precision; chance has the prevalence."),
    "sensitivity_at_90_specificity": (
        "Sensitivity at 90 % specificity",
        "Of the images with the finding, the share above the lowest threshold that at most 10 % of "
        "the others are above; chance has 0.1.",
    ),
}


def findings_section(evaluation: Evaluation, note: str) -> str:
    """Charts and tables of each finding.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when no finding was judged.
    """
    if not evaluation.findings or not evaluation.results:
        return ""
    reasons = undefined_reasons(evaluation, evaluation.findings)
    tables = [
        findings_table(evaluation, metric, title, f"{note}{told}{reasons if k == 0 else ''}")
        for k, (metric, (title, told)) in enumerate(_METRICS.items())
    ]
    return "<h3>Each finding</h3>" + _charts(evaluation, note) + "".join(tables)


def _charts(evaluation: Evaluation, note: str) -> str:
    bars = {f: encoder_bars(evaluation, f, "auroc") for f in evaluation.findings}
    bars = {f: defined for f, defined in bars.items() if defined}
    if not bars:
        return ""
    limits = span([bar for defined in bars.values() for bar in defined], 0.5)
    charts = [
        interval_chart(
            defined,
            title=shortened(listed([finding])),
            axis="AUROC, 95 % interval",
            zero=0.5,
            zero_label="chance",
            limits=limits,
        )
        for finding, defined in bars.items()
    ]
    caption = f"{note}<b>Each finding.</b> Frozen features, same axis in all; dashed: chance."
    return figure(f'<div class="charts">{"".join(charts)}</div>', caption)


def findings_table(evaluation: Evaluation, metric: str, title: str, caption: str) -> str:
    """A row a finding, a column an encoder; empty where nobody has the metric.

    Args:
        evaluation: Read by `read_evaluation`.
        metric: Its name in the results.
        title: Above the table.
        caption: HTML.
    """
    names = readable_names(evaluation.encoders)
    lines = {f: [evaluation.result(e, f, metric) for e in names] for f in evaluation.findings}
    shown = [line for row in lines.values() for line in row]
    if not any(shown):
        return ""
    heads = head("Finding") + head("Images") + head("Prevalence") + encoder_heads(names.values())
    rows = []
    for finding, row in lines.items():
        known = next((line for line in row if line), None)
        if known is None:
            known = next((line for line in evaluation.whole if line["target"] == finding), {})
        rows.append(
            f'<tr><th scope="row">{escaped(listed([finding]))}</th>'
            + count_cell(known.get("n"))
            + _prevalence_cell(known.get("prevalence"), known.get("n_positive"))
            + "".join(map(judged_cell, row))
            + "</tr>"
        )
    caption += best_legend(shown, "encoder of the row")
    return f"<h4>{title}</h4>" + figure(table(heads, rows, told=f"Findings: {title}"), caption)


def _prevalence_cell(share: float | None, positive: float | None) -> str:
    if share is None:
        return '<td data-value=""></td>'
    count = "" if positive is None else f'<span class="ci">{positive:,.0f}</span>'
    return f'<td data-value="{share!r}">{100 * share:.1f} %{count}</td>'
