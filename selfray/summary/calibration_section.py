"""Calibration: whether findings are found as often as they are predicted."""

from __future__ import annotations

import numpy as np

from selfray.evals.metrics import reliability_curve
from selfray.summary.charts import reliability_chart
from selfray.summary.findings_section import findings_table
from selfray.summary.inputs import Evaluation
from selfray.summary.markup import figure, listed, shortened
from selfray.summary.number_cells import series_legend
from selfray.summary.predictions import Predicted
from selfray.summary.verdict import readable_names

_FEWEST = 50
"""Images that a reliability plot needs: five a bin, where a share still has steps of a fifth."""

_TABLES = {
    "brier": (
        "Brier score",
        "Mean squared distance of the predicted probability from 1 or 0; lower is better. Whoever "
        "predicts the prevalence p for all has p (1 − p).",
    ),
    "ece": (
        "Expected calibration error",
        "Mean distance of the points of the plots from the diagonal, weighted by their images; "
        "lower is better, never below 0, and in few images above it by chance alone.",
    ),
}


def calibration_section(evaluation: Evaluation, note: str) -> str:
    """Reliability plots from the kept predictions, Brier score and calibration error.

    Args:
        evaluation: Read by `read_evaluation`.
        note: What each caption begins with.

    Returns:
        HTML, empty when neither is there.
    """
    body = _plots(evaluation, note) + "".join(
        findings_table(evaluation, metric, title, f"{note}{told}")
        for metric, (title, told) in _TABLES.items()
    )
    return f"<h3>Calibration</h3>{body}" if body else ""


def _plots(evaluation: Evaluation, note: str) -> str:
    names = readable_names(evaluation.encoders)
    kept = {
        finding: {
            k: predicted
            for k, encoder in enumerate(names)
            if (predicted := evaluation.predictions(encoder, finding, "auroc")) is not None
            and len(predicted[0]) >= _FEWEST
            and _are_probabilities(predicted)
        }
        for finding in evaluation.findings
    }
    panels = [
        _panel(listed([finding]), by_series, list(names.values()))
        for finding, by_series in kept.items()
        if by_series
    ]
    if not panels:
        return ""
    if len(panels) > 1:
        panels.insert(0, _panel("All findings", _pooled(kept), list(names.values())))
    caption = (
        f"{note}<b>Reliability.</b> Test images in ten bins of as many each, by predicted "
        "probability; dot: mean prediction and share of images with the finding. On the dashed "
        "line, the finding is there as often as predicted; below it, less often."
    )
    legend = series_legend(names.values())
    return figure(f'{legend}<div class="panels">{"".join(panels)}</div>', caption)


def _are_probabilities(predicted: Predicted) -> bool:
    labels, predictions = predicted
    binary = bool(np.isin(labels, (0, 1)).all())
    return binary and bool(((predictions >= 0) & (predictions <= 1)).all())


def _pooled(kept: dict[str, dict[int, Predicted]]) -> dict[int, Predicted]:
    series = sorted({k for by_series in kept.values() for k in by_series})
    return {
        k: (
            np.concatenate([by_series[k][0] for by_series in kept.values() if k in by_series]),
            np.concatenate([by_series[k][1] for by_series in kept.values() if k in by_series]),
        )
        for k in series
    }


def _panel(title: str, by_series: dict[int, Predicted], names: list[str]) -> str:
    curves = []
    for k, (labels, predictions) in by_series.items():
        once = np.ones((1, len(labels)))
        predicted, found, _ = (part[0] for part in reliability_curve(labels, predictions, once))
        filled = np.isfinite(predicted)
        curves.append((k, names[k], predicted[filled], found[filled]))
    return reliability_chart(curves, title=shortened(title, 24))
