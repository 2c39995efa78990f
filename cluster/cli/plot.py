"""Charts of the commands, written to PNG or SVG files.

The one place that knows matplotlib. A command says what it has measured as a :class:`Chart`; how that looks is decided
here, alike for all of them.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from workers.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colours that stay apart in print and for colour-blind readers (Okabe and Ito).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """One curve or one group of bars; ``y`` may have gaps (None).

    Attributes:
        colour: Number of its colour, where several curves belong together; None takes the next.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    dashed: bool = False
    colour: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line at ``x``."""

    x: float
    label: str
    dashed: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Chart:
    """What to draw.

    Attributes:
        kind: ``lines``, ``bars`` (side by side) or ``stacked`` bars; the x of bars are category numbers.
        categories: Names of the x values of bars.
        note: Below the axes: where the numbers come from.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    kind: Literal["lines", "bars", "stacked"] = "lines"
    categories: Sequence[str] = ()
    log_x: bool = False
    log_y: bool = False
    marks: Sequence[Mark] = ()
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; :meth:`from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """A chart that another command has written.

        Raises:
            TypeError: Fields are missing or unknown.
        """
        series = [Series(**item) for item in fields.pop("series")]
        marks = [Mark(**item) for item in fields.pop("marks", [])]
        return cls(series=series, marks=marks, **fields)


def write_chart(chart: Chart, path: Path) -> None:
    """Draw ``chart`` to a .png or .svg file.

    Raises:
        ConfigError: Another suffix, matplotlib is not installed, or the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot writes .png or .svg files, not {path.name!r}.", param="plot")
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'warmgraph[plots]'.", param="plot") from None
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if chart.kind == "lines":
        _draw_lines(axes, chart)
    else:
        _draw_bars(axes, chart)
    _decorate(axes, chart)
    if chart.note:
        figure.supxlabel(textwrap.fill(chart.note, 110), fontsize=8, color="#555555", x=0.01, ha="left")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Text as text makes a small file; without a date and random ids the same numbers give the same one.
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": "warmgraph"}):
            figure.savefig(path, dpi=144, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"Cannot write {path}: {error.strerror}.", param="plot") from None


def _draw_lines(axes: Axes, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        index = number if series.colour is None else series.colour
        points = [(x, y) for x, y in zip(series.x, series.y, strict=True) if y is not None]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            label=series.label,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4.5,
            linewidth=1.8,
            linestyle="--" if series.dashed else "-",
        )
    for mark in chart.marks:
        axes.axvline(mark.x, color="#444444", linewidth=1.1, linestyle="--" if mark.dashed else "-")
        axes.annotate(
            mark.label,
            (mark.x, 0.02),
            xycoords=("data", "axes fraction"),
            xytext=(4, 0),
            textcoords="offset points",
            rotation=90,
            fontsize=8,
            color="#444444",
        )
    if chart.log_x:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for series in chart.series for x in series.x})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()


def _draw_bars(axes: Axes, chart: Chart) -> None:
    num = len(chart.series)
    width = 0.8 if chart.kind == "stacked" else 0.8 / num
    bottoms: dict[float, float] = {}
    for index, series in enumerate(chart.series):
        for number, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            if y is None:
                continue
            bottom = bottoms.get(x, 0.0) if chart.kind == "stacked" else 0.0
            at = x if chart.kind == "stacked" else x + (index - (num - 1) / 2) * width
            colour = _COLOURS[index % len(_COLOURS)]
            bar = axes.bar(at, y, width * 0.92, bottom=bottom, color=colour, label=series.label if not number else None)
            if chart.kind == "bars":
                axes.bar_label(bar, fmt=f"{y:.3g}", fontsize=7, padding=1)
            bottoms[x] = bottom + y
    axes.set_xticks(range(len(chart.categories)), list(chart.categories))


def _decorate(axes: Axes, chart: Chart) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold")
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", which="minor", labelsize=8)
    else:
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(chart.series) > 1 and chart.kind == "lines":
        axes.legend(frameon=False, fontsize=9)
    elif len(chart.series) > 1:
        # Bars leave no free place inside; the title makes room for a row above them.
        axes.set_title(chart.title, loc="left", fontsize=12, fontweight="bold", pad=22)
        axes.legend(
            frameon=False,
            fontsize=9,
            loc="lower left",
            bbox_to_anchor=(-0.01, 0.99),
            ncols=len(chart.series),
            borderaxespad=0,
            columnspacing=1.2,
            handlelength=1.2,
        )
