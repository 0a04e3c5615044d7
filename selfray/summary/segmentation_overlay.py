"""Outlines of true and predicted label maps over a radiograph."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

# Two of the colours that Okabe & Ito chose so that colour-blind people can tell them apart, both
# bright on dark lungs: https://jfly.uni-koeln.de/color/ (2008). Dashes tell them apart in print.
TRUTH_COLOUR, PREDICTION_COLOUR = "#56B4E9", "#E69F00"

_PANEL_INCHES = 2.6
_PANELS_A_ROW = 4


def segmentation_overlay(
    pixels: np.ndarray, truth: np.ndarray, prediction: np.ndarray, labels: Sequence[str]
) -> bytes:
    """Draw one panel a label: the radiograph, the outline of the truth and of the prediction.

    Args:
        pixels: uint8 [H, W], 0 is black.
        truth: Bool [K, H, W].
        prediction: Bool [K, H, W].
        labels: K names.

    Returns:
        A PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(len(labels), _PANELS_A_ROW)
    rows = -(-len(labels) // columns)
    height = _PANEL_INCHES * pixels.shape[0] / pixels.shape[1] + 0.25
    figure = Figure((_PANEL_INCHES * columns, height * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, label, *masks in zip(axes, labels, truth, prediction, strict=False):
        axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        axis.set_title(label.replace("_", " "), fontsize=9)
        for mask, colour, style in zip(
            masks, (TRUTH_COLOUR, PREDICTION_COLOUR), ("solid", "dashed"), strict=True
        ):
            # A border of background closes the outline of a mask that ends with the image.
            y, x = (np.arange(-1, side + 1) for side in mask.shape)
            if mask.any():
                outline = np.pad(mask, 1).astype(float)
                axis.contour(x, y, outline, [0.5], colors=colour, linestyles=style, linewidths=1.4)
    lines = [
        Line2D([], [], color=TRUTH_COLOUR, linestyle="solid", label="truth"),
        Line2D([], [], color=PREDICTION_COLOUR, linestyle="dashed", label="prediction"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()
