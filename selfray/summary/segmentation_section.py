"""Segmentation: label maps from frozen patch tokens, label by label, and how they look."""

from __future__ import annotations

from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import best_legend, judged_cell, probe_name
from selfray.summary.markup import escaped, figure, listed
from selfray.summary.number_cells import (
    METRIC_NAMES,
    Line,
    head,
    series_mark,
    table,
)
from selfray.summary.segmentation_pictures import segmentation_pictures
from selfray.summary.verdict import readable_names

_METRICS = {"dice": 3, "iou": 3, "hd95": 2, "asd": 2}
"""With the decimal places that are shown."""
_DISTANCES = ("hd95", "asd")
_MEAN = "macro"

_Column = tuple[str, str]
"""Encoder and decoder."""


def segmentation_section(evaluation: Evaluation, note: str) -> str:
    """What segmentation adds to the results of one evaluation.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when nothing was segmented.
    """
    lines = [
        line
        for line in evaluation.results
        if line.get("task") == "segmentation"
        and line["metric"] in _METRICS
        and not ({"trained_on", "grouped_by"} & line.keys())
    ]
    if not lines:
        return ""
    names = readable_names(evaluation.encoders)
    return (
        "<h3>Segmentation</h3>"
        + _tables(lines, names, note)
        + segmentation_pictures(evaluation, _ranked(lines), note)
    )


def _tables(lines: list[Line], names: dict[str, str], note: str) -> str:
    metrics = [metric for metric in _METRICS if any(line["metric"] == metric for line in lines)]
    tables = [_table([line for line in lines if line["metric"] == m], m, names) for m in metrics]
    caption = note + _CAPTION + best_legend(lines, "of the row for a decoder")
    shown = figure(tables[0], caption)
    if tables[1:]:
        further = ", ".join(METRIC_NAMES[metric] for metric in metrics[1:])
        shown += (
            f"<details><summary>{further}</summary>{figure(''.join(tables[1:]), caption)}</details>"
        )
    return shown


_CAPTION = (
    "<b>Label maps against the truth.</b> Means over the test images, 95 % intervals by "
    "resampling patients. Dice and IoU: higher is better, at most 1. HD95 and "
    "ASD: 95th percentile of the distances between the outlines, and their mean; lower is better. "
    "Of an image where a label is in neither map, Dice and IoU are 1; where it is in only one of "
    "the two, they are 0. Distances are of the images where it is in both, so that an encoder that "
    "misses it altogether is not charged for it there: read them beside Dice."
)


def _table(lines: list[Line], metric: str, names: dict[str, str]) -> str:
    cells = {(x["target"], (x["encoder"], str(x.get("probe", "linear")))): x for x in lines}
    columns = list(dict.fromkeys(column for _, column in cells))
    columns.sort(key=lambda column: list(names).index(column[0]))
    labels = list(dict.fromkeys(label for label, _ in cells if label != _MEAN))
    units = dict.fromkeys(str(x["unit"]) for x in lines if x.get("unit"))
    title = METRIC_NAMES[metric] + (f" ({' or '.join(units)})" if units else "")
    heads = (
        head(escaped(title), "name")
        + head("Images")
        + "".join(
            head(_column(list(names).index(encoder), names[encoder], decoder))
            for encoder, decoder in columns
        )
    )
    digits = _METRICS[metric]
    rows = [
        f'<tr><th scope="row">{escaped(listed([label]))}</th>'
        + _images([line for (of, _), line in cells.items() if of == label])
        + "".join(judged_cell(cells.get((label, column)), digits) for column in columns)
        + "</tr>"
        for label in labels
    ]
    if any(label == _MEAN for label, _ in cells):
        mean = "".join(judged_cell(cells.get((_MEAN, column)), digits) for column in columns)
        rows.append(
            f'<tr class="total"><th scope="row">mean over the labels</th>'
            f'<td data-value=""></td>{mean}</tr>'
        )
    return table(heads, rows, told=f"{title} by label", kind="groups")


def _column(series: int, name: str, decoder: str) -> str:
    spoken = escaped(probe_name(decoder))
    return f'{series_mark(series)} {escaped(name)}<span class="ci">{spoken}</span>'


def _images(lines: list[Line]) -> str:
    """How many images a label was judged on: of distances, not as many for every encoder."""
    counts = sorted({line["n"] for line in lines if line["n"] is not None})
    if not counts:
        return '<td data-value=""></td>'
    text = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if counts[1:] else "")
    return f'<td data-value="{counts[0]}">{text}</td>'


def _ranked(lines: list[Line]) -> list[_Column]:
    """By mean Dice, the highest first."""
    means = [
        line
        for line in lines
        if (line["target"], line["metric"]) == (_MEAN, "dice") and line["value"] is not None
    ]
    means.sort(key=lambda line: -line["value"])
    return [(line["encoder"], str(line.get("probe", "linear"))) for line in means]
