"""Charts as inline SVG, drawn by matplotlib: text stays text, colours follow the page's scheme."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from selfray.summary.inputs import Curve
from selfray.summary.markup import escaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANEL = 176  # CSS pixels: small multiples
WIDTH = 340  # CSS pixels: a phone shows a chart in full size, a screen three side by side
SERIES = 8
"""Series that have a colour and a marker of their own; further ones begin again."""

# matplotlib writes these into the SVG, and the page's style sheet says what they look like.
_INK, MUTED, GRID = "#00aa01", "#00aa02", "#00aa03"
COLOURS = [f"#00aa1{i}" for i in range(SERIES)]
_VARIABLES = {_INK: "ink", MUTED: "muted", GRID: "rule"} | {
    colour: f"series-{i}" for i, colour in enumerate(COLOURS)
}
MARKERS = "osD^vPX*"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "path.simplify": False,
    "text.parse_math": False,  # a name with a dollar sign is a name
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 11,
    "axes.titlecolor": _INK,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.unicode_minus": True,
    "text.color": _INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
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
        text: The number, written at the right.
        told: Number and interval, for readers that do not see the chart.
    """

    label: str
    series: int
    value: float
    low: float | None
    high: float | None
    text: str
    told: str


def interval_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    axis: str,
    zero: float | None,
    zero_label: str,
    limits: tuple[float, float] | None = None,
    whole_numbers: bool = False,
) -> str:
    """Estimates as dots with their intervals, one below the other.

    Args:
        bars: Top to bottom.
        title: Above the chart.
        axis: Name of the axis, with its unit.
        zero: Where a line marks no knowledge or no difference; None: no such line.
        zero_label: What that line is, for readers that do not see it.
        limits: Ends of the axis, where several charts are to have the same.
        whole_numbers: The axis has no others.
    """
    height = 74 + 34 * len(bars)
    low, high = limits or span(bars, *([] if zero is None else [zero]))
    with chart_figure(WIDTH, height) as (figure, axes):
        figure.subplots_adjust(left=0.02, right=0.98, bottom=46 / height, top=1 - 28 / height)
        axes.set_title(title, pad=8, x=0)
        if zero is not None:
            axes.axvline(zero, color=MUTED, linewidth=0.8, dashes=(3, 2))
        for y, bar in enumerate(bars):
            _draw_bar(axes, y, bar)
        room = (high - low or 0.1) * 0.06
        axes.set_xlim(low - room, high + room)
        axes.set_ylim(len(bars) - 0.5, -0.75)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.locator_params(axis="x", nbins=10 if whole_numbers else 5, integer=whole_numbers)
        axes.tick_params(length=0)
        axes.grid(axis="x", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(axis)
        told = "; ".join(f"{b.label}: {b.told}" for b in bars)
        dashed = "" if zero is None else f" Dashed line: {zero_label}."
        return chart_svg(figure, f"{title}. {axis}. {told}.{dashed}", WIDTH)


def span(bars: Sequence[Bar], *others: float) -> tuple[float, float]:
    """Least and greatest of all that is drawn, and of further values."""
    values = [v for b in bars for v in (b.value, b.low, b.high) if v is not None]
    values += others
    return min(values), max(values)


def _draw_bar(axes: Axes, y: float, bar: Bar) -> None:
    colour, marker = COLOURS[bar.series % SERIES], MARKERS[bar.series % SERIES]
    if bar.low is not None and bar.high is not None:
        axes.plot([bar.low, bar.high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
    axes.plot(
        [bar.value], [y], marker=marker, markersize=6.5, color=colour, markeredgewidth=0,
        linestyle="none",
    )  # fmt: skip
    for x, text, side in ((0, bar.label, "left"), (1, bar.text, "right")):
        axes.text(
            x, y - 0.3, text, transform=axes.get_yaxis_transform(), fontsize=10.5,
            ha=side, va="bottom",
        )  # fmt: skip


def scatter_chart(
    truth: np.ndarray,
    predicted: np.ndarray,
    *,
    series: int,
    title: str,
    axis: str,
    limits: tuple[float, float],
    told: str,
) -> str:
    """Predictions against the truth, with the line where both are equal.

    Args:
        truth: [n]; what lies beyond the limits is drawn on the edge.
        predicted: [n], same unit.
        series: Which colour.
        title: Above the chart.
        axis: What is predicted, with its unit.
        limits: Ends of both axes.
        told: The correlation in words, for readers that do not see the chart.
    """
    with chart_figure(_PANEL, _PANEL) as (figure, axes):
        _square(figure, axes, title, limits)
        axes.set_xlabel(f"true {axis}")
        axes.set_ylabel(f"predicted {axis}")
        x, y = np.clip(truth, *limits), np.clip(predicted, *limits)
        _dots(axes, x, y, COLOURS[series % SERIES], size=2.6, opacity=0.45)
        return chart_svg(figure, f"{title}: predicted {axis} against true. {told}", _PANEL)


def reliability_chart(
    curves: Sequence[tuple[int, str, np.ndarray, np.ndarray]], *, title: str
) -> str:
    """What was found against what was predicted, with the line of perfect calibration.

    Args:
        curves: Series, label, mean prediction and share of positives of each bin, [bins] each, 0
            to 1, ascending in the first.
        title: Above the chart.
    """
    ends = [float(values.max()) for _, _, *both in curves for values in both]
    with chart_figure(_PANEL, _PANEL) as (figure, axes):
        _square(figure, axes, title, (0.0, min(1.0, 1.08 * max(ends, default=1.0) or 1.0)))
        axes.set_xlabel("predicted")
        axes.set_ylabel("found")
        for series, _, predicted, found in curves:
            colour = COLOURS[series % SERIES]
            axes.plot(predicted, found, color=colour, linewidth=1.1)
            _dots(axes, predicted, found, colour, size=4.5)
        told = "; ".join(
            f"{label}: at most {np.abs(found - predicted).max():.2f} off"
            for _, label, predicted, found in curves
        )
        return chart_svg(figure, f"{title}: share of positives at a predicted probability. {told}.",
                    _PANEL)  # fmt: skip


def _square(figure: Figure, axes: Axes, title: str, limits: tuple[float, float]) -> None:
    """A small chart with two like axes and their diagonal."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure.subplots_adjust(left=0.22, right=0.97, bottom=0.22, top=0.88)
    axes.set_title(title, pad=5, fontsize=10.5)
    axes.xaxis.label.set_fontsize(10)
    axes.yaxis.label.set_fontsize(10)
    axes.plot(limits, limits, color=MUTED, linewidth=0.8, dashes=(3, 2))
    axes.set_xlim(*limits)
    axes.set_ylim(*limits)
    axes.grid(color=GRID, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9)
    for one in (axes.xaxis, axes.yaxis):
        one.set_major_locator(MaxNLocator(4))
        one.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}".replace("-", "−")))


def _dots(
    axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, *, size: float, opacity: float = 1.0
) -> None:
    """Round dots in one path, on half pixels: a tenth of the bytes of matplotlib's markers.

    The limits of the axes and their place in the figure must be final.
    """
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path
    from matplotlib.transforms import IdentityTransform

    places = np.round(2 * axes.transData.transform(np.column_stack([x, y]))) / 2
    places = np.unique(places, axis=0)
    codes = np.tile([Path.MOVETO, Path.LINETO], len(places))
    path = Path(np.repeat(places, 2, axis=0), codes)
    axes.add_artist(
        PathPatch(
            path, transform=IdentityTransform(), fill=False, edgecolor=colour, linewidth=size,
            capstyle="round", alpha=opacity, clip_on=False, zorder=3,
        )
    )  # fmt: skip


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
    with chart_figure(WIDTH, 230) as (figure, axes):
        figure.subplots_adjust(left=0.19, right=0.96, bottom=0.21, top=0.87)
        for k, (label, curve) in enumerate(curves):
            alone = "o" if len(curve) == 1 else ""
            colour = COLOURS[k % SERIES]
            if curve.thinned:
                band = (curve.least, curve.greatest)
                axes.fill_between(curve.steps, *band, color=colour, alpha=0.22, linewidth=0)
            axes.plot(
                curve.steps, curve.means, color=colour, linewidth=1.4, marker=alone, label=label
            )
        if logarithmic and all(v > 0 for _, curve in curves for v in curve.least):
            axes.set_yscale("log")
        _finish_curves(axes, title, axis, legend=len(curves) > 1)
        told = "; ".join(
            f"{label or axis}: {_short(curve.means[0])} at step {curve.steps[0]:.0f}, "
            f"{_short(curve.means[-1])} at step {curve.steps[-1]:.0f}"
            for label, curve in curves
        )
        return chart_svg(figure, f"{title} over the steps. {told}.", WIDTH)


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
    with chart_figure(WIDTH, 230) as (figure, axes):
        figure.subplots_adjust(left=0.19, right=0.96, bottom=0.21, top=0.87)
        if start is not None:
            axes.axhline(start, color=MUTED, linewidth=0.9, dashes=(3, 2), label="start")
        for k, (label, steps, values) in enumerate(lines):
            axes.plot(
                steps, values, color=COLOURS[k], marker=MARKERS[k], markersize=3.5,
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
        _finish_curves(axes, title, axis, legend=True)
        return chart_svg(figure, f"{title} over the steps. {'; '.join(told)}.", WIDTH)


def _finish_curves(axes: Axes, title: str, axis: str, *, legend: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_title(title, pad=8)
    axes.set_xlabel("step")
    axes.set_ylabel(axis)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    # Not matplotlib's own, which writes powers of ten as formulas.
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}".replace("-", "−")))
    if legend:
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + (high - low) * 0.13 * len(axes.get_legend_handles_labels()[0]))
        axes.legend(loc="upper right", handlelength=1.4, labelspacing=0.25, borderaxespad=0)


@contextmanager
def chart_figure(width: int, height: int) -> Iterator[tuple[Figure, Axes]]:
    """A figure of that many CSS pixels."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        # Of 72 dots an inch, as SVG is written: places of `_dots` do not move.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_subplot()
        for ground in (figure.patch, axes.patch):
            ground.set_visible(False)
        yield figure, axes


def chart_svg(figure: Figure, told: str, width: int) -> str:
    """The figure as SVG for the middle of a page.

    Prolog, metadata and namespaces go: they name addresses, and HTML needs none of them. So do
    names that would occur in several charts of a page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": told}), warnings.catch_warnings():
        # The reader's browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    # Labels come from outside. None of these patterns can reach over the end of a piece of text.
    text = text[text.index(">", text.index("<svg")) + 1 :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)  # for `*`: all of the page
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' id="(matplotlib\.axis|[a-z]+\d*d?)_\d+"', "", text)
    text = re.sub(r"(font: [^;\"<']*?)'[^;\"<]*", r"\1var(--sans)", text)
    text = re.sub(r"font-family: [^;\"<]*", "font-family: var(--sans)", text)
    text = re.sub(r"(?<=: )#00aa[01]\d", lambda m: f"var(--{_VARIABLES.get(m[0], 'ink')})", text)
    text = re.sub(r"<(?:path|use|text|g)\b[^<>]*>", lambda m: _compact(m[0]), text)
    text = re.sub(r">\s+<", "><", text.strip()).replace("<defs></defs>", "").replace("<g/>", "")
    while (fewer := re.sub(r"<g>((?:(?!</?g\b).)*)</g>", r"\1", text, flags=re.DOTALL)) != text:
        text = fewer
    return f'<svg {view[0]} role="img" aria-label="{escaped(told)}" style="width:{width}px">{text}'


def share_styles(html: str) -> tuple[str, str]:
    """Styles that charts repeat, as a style sheet.

    Args:
        html: With charts in it.

    Returns:
        The sheet, and the HTML with classes in place of these styles: some 40 % less.
    """
    # No text can look like a tag: its `<` is escaped.
    styled = re.compile(r'(<(?:path|text|use)\b[^<>]*?) style="([^"<>]*)"')
    counts = Counter(m[2] for m in styled.finditer(html))
    names = {style: f"s{k}" for k, (style, n) in enumerate(counts.most_common()) if n > 2}
    sheet = "".join(f".{name}{{{style}}}" for style, name in names.items())
    return sheet, styled.sub(
        lambda m: f'{m[1]} class="{names[m[2]]}"' if m[2] in names else m[0], html
    )


def _compact(tag: str) -> str:
    """A tag without what changes nothing: digits, spaces, the page's own font, square ends."""
    tag = re.sub(r' (d|x|y|transform)="[^"]*"', lambda m: re.sub(r"-?\d+\.\d+", _tenths, m[0]), tag)
    tag = re.sub(r"(font-family: var\(--sans\)|stroke-linecap: square)(; )?", "", tag)
    tag = re.sub(r' transform="rotate\(-0 [^")]*\)"', "", tag)
    tag = re.sub(r"(?<=[\w)%])([:;]) (?=[\w-])", r"\1", tag).replace('; "', '"')
    path = re.search(r'(?<= d=")[^"]*', tag)
    if path is None:
        return tag
    # A line of no length, which is a dot, is `h0`.
    lines = re.sub(r"M (\S+ \S+)\s+L \1(?!\S)", r"M\1h0", path[0])
    lines = re.sub(r"\s*([A-Za-z])\s*", r"\1", lines).strip()
    return f"{tag[: path.start()]}{lines}{tag[path.end() :]}"


def _tenths(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not defined"
