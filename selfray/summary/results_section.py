"""Results of an evaluation: the main table, and what the encoders know of the findings."""

from __future__ import annotations

from selfray.summary.charts import Bar, interval_chart
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import best_legend, judged_cell, probe_name
from selfray.summary.leaks import leaking
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.number_cells import Line, fixed, head, series_mark, table
from selfray.summary.verdict import Measure, cell_text, measures, readable_names


def results_section(evaluation: Evaluation, note: str) -> str:
    """What one evaluation adds to the section.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.
    """
    if not evaluation.results:
        return "" if evaluation.reports else "<p>No result is recorded yet.</p>"
    charts = measure_charts(evaluation, [m for m in measures(evaluation) if m.target == "macro"])
    caption = (
        f"{note}<b>Findings and anatomy.</b> Dot: estimate on the test split; bar: 95 % interval. "
        "Dashed, where that does not depend on the data: an encoder that knows nothing."
    )
    return _main_table(evaluation, note) + (figure(charts, caption) if charts else "")


def _main_table(evaluation: Evaluation, note: str) -> str:
    columns = measures(evaluation)
    names = readable_names(evaluation.encoders)
    heads = [head("Encoder"), head("Protocol", "name"), *(head(escaped(m.column)) for m in columns)]
    rows, shown = [], []
    for k, (encoder, name) in enumerate(names.items()):
        for probe in evaluation.probes:
            lines = [evaluation.result(encoder, m.target, m.metric, probe) for m in columns]
            if any(lines):
                shown += lines
                rows.append(_row(evaluation, k, (encoder, name), probe, lines))
    best = best_legend(shown, "encoder of the column with this protocol")
    leak = " ⚠: a leak is said of this encoder above." if leaking(evaluation) else ""
    caption = (
        f"{note}Probes are fitted on the train split, what must be chosen is chosen on the "
        "validate split, every number is of the test split. In brackets, 95 % intervals by "
        "resampling patients. Higher is better; AUROC of chance is 0.5, AUPRC of chance the mean "
        f"prevalence, R² of the mean is 0.{best}{leak}"
    )
    shown_as = table("".join(heads), rows, told="Encoders by task", kind="sortable main")
    return figure(shown_as, caption)


def _row(
    evaluation: Evaluation, series: int, encoder: tuple[str, str], probe: str,
    lines: list[Line | None],
) -> str:  # fmt: skip
    named, name = encoder
    warning = ' <abbr title="see the leak above">⚠</abbr>' if named in leaking(evaluation) else ""
    cells = "".join(
        '<td data-value=""><span class="ci">–</span></td>' if line is None else judged_cell(line)
        for line in lines
    )
    return (
        f'<tr><th scope="row" title="{escaped(named)}">{series_mark(series)}&nbsp;'
        f"{escaped(name).replace('/', '/<wbr>')}{warning}</th>"
        f'<td class="protocol">{escaped(probe_name(probe))}'
        f'<span class="ci">{escaped(_seen(lines))}</span></td>{cells}</tr>'
    )


def _seen(lines: list[Line | None]) -> str:
    """The features of a row, and how many seeds its numbers are means of."""
    there = [line for line in lines if line is not None]
    features = dict.fromkeys(str(line["features"]) for line in there if line.get("features"))
    seeds = {int(line["probe_seeds"]) for line in there if line["probe_seeds"]}
    return ", ".join([*features, *([f"{max(seeds)} seeds"] if seeds else [])])


def measure_charts(evaluation: Evaluation, shown: list[Measure]) -> str:
    """A chart of the encoders for each measure, HTML; empty where none has a number."""
    charts = []
    for measure in shown:
        bars = encoder_bars(evaluation, measure.target, measure.metric)
        if bars:
            charts.append(
                interval_chart(
                    bars,
                    title=shortened(measure.column, 44),
                    axis=f"{measure.unit}, 95 % interval",
                    zero=measure.ignorance,
                    zero_label="an encoder that knows nothing",
                )
            )
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def bar_of(name: str, series: int, line: Line) -> Bar:
    """An encoder's number, which must have a value, as a bar of a chart."""
    return Bar(
        shortened(name),
        series,
        line["value"],
        line["ci_low"],
        line["ci_high"],
        fixed(line["value"]),
        cell_text(line),
    )


def encoder_bars(evaluation: Evaluation, target: str, metric: str) -> list[Bar]:
    """A bar for each encoder that has the number."""
    lines = {
        name: evaluation.result(encoder, target, metric)
        for encoder, name in readable_names(evaluation.encoders).items()
    }
    return [
        bar_of(name, k, line)
        for k, (name, line) in enumerate(lines.items())
        if line is not None and line["value"] is not None
    ]


def undefined_reasons(evaluation: Evaluation, targets: list[str]) -> str:
    """Why targets have no number, each reason once; HTML."""
    lacking: dict[str, list[str]] = {}
    for line in evaluation.whole:
        target, reason = line["target"], line.get("reason")
        if target in targets and line["value"] is None and reason:
            lacking.setdefault(str(reason), []).append(target)
    told = [f"{listed(dict.fromkeys(names))} ({reason})" for reason, names in lacking.items()]
    return f" Not defined: {escaped('; '.join(told))}." if told else ""
