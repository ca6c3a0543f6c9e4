"""Rows of bars, drawn by matplotlib: black on white, readable on a light and on a dark page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch

# The same result gives the same bytes: no date, no random ids, letters as letters.
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "unbroken",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
}
WIDTH, EDGE, ROW, GAP = 8.6, 0.15, 0.26, 0.28  # inches
TITLE, NOTE, LEGEND, CAPTION = 0.26, 0.2, 0.24, 0.3  # inches
SPACE = 0.08  # inches between a bar and the words beside it
BAR = 0.6  # of a row
OURS = ("#1a7f64", "#43a98c", "#7cc6ae", "#addccb", "#d0ebe1")
PEERS = ("#6e7f96", "#909fb2", "#b0bcca", "#ccd4de", "#e0e6ec")
INK, PALE = "#24292f", "#57606a"


@dataclass(frozen=True)
class Bar:
    """One row.

    Args:
        label: Its name.
        parts: Lengths one after the other, none negative.
        text: What stands at its end.
        behind: A length that is drawn in pale grey behind it; None: none.
        spread: Two values between which a thin line is drawn; None: none.
    """

    label: str
    parts: Sequence[float]
    text: str
    behind: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def is_ours(self) -> bool:
        return self.label.startswith("unbroken")

    @property
    def reach(self) -> float:
        return max(sum(self.parts), self.behind or 0.0, *(self.spread or (0.0,)))


@dataclass(frozen=True)
class Panel:
    """Bars on one axis.

    Args:
        title: What is shown, with its unit.
        bars: The rows.
        note: A line below the title.
        parts: Names of the parts of each bar; none where there is but one.
    """

    title: str
    bars: Sequence[Bar]
    note: str = ""
    parts: Sequence[str] = ()

    @property
    def head(self) -> float:
        """Inches above its rows."""
        return TITLE + NOTE * bool(self.note) + LEGEND * bool(self.parts)

    @property
    def height(self) -> float:
        """Inches of all of it."""
        return self.head + ROW * len(self.bars)


def figure_of(panels: Sequence[Panel], caption: str) -> Figure:
    """Return a picture of panels, one below the other."""
    height = sum(panel.height + GAP for panel in panels) + CAPTION
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), facecolor="white")
        FigureCanvasAgg(figure)
        top = height - EDGE
        for panel in panels:
            _Drawing(figure, panel, top).draw()
            top -= panel.height + GAP
        figure.text(EDGE / WIDTH, (top + 0.1) / height, caption, color=PALE, size=8, va="center")
    return figure


def svg_of(figure: Figure) -> str:
    """Return a picture as SVG."""
    file = io.StringIO()
    with mpl.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    lines = (line.rstrip() for line in file.getvalue().splitlines())
    return "".join(f"{line}\n" for line in lines)


class _Drawing:
    """One panel in a figure, whose upper edge is so many inches from the figure's lower one."""

    def __init__(self, figure: Figure, panel: Panel, top: float) -> None:
        self._figure = figure
        self._panel = panel
        self._top = top
        self._height = figure.get_figheight()

    def draw(self) -> None:
        panel = self._panel
        self._write(panel.title, TITLE / 2, size=11, weight="bold", color=INK)
        if panel.note:
            self._write(panel.note, TITLE + NOTE / 2, size=8.5, color=PALE)
        if panel.parts:
            self._draw_legend(TITLE + NOTE * bool(panel.note))
        axes = self._make_axes()
        for row, bar in enumerate(panel.bars):
            self._draw_bar(axes, row, bar)

    def _write(self, text: str, below: float, **how: object) -> None:
        y = (self._top - below) / self._height
        self._figure.text(EDGE / WIDTH, y, text, va="center", **how)

    def _draw_legend(self, below: float) -> None:
        handles = [
            Patch(color=color, label=name)
            for name, color in zip(self._panel.parts, PEERS, strict=False)
        ]
        place = (EDGE / WIDTH, (self._top - below) / self._height)
        self._figure.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=place,
            ncols=len(handles),
            frameon=False,
            fontsize=8.5,
            labelcolor=PALE,
            borderpad=0,
            borderaxespad=0,
            handlelength=1,
            handleheight=1,
        )

    def _make_axes(self) -> Axes:
        panel = self._panel
        left = EDGE + SPACE + max(self._widths(bar.label for bar in panel.bars))
        right = EDGE + SPACE + max(self._widths(bar.text for bar in panel.bars))
        bottom, height = self._top - panel.height, ROW * len(panel.bars)
        axes = self._figure.add_axes(
            (
                left / WIDTH,
                bottom / self._height,
                (WIDTH - left - right) / WIDTH,
                height / self._height,
            )
        )
        axes.set_xlim(0, max(bar.reach for bar in panel.bars) or 1.0)
        axes.set_ylim(len(panel.bars) - 0.5, -0.5)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.spines["left"].set_color(PALE)
        axes.patch.set_visible(False)
        return axes

    def _widths(self, texts: Iterator[str]) -> list[float]:
        """Return how many inches texts take when they are bold, and a little more."""
        renderer = self._figure.canvas.get_renderer()
        font = FontProperties(family="DejaVu Sans", size=STYLE["font.size"], weight="bold")
        widths = (renderer.get_text_width_height_descent(text, font, False)[0] for text in texts)
        return [1.05 * width / self._figure.dpi for width in widths]

    def _draw_bar(self, axes: Axes, row: int, bar: Bar) -> None:
        if bar.behind is not None:
            axes.barh(row, bar.behind, BAR, color="#d0d7de")
        begin = 0.0
        for part, color in zip(bar.parts, OURS if bar.is_ours else PEERS, strict=False):
            axes.barh(row, part, BAR, left=begin, color=color)
            begin += part
        if bar.spread is not None:
            low, high = bar.spread
            middle, reach = (low + high) / 2, (high - low) / 2
            axes.errorbar(middle, row, xerr=reach, color=INK, capsize=3, elinewidth=1.2)
        how = {"va": "center", "color": INK, "weight": "bold" if bar.is_ours else "normal"}
        space = SPACE * 72  # points
        beside = {"textcoords": "offset points", "annotation_clip": False}
        axes.annotate(bar.label, (0, row), (-space, 0), ha="right", **beside, **how)
        axes.annotate(bar.text, (bar.reach, row), (space, 0), ha="left", **beside, **how)
