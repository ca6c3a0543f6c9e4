"""Bars as SVG: plain text, nothing to install, readable on a light and on a dark page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, EDGE, LETTER = 820, 16, 8.5  # a letter of a bold label is hardly ever wider
ROW, BAR, GAP = 24, 14, 30
STYLE = """
text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
.title { font-weight: 600; font-size: 15px }
.note { fill: #656d76; font-size: 12px }
.ours { font-weight: 600 }
.axis { stroke: #8c959f; stroke-width: 1 }
.range { stroke: #24292f; stroke-width: 1.5; fill: none }
.behind { fill: #8c959f; fill-opacity: 0.3 }
.ours0 { fill: #1a7f64 } .ours1 { fill: #4fb497 } .ours2 { fill: #93d3bf } .ours3 { fill: #bfe6da }
.ours4 { fill: #dff2ec }
.peer0 { fill: #6e7f96 } .peer1 { fill: #9aa8ba } .peer2 { fill: #c0c9d5 } .peer3 { fill: #d7dde5 }
.peer4 { fill: #e8ecf1 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 }
  .note { fill: #9198a1 }
  .axis { stroke: #656d76 }
  .range { stroke: #f0f6fc }
  .ours3, .ours4, .peer3, .peer4 { fill-opacity: 0.75 }
}
"""


@dataclass(frozen=True)
class Bar:
    """One row.

    Args:
        label: Its name.
        parts: Lengths one after the other, none negative.
        text: What stands at its end.
        behind: A length that is drawn faintly behind it; None: none.
        spread: Two places on the axis between which a thin line is drawn; None: none.
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


def draw(panels: Sequence[Panel], caption: str) -> str:
    """Return a picture of panels, one below the other."""
    body: list[str] = []
    y = 12
    for panel in panels:
        body += [f'<g transform="translate(0 {y})">', *_panel(panel), "</g>"]
        y += _height(panel) + GAP
    body.append(_text(EDGE, y, caption, "note"))
    height = y + 16
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img">'
    )
    title = f"<title>{escape(panels[0].title)}</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *body, "</svg>"]) + "\n"


def _top(panel: Panel) -> int:
    return 20 + 18 * bool(panel.note) + 20 * bool(panel.parts) + 8


def _height(panel: Panel) -> int:
    return _top(panel) + ROW * len(panel.bars)


def _panel(panel: Panel) -> Iterator[str]:
    yield _text(EDGE, 16, panel.title, "title")
    if panel.note:
        yield _text(EDGE, 34, panel.note, "note")
    if panel.parts:
        yield from _legend(panel)
    left = EDGE + 10 + LETTER * max(len(bar.label) for bar in panel.bars)
    right = EDGE + 8 + LETTER * max(len(bar.text) for bar in panel.bars)
    scale = (WIDTH - left - right) / (max(bar.reach for bar in panel.bars) or 1.0)
    top = _top(panel)
    for number, bar in enumerate(panel.bars):
        yield from _row(bar, left, top + ROW * number, scale)
    yield f'<path class="axis" d="M{left:.1f} {top}V{_height(panel)}"/>'


def _legend(panel: Panel) -> Iterator[str]:
    x, y = EDGE, 34 + 18 * bool(panel.note)
    for number, name in enumerate(panel.parts):
        yield _box(x, y - 10, 11, 11, f"peer{number}")
        yield _text(x + 16, y, name, "note")
        x += 34 + 7 * len(name)


def _row(bar: Bar, left: float, y: float, scale: float) -> Iterator[str]:
    middle, whose = y + ROW / 2, "ours" if bar.is_ours else "peer"
    kind = "ours" if bar.is_ours else ""
    yield _text(left - 10, middle + 4.5, bar.label, kind, anchor="end")
    if bar.behind is not None:
        yield _box(left, middle - BAR / 2, bar.behind * scale, BAR, "behind")
    x = left
    for number, part in enumerate(bar.parts):
        yield _box(x, middle - BAR / 2, part * scale, BAR, f"{whose}{number}")
        x += part * scale
    if bar.spread is not None:
        low, high = (left + place * scale for place in bar.spread)
        ends = "".join(f"M{one:.1f} {middle - 4:.1f}v8" for one in (low, high))
        yield f'<path class="range" d="M{low:.1f} {middle:.1f}H{high:.1f}{ends}"/>'
    yield _text(left + bar.reach * scale + 8, middle + 4.5, bar.text, kind)


def _box(x: float, y: float, width: float, height: float, kind: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    )


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
