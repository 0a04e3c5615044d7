"""Numbers with intervals against a share: one line an encoder, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfray.summary.charts import (
    COLOURS,
    GRID,
    MARKERS,
    MUTED,
    SERIES,
    WIDTH,
    chart_figure,
    chart_svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_APART = 0.14
"""Decades between labels of the axis that do not touch, at three digits of ten pixels."""


@dataclass(frozen=True)
class Course:
    """One number over ascending shares.

    Attributes:
        label: Whose, for readers that do not see the chart.
        series: Which colour and marker.
        shares: Percent, above 0, ascending.
        values: The number at each.
        low: Lower ends of the intervals, None where there is none.
        high: Upper ends.
        told: Number and interval at each, as text.
    """

    label: str
    series: int
    shares: Sequence[float]
    values: Sequence[float]
    low: Sequence[float | None]
    high: Sequence[float | None]
    told: Sequence[str]


def share_chart(courses: Sequence[Course], *, title: str, axis: str, zero: float) -> str:
    """Courses as lines, their intervals as bands.

    Args:
        courses: One or more, each with a value.
        title: Above the chart.
        axis: Name of the vertical axis.
        zero: Value of what knows nothing: a dashed line, where the axis reaches that far.
    """
    with chart_figure(WIDTH, 250) as (figure, axes):
        figure.subplots_adjust(left=0.17, right=0.96, bottom=0.19, top=0.88)
        axes.set_xscale("log")
        for course in courses:
            _draw(axes, course)
        drawn = [v for c in courses for part in (c.values, c.low, c.high) for v in part]
        ends = [v for v in drawn if v is not None]
        low, high = min(ends), max(ends)
        room = (high - low or 0.1) * 0.06
        axes.axhline(zero, color=MUTED, linewidth=0.8, dashes=(3, 2))
        axes.set_ylim(low - room, high + room)
        axes.set_title(title, pad=8)
        axes.set_ylabel(axis)
        axes.set_xlabel("training patients, %, logarithmic")
        axes.grid(axis="y", color=GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        _label_shares(axes, sorted({share for course in courses for share in course.shares}))
        told = "; ".join(
            f"{course.label}: "
            + ", ".join(f"{t} at {s:g} %" for s, t in zip(course.shares, course.told, strict=True))
            for course in courses
        )
        return chart_svg(
            figure, f"{title}, {axis}, by share of the training patients. {told}.", WIDTH
        )


def _draw(axes: Axes, course: Course) -> None:
    colour = COLOURS[course.series % SERIES]
    low = [math.nan if v is None else v for v in course.low]
    high = [math.nan if v is None else v for v in course.high]
    band = axes.fill_between(course.shares, low, high, color=colour, alpha=0.14, linewidth=0)
    band.set_gid("band_1")  # names of this kind are taken out: on a page, they would come twice
    axes.plot(
        course.shares, course.values, color=colour, linewidth=1.6, markersize=5.5,
        marker=MARKERS[course.series % SERIES], markeredgewidth=0,
    )  # fmt: skip


def _label_shares(axes: Axes, shares: Sequence[float]) -> None:
    """Ticks at the shares that were measured, labels where there is room."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

    labelled: list[float] = []
    for share in reversed(shares):  # the whole of the train split has its label in any case
        if not labelled or math.log10(labelled[-1] / share) >= _APART:
            labelled.append(share)
    axes.set_xticks(shares, [f"{share:g}" if share in labelled else "" for share in shares])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.6g}".replace("-", "−")))
