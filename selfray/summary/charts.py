"""Charts as inline SVG, drawn by matplotlib: text stays text, colours follow the page's scheme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from selfray.summary.inputs import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = 8
"""Series that have a colour and a marker of their own; further ones begin again."""

# matplotlib writes these into the SVG, and the page's style sheet says what they look like.
_INK, _MUTED, _GRID = "#00aa01", "#00aa02", "#00aa03"
_COLOURS = [f"#00aa1{i}" for i in range(SERIES)]
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "rule"} | {
    colour: f"series-{i}" for i, colour in enumerate(_COLOURS)
}
_MARKERS = "osD^vPX*"

_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with a dollar sign is a name
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 11,
    "axes.titlecolor": _INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Bar:
    """One estimate with its interval.

    Attributes:
        label: Written above it.
        series: Which colour and marker.
        value: The estimate.
        low: Lower end of the interval, or None.
        high: Upper end, or None.
        text: The number in words, written at the right.
    """

    label: str
    series: int
    value: float
    low: float | None
    high: float | None
    text: str


def interval_chart(
    bars: Sequence[Bar], *, title: str, axis: str, zero: float, zero_label: str, wide: bool = False
) -> str:
    """Estimates as dots with their intervals, one below the other.

    Args:
        bars: Top to bottom.
        title: Above the chart.
        axis: Name of the axis, with its unit.
        zero: Where a line marks no knowledge or no difference.
        zero_label: What that line is, for readers that do not see it.
        wide: For a chart that has the row to itself.
    """
    width, row = (520 if wide else 340), 34
    values = [v for b in bars for v in (b.value, b.low, b.high) if v is not None]
    with _figure(width, 70 + row * len(bars)) as (figure, axes):
        margin = 70 / (70 + row * len(bars))
        figure.subplots_adjust(left=0.03, right=0.97, bottom=0.64 * margin, top=1 - 0.36 * margin)
        axes.set_title(title, pad=8)
        axes.axvline(zero, color=_MUTED, linewidth=0.8, dashes=(3, 2))
        for y, bar in enumerate(bars):
            _draw_bar(axes, y, bar)
        low, high = min(*values, zero), max(*values, zero)
        room = (high - low or 0.1) * 0.06
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(len(bars) - 0.45, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(axis="x", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(axis)
        told = "; ".join(f"{b.label}: {b.text}" for b in bars)
        return _svg(figure, f"{title}. {axis}. {told}. Dashed line: {zero_label}.", width)


def _draw_bar(axes: Axes, y: float, bar: Bar) -> None:
    colour = _COLOURS[bar.series % SERIES]
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    marker = _MARKERS[bar.series % SERIES]
    axes.plot([bar.value], [y], marker=marker, markersize=6, color=colour, markeredgewidth=0)
    inside = axes.get_yaxis_transform()
    axes.text(0, y - 0.3, bar.label, transform=inside, fontsize=10.5, va="bottom")
    axes.text(1, y - 0.3, bar.text, transform=inside, fontsize=10.5, ha="right", va="bottom")


def findings_chart(
    findings: Sequence[str], encoders: Sequence[str], bars: dict[tuple[str, str], Bar]
) -> str:
    """AUROC of each finding for each encoder.

    Args:
        findings: Top to bottom, as they are to be read.
        encoders: In the order of their colours.
        bars: By (finding, encoder), where defined.
    """
    row = 9 * len(encoders) + 22
    width, height = 520, 100 + row * len(findings)
    with _figure(width, height) as (figure, axes):
        figure.subplots_adjust(left=0.27, right=0.97, bottom=48 / height, top=1 - 52 / height)
        for y, finding in enumerate(findings):
            axes.axhline(y + 0.5, color=_GRID, linewidth=0.6)
            for k, encoder in enumerate(encoders):
                bar = bars.get((finding, encoder))
                if bar is None:
                    continue
                at = y + (k - (len(encoders) - 1) / 2) * 9 / row
                colour = _COLOURS[bar.series % SERIES]
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [at, at], color=colour, linewidth=1.6)
                marker = _MARKERS[bar.series % SERIES]
                axes.plot(bar.value, at, marker=marker, markersize=5, color=colour, mew=0)
        axes.axvline(0.5, color=_MUTED, linewidth=0.8, dashes=(3, 2))
        axes.set_ylim(len(findings) - 0.5, -0.5)
        axes.set_yticks(range(len(findings)), findings)
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("AUROC on the test split, 95 % interval")
        _legend(axes, list(dict.fromkeys((b.label, b.series) for b in bars.values())))
        told = "; ".join(f"{f}, {b.label}: {b.text}" for (f, _), b in bars.items())
        return _svg(figure, f"AUROC of each finding. {told}. Dashed line: chance.", width)


def _legend(axes: Axes, entries: Sequence[tuple[str, int]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=_COLOURS[s % SERIES], marker=_MARKERS[s % SERIES], label=label)
        for label, s in entries
    ]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)


def curve_chart(
    curves: Sequence[tuple[str, Curve]], *, title: str, axis: str, logarithmic: bool = False
) -> str:
    """Numbers of a run over its steps; the band spans the values that a point stands for.

    Args:
        curves: Label and course; one alone needs no label.
        title: Above the chart.
        axis: Name of the vertical axis, with its unit.
        logarithmic: Vertical axis; used when all values are positive.
    """
    with _figure(340, 230) as (figure, axes):
        figure.subplots_adjust(left=0.19, right=0.96, bottom=0.21, top=0.87)
        for k, (label, curve) in enumerate(curves):
            alone = "o" if len(curve) == 1 else ""
            colour = _COLOURS[k % SERIES]
            if curve.thinned:
                band = (curve.least, curve.greatest)
                axes.fill_between(curve.steps, *band, color=colour, alpha=0.22, linewidth=0)
            axes.plot(
                curve.steps, curve.means, color=colour, linewidth=1.4, marker=alone, label=label
            )
        if logarithmic and all(v > 0 for _, curve in curves for v in curve.least):
            axes.set_yscale("log")
        if len(curves) > 1:
            axes.legend(loc="best", handlelength=1.4, labelspacing=0.25)
        _finish_curves(axes, title, axis)
        told = "; ".join(
            f"{label or axis}: {_short(curve.means[0])} at step {curve.steps[0]:.0f}, "
            f"{_short(curve.means[-1])} at step {curve.steps[-1]:.0f}"
            for label, curve in curves
        )
        return _svg(figure, f"{title} over the steps. {told}.", 340)


def probe_chart(
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    title: str,
    axis: str,
    start: float | None = None,
    best: tuple[float, float] | None = None,
) -> str:
    """Probe results of a run over its steps.

    Args:
        lines: Label, steps and values.
        title: Above the chart.
        axis: Name of the vertical axis.
        start: The value before the first step, drawn as a level line.
        best: Step and value of the best probe, marked.
    """
    with _figure(340, 230) as (figure, axes):
        figure.subplots_adjust(left=0.19, right=0.96, bottom=0.21, top=0.87)
        if start is not None:
            axes.axhline(start, color=_MUTED, linewidth=0.9, dashes=(3, 2), label="start")
        for k, (label, steps, values) in enumerate(lines):
            axes.plot(
                steps, values, color=_COLOURS[k], marker=_MARKERS[k], markersize=3.5,
                linewidth=1.4, markeredgewidth=0, label=label,
            )  # fmt: skip
        told = [f"{label}: {_short(v[0])} to {_short(v[-1])}" for label, _, v in lines]
        if best is not None:
            axes.plot(
                *best, marker="o", markersize=10, markerfacecolor="none", linestyle="none",
                markeredgecolor=_INK, markeredgewidth=1.1, label=f"best, step {best[0]:.0f}",
            )  # fmt: skip
            told.append(f"best {_short(best[1])} at step {best[0]:.0f}")
        if start is not None:
            told.append(f"start {_short(start)}")
        axes.legend(loc="best", handlelength=1.4, labelspacing=0.25)
        _finish_curves(axes, title, axis)
        return _svg(figure, f"{title} over the steps. {'; '.join(told)}.", 340)


def _finish_curves(axes: Axes, title: str, axis: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, pad=8)
    axes.set_xlabel("step")
    axes.set_ylabel(axis)
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(5))


@contextmanager
def _figure(width: int, height: int) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that many CSS pixels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72))
        yield figure, figure.add_subplot()


def _svg(figure: Figure, told: str, width: int) -> str:
    """The figure as SVG for the middle of a page.

    Prolog, metadata and namespaces go: they name addresses, and HTML needs none of them. So do
    names that would occur in several charts of a page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": told}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    # Labels come from outside. None of these patterns can reach over the end of a piece of text.
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+\d*_\d+"', "", text)
    text = re.sub(r"(font: [^;\"<']*?)'[^;\"<]*", r"\1var(--sans)", text)
    text = re.sub(r"font-family: [^;\"<]*", "font-family: var(--sans)", text)
    text = re.sub(r"(?<=: )#00aa[01]\d", lambda m: f"var(--{_VARIABLES.get(m[0], 'ink')})", text)
    return (
        f'<svg {view[0]} role="img" aria-label="{escape(told)}" style="width:{width}px">'
        f"<title>{escape(told)}</title>{text}"
    )


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not defined"
