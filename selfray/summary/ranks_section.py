"""Ranks of the encoders, with intervals and the probability of being best."""

from __future__ import annotations

from selfray.summary.charts import Bar, interval_chart
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import probe_name
from selfray.summary.markup import escaped, figure, shortened
from selfray.summary.number_cells import Line
from selfray.summary.verdict import Measure, measures, readable_names


def ranks_section(evaluation: Evaluation, note: str) -> str:
    """Charts of the ranks, those of further protocols folded.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when no rank is recorded.
    """
    lines = [x for x in evaluation.whole if x["metric"] == "rank" and x["value"] is not None]
    parts = []
    for probe in evaluation.probes:
        charts = _charts(evaluation, [line for line in lines if line["probe"] == probe])
        if not charts:
            continue
        caption = (
            f"{note}<b>Ranks, protocol {escaped(probe_name(probe))}.</b> Dot: rank among the "
            "encoders; bar: 95 % interval of the rank over resamples of the patients. At the "
            "right: the share of the resamples in which the encoder comes first."
        )
        shown = figure(f'<div class="charts">{"".join(charts)}</div>', caption)
        folded = f"<details><summary>{escaped(probe_name(probe))}</summary>{shown}</details>"
        parts.append(folded if parts else shown)
    return f"<h3>Ranks</h3>{''.join(parts)}" if parts else ""


def _charts(evaluation: Evaluation, lines: list[Line]) -> list[str]:
    found = {(line["encoder"], line["target"], line.get("of_metric")): line for line in lines}
    charts = []
    for measure in measures(evaluation):
        bars = _bars(evaluation, measure, found)
        if bars:
            charts.append(
                interval_chart(
                    bars,
                    title=shortened(measure.column, 44),
                    axis="rank (1: best), 95 % interval",
                    zero=None,
                    zero_label="",
                    limits=(1, max(2, len(evaluation.encoders))),
                    whole_numbers=True,
                )
            )
    return charts


def _bars(
    evaluation: Evaluation, measure: Measure, found: dict[tuple[str, str, str | None], Line]
) -> list[Bar]:
    bars = []
    for k, (encoder, name) in enumerate(readable_names(evaluation.encoders).items()):
        line = found.get((encoder, measure.target, measure.metric))
        if line is None:
            continue
        low, high, first = line["ci_low"], line["ci_high"], line["probability_best"]
        between = "" if low is None or high is None else f" [{low:g}, {high:g}]"
        best = "" if first is None else f"best in {100 * first:.0f} %"
        told = f"rank {line['value']:g}{between}, {best}".rstrip(", ")
        bars.append(Bar(shortened(name), k, line["value"], low, high, best, told))
    return bars
