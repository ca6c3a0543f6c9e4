"""How sizes, dates and tables look."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from unbroken.errors import printable
from unbroken.store import Json

_WIDE = 10_000  # a pipe has no width: nothing is folded or cut there


class _Console(Console):
    """A console that shows names and values of files as text, which no terminal obeys.

    Its broken pipe is an error like any other, for `main` to end quietly.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a text, each one that is printed and each cell of a table."""
        return super().render_str(printable(text), **options)

    def on_broken_pipe(self) -> None:
        """Raise, where rich ends the process with status 1."""
        raise BrokenPipeError


def make_console() -> Console:
    """Return a console for stdout that folds at a terminal's width and never in a pipe."""
    width = None if sys.stdout.isatty() else _WIDE
    return _Console(width=width, highlight=False, markup=False, emoji=False)


def print_json(value: object) -> None:
    """Print one JSON document."""
    sys.stdout.write(printable(json.dumps(value, indent=2, ensure_ascii=False)) + "\n")


def make_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]
) -> Table:
    """Return a table without frames, which stays readable in a narrow terminal and in a pipe.

    Args:
        columns: The headings.
        rows: The cells, as text.
        numbers: The headings whose cells stand at the right.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        justify: str = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in rows:
        table.add_row(*map(_in_one_line, row))
    return table


def make_facts(facts: Mapping[str, str]) -> Table:
    """Return names and values, side by side."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(_in_one_line(name), value)
    return table


def _in_one_line(cell: str) -> str:
    return cell.replace("\n", "\\n")


def print_table(console: Console, table: Table) -> None:
    """Print a table without the blanks that would end its lines in a pipe."""
    with console.capture() as captured:
        console.print(table)
    lines = captured.get().splitlines()
    console.file.write("".join(f"{line.rstrip()}\n" for line in lines))


def size_text(nbytes: int) -> str:
    """Return a number of bytes for people, in powers of 1000.

    Example:
        >>> size_text(999), size_text(498_000_000), size_text(1_500_000_000)
        ('999 B', '498.0 MB', '1.5 GB')
    """
    value, units = float(nbytes), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.95 and len(units) > 1:  # what would be rounded to 1000.0
        value, units = value / 1000, units[1:]
    return f"{nbytes} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def date_text(created: str) -> str:
    """Return the date of a manifest in UTC, to the second.

    Example:
        >>> date_text("2026-01-31T12:00:00.123+00:00")
        '2026-01-31 12:00:00 UTC'
    """
    day, _, time = created.partition("T")
    return f"{day} {time[:8]} UTC" if time else created


def value_text(value: Json) -> str:
    """Return a JSON value on one line: text as it is, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
