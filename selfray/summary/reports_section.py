"""Reports: how far they agree with the radiologists', by writer, and how they read."""

from __future__ import annotations

from selfray.evaluate.report_writing import (
    LANGUAGE_MODEL,
    MOST_FREQUENT,
    NEAREST,
    OTHER_IMAGE,
    OTHER_NEIGHBOUR,
    WRITERS,
)
from selfray.summary.charts import Bar, interval_chart
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import best_legend, judged_cell
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.number_cells import Line, fixed, head, series_mark, table
from selfray.summary.report_pictures import report_pictures
from selfray.summary.verdict import claim, opening, outcome, readable_names

_METRICS = {
    ("macro", "clinical_f1"): "Clinical F1, macro",
    ("micro", "clinical_f1"): "Clinical F1, micro",
    ("macro", "clinical_precision"): "Precision, macro",
    ("macro", "clinical_recall"): "Recall, macro",
    ("", "radgraph_rg_er"): "RadGraph RG_ER",
    ("", "rouge_l"): "ROUGE-L",
    ("", "bleu_1"): "BLEU-1",
    ("", "bleu_2"): "BLEU-2",
    ("", "bleu_3"): "BLEU-3",
    ("", "bleu_4"): "BLEU-4",
    ("", "meteor_exact_stem"): "METEOR (exact, stem)",
}
"""Target (the part that is written where empty) and metric, and the column's title."""
_FIRST = ("macro", "clinical_f1")
_NOT_FINDINGS = {"macro", "micro", "macro-5", "micro-5"}

_COMPARED = {
    OTHER_IMAGE: "those it writes of another patient's image",
    NEAREST: "the report of the nearest neighbour",
    OTHER_NEIGHBOUR: "that of another patient's nearest neighbour",
    MOST_FREQUENT: "the most frequent report",
}
"""What the language model's reports are held against, in a sentence."""

_Row = tuple[str, str]
"""Encoder and writer."""


def reports_section(evaluation: Evaluation, note: str) -> str:
    """What report generation adds to the results of one evaluation.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when no reports were written.
    """
    lines = [line for line in evaluation.reports if "reference" not in line]
    if not lines:
        return ""
    names = readable_names(evaluation.encoders)
    written = next(x["target"] for x in lines if x["metric"] == "rouge_l")
    return (
        "<h3>Reports</h3>"
        + _table(lines, names, written, evaluation, note)
        + _chart(lines, names, note)
        + _findings(lines, names, note)
        + report_pictures(evaluation, names, note)
    )


def reports_verdict(evaluation: Evaluation) -> tuple[str, list[tuple[str, str]]]:
    """What was found of reports, as `evaluation_verdict` says it: writers instead of encoders.

    Args:
        evaluation: With `reports`.

    Returns:
        The opening words, and for each encoder its name and what the language model's reports are
        better or worse than.
    """
    names = readable_names(evaluation.encoders)
    for (target, metric), title in _METRICS.items():
        of = [
            x
            for x in evaluation.reports
            if x["probe"] == LANGUAGE_MODEL
            and x["metric"].removesuffix("_difference") == metric
            and target in ("", x["target"])
        ]
        known = [x for x in of if "reference" not in x and x["value"] is not None]
        if known:
            claims = [(names[x["encoder"]], claim(x, _outcomes(x["encoder"], of))) for x in known]
            named = title.replace("Clinical F1, macro", "clinical F1 (mean over the findings)")
            told = f"{named} of the language model's reports"
            return opening(known, told, "studies"), claims
    return "Reports were written, and no number of them is defined.", []


def _outcomes(encoder: str, lines: list[Line]) -> list[tuple[str, str]]:
    """How the language model did against the other writers, through the same encoder."""
    return [
        (outcome(x), _COMPARED.get(x["reference_probe"], _spoken(x["reference_probe"])))
        for x in lines
        if x["encoder"] == encoder and x.get("reference_probe") and x.get("ci_low") is not None
    ]


