"""Patient records: what the encoders know of sex, age, weight and BMI."""

from __future__ import annotations

import numpy as np

from selfray.summary.charts import scatter_chart
from selfray.summary.inputs import Evaluation
from selfray.summary.judged_cells import best_legend, judged_cell
from selfray.summary.markup import escaped, figure, listed, shortened
from selfray.summary.number_cells import Line, encoder_heads, head, table
from selfray.summary.results_section import measure_charts, undefined_reasons
from selfray.summary.verdict import cell_text, measures, readable_names

_UNITS = {"age_years": ("age", "years"), "weight_kg": ("weight", "kg"), "bmi": ("BMI", "kg/m²")}
_BINARY = {"auroc": "AUROC", "auprc": "AUPRC"}
_NUMBER = {"r2": "R²", "mae": "MAE", "pearson": "Pearson", "spearman": "Spearman"}

_POINTS = 2000
"""Of all plots of one record: as many images as the eye takes in, and some 20 kB."""
_HIDDEN = 5
"""Images at each end of a record that no plot tells apart: the extreme ones name a patient."""
_OLDEST = 90.0
"""Years. Ages above 89 identify (HIPAA Privacy Rule, 45 CFR 164.514(b)(2)(i)(C))."""


def records_section(evaluation: Evaluation, note: str) -> str:
    """Charts of the encoders, predictions against the truth, and a table.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when no record was predicted.
    """
    shown = [m for m in measures(evaluation) if m.target != "macro"]
    if not shown:
        return ""
    caption = (
        f"{note}<b>What each encoder knows of the patient.</b> Predicted from the frozen features "
        "of an image. Dot: estimate on the test split; bar: 95 % interval. Dashed: an encoder that "
        "knows nothing."
    )
    charts = measure_charts(evaluation, shown)
    return (
        "<h3>Patient records: sex, age, weight, BMI</h3>"
        + (figure(charts, caption) if charts else "")
        + _table(evaluation, [m.target for m in shown], note)
        + _scatters(evaluation, [m.target for m in shown if m.metric == "r2"], note)
    )


def _table(evaluation: Evaluation, targets: list[str], note: str) -> str:
    names = readable_names(evaluation.encoders)
    recorded = dict.fromkeys(line["target"] for line in evaluation.whole)
    values = [t for target in targets for t in recorded if t.startswith(f"{target}=")]
    rows, lines = [], []
    for target in dict.fromkeys([*targets, *values]):
        name, unit = _UNITS.get(target, (listed([target]), ""))
        for metric, title in (_BINARY | _NUMBER).items():
            row = [evaluation.result(encoder, target, metric) for encoder in names]
            if any(row):
                told = f"{name}, {title}" + (f" ({unit})" if metric == "mae" and unit else "")
                cells = "".join(map(judged_cell, row))
                rows.append(f'<tr><th scope="row">{escaped(told)}</th>{cells}</tr>')
                lines += row
    caption = (
        f"{note}95 % intervals. AUROC and AUPRC, of a category the mean over its values. R²: "
        "share of the variance that is explained, higher is better; MAE: mean absolute error, "
        "lower is better; Pearson and Spearman: correlation of values and of ranks."
        + undefined_reasons(evaluation, targets)
        + best_legend(lines, "encoder of the row")
    )
    heads = head("Record") + encoder_heads(names.values())
    return figure(table(heads, rows, told="Patient records"), caption)


def _scatters(evaluation: Evaluation, targets: list[str], note: str) -> str:
    parts = [panels for target in targets if (panels := _panels(evaluation, target))]
    if not parts:
        return ""
    caption = (
        f"{note}<b>Predicted against true.</b> A dot is a test image, drawn from all at random and "
        f"placed roughly; dashed: prediction and truth are equal. At least the {_HIDDEN} least and "
        f"the {_HIDDEN} greatest values lie on the edges together, so that no patient is known by "
        "them. In brackets, 95 % intervals of all test images."
    )
    return figure("".join(parts), caption)


def _panels(evaluation: Evaluation, target: str) -> str:
    """A plot for each encoder, all of the same images."""
    names = readable_names(evaluation.encoders)
    kept = {
        encoder: predicted
        for encoder in names
        if (predicted := evaluation.predictions(encoder, target, "r2")) is not None
    }
    images = min((len(truth) for truth, _ in kept.values()), default=0)
    if images < 4 * _HIDDEN:
        return ""
    rows = np.random.default_rng(0).permutation(images)[: _POINTS // len(kept)]
    name, unit = _UNITS.get(target, (listed([target]), ""))
    axis = f"{shortened(name, 16)} ({unit})" if unit else shortened(name, 22)
    panels = []
    for k, (encoder, spoken) in enumerate(names.items()):
        if encoder not in kept:
            continue
        truth, predicted = kept[encoder]
        told = _told(evaluation, encoder, target)
        chart = scatter_chart(
            truth[rows],
            predicted[rows],
            series=k,
            title=shortened(spoken, 24),
            axis=axis,
            limits=_limits(truth, target),
            told=", ".join(told.splitlines()),
        )
        panels.append(f'<div>{chart}<p class="told">{escaped(told)}</p></div>')
    head4 = f"<h4>{escaped(name[:1].upper() + name[1:])}</h4>"
    return f'{head4}<div class="panels">{"".join(panels)}</div>'


def _limits(truth: np.ndarray, target: str) -> tuple[float, float]:
    """Ends of the axis, at which at least `_HIDDEN` images lie."""
    ordered = np.sort(truth)
    low, high = float(ordered[_HIDDEN - 1]), float(ordered[-_HIDDEN])
    if target == "age_years":
        high = min(high, _OLDEST)
    return (low, high) if low < high else (low - 0.5, low + 0.5)


def _told(evaluation: Evaluation, encoder: str, target: str) -> str:
    lines: dict[str, Line | None] = {
        title: evaluation.result(encoder, target, metric) for metric, title in _NUMBER.items()
    }
    return "\n".join(
        f"{title} {cell_text(line)}"
        for title, line in lines.items()
        if line is not None and line["value"] is not None
    )