def _table(
    lines: list[Line], names: dict[str, str], written: str, evaluation: Evaluation, note: str
) -> str:
    cells = {(x["encoder"], x["probe"], x["target"], x["metric"]): x for x in lines}
    rows: list[_Row] = list(dict.fromkeys((x["encoder"], x["probe"]) for x in lines))
    rows.sort(key=lambda row: (list(names).index(row[0]), list(WRITERS).index(row[1])))
    columns = [
        (target or written, metric, title)
        for (target, metric), title in _METRICS.items()
        if any(x["metric"] == metric and x["value"] is not None for x in lines)
    ]
    heads = head("Encoder", "name") + head("Writer", "name")
    heads += "".join(head(escaped(title)) for *_, title in columns)
    body = [
        f'<tr><th scope="row">{series_mark(list(names).index(encoder))} '
        f'{escaped(names[encoder])}</th><td class="protocol">{escaped(_spoken(writer))}</td>'
        + "".join(judged_cell(cells.get((encoder, writer, t, m))) for t, m, _ in columns)
        + "</tr>"
        for encoder, writer in rows
    ]
    shown_metrics = {metric for _, metric, _ in columns}
    missing = {str(x.get("reason")) for x in lines if x["metric"] not in shown_metrics}
    n, patients = lines[0]["n"], lines[0]["n_patients"]
    caption = (
        f"{note}<b>The {escaped(written)} of {n:,} test studies ({patients:,} patients), written "
        "and true.</b> 95 % intervals by resampling patients; of all, higher is better, at most 1. "
        + " ".join(f"<i>{escaped(_spoken(w))}</i>: {escaped(said)}." for w, said in WRITERS.items())
        + " A number without an interval is one that every resample of the patients gives, which "
        "is no certainty. Bold and daggers compare encoders within a writer."
        + best_legend(lines, "writer, of a column")
        + "".join(f" {escaped(reason[:1].upper() + reason[1:])}." for reason in sorted(missing))
    )
    variants = evaluation.info.get("metric_variants")
    shown = figure(table(heads, body, told="Reports, encoders by writers"), caption)
    if isinstance(variants, dict):
        told = "".join(f"<dt>{escaped(k)}</dt><dd>{escaped(v)}</dd>" for k, v in variants.items())
        shown += (
            "<details><summary>Which variant of each metric</summary>"
            f'<dl class="facts">{told}</dl></details>'
        )
    return shown


def _chart(lines: list[Line], names: dict[str, str], note: str) -> str:
    """The main number, writers of an encoder one below the other."""
    target, metric = _FIRST
    chosen = [
        x
        for x in lines
        if (x["target"], x["metric"]) == (target, metric) and x["value"] is not None
    ]
    if not chosen:
        return ""
    chosen.sort(key=lambda x: (list(WRITERS).index(x["probe"]), list(names).index(x["encoder"])))
    bars = [
        Bar(
            label=shortened(f"{_spoken(x['probe'])}: {names[x['encoder']]}", 48),
            series=list(names).index(x["encoder"]),
            value=x["value"],
            low=x["ci_low"],
            high=x["ci_high"],
            text=fixed(x["value"]),
            told=fixed(x["value"]),
        )
        for x in chosen
    ]
    caption = (
        f"{note}<b>Do the reports state the findings that are there?</b> F1 of findings, mean over "
        "findings. What the language model gains over another patient's image comes from the "
        "image; so does what the nearest neighbour gains over another patient's."
    )
    chart = interval_chart(
        bars, title="Clinical F1 by writer", axis="macro F1", zero=None, zero_label=""
    )
    return figure(chart, caption)


def _findings(lines: list[Line], names: dict[str, str], note: str) -> str:
    """F1 of each finding by the language model."""
    f1 = [
        x
        for x in lines
        if x["metric"] == "clinical_f1"
        and x["probe"] == LANGUAGE_MODEL
        and x["target"] not in _NOT_FINDINGS
    ]
    if not f1:
        return ""
    cells = {(x["target"], x["encoder"]): x for x in f1}
    heads = head("Finding", "name") + "".join(
        head(f"{series_mark(k)} {escaped(name)}") for k, name in enumerate(names.values())
    )
    rows = [
        f'<tr><th scope="row">{escaped(listed([finding]))}</th>'
        + "".join(judged_cell(cells.get((finding, encoder))) for encoder in names)
        + "</tr>"
        for finding in dict.fromkeys(x["target"] for x in f1)
    ]
    caption = f"{note}<b>F1 of each finding in the language model's reports.</b>"
    shown = figure(table(heads, rows, told="Clinical F1 by finding"), caption)
    return f"<details><summary>By finding</summary>{shown}</details>"


def _spoken(writer: str) -> str:
    return writer.replace("-", " ").replace("other patients", "other patient's")
