"""What a run shows: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from unbroken.checkpoint import Difference, ResumeReport
from unbroken.errors import printable
from unbroken.goodput import SaveInterval

_SHOWN = {
    "epoch": ".3g",
    "loss": ".4f",
    "eval_loss": ".4f",
    "learning_rate": ".3g",
    "grad_norm": ".3g",
    "tokens_per_second": ",.0f",
}


class Display:
    """Shows notes and statistics of a run.

    Args:
        console: Where to write; rich finds out whether it is a terminal.

    Example:
        >>> display = Display(Console(width=100))
        >>> display.start(total=100, step=0)
        >>> display.statistics(10, {"loss": 2.5, "learning_rate": 1e-4})
        step 10/100  loss 2.5000  learning_rate 0.0001
        >>> display.close()
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = Console() if console is None else console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._saves: SaveInterval | None = None
        self._reported: SaveInterval | None = None

    def start(self, *, total: int, step: int) -> None:
        """Begin to show the way from `step` to `total` steps."""
        self._total = total
        if not self._console.is_terminal:
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(f"step {step}/{total}", total=total, completed=step)
        self._bar.start()

    def report(self, report: ResumeReport) -> None:
        """Show how a start begins: on a terminal, its differences as a table."""
        if not self._console.is_terminal or not report.differences:
            for line in report.lines():
                self.note(line)
            return
        for line in report.heading():
            self.note(line)
        self._console.print(difference_table(report.differences))
        for line in report.notes:
            self.note(line)

    def note(self, text: str) -> None:
        """Show one line of text."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def skipping(self, done: int, total: int, seconds: float) -> None:
        """Show what it costs to come back to a place in data that can only be read again."""
        if self._console.is_terminal and done < total:
            left = seconds / done * (total - done) if done else 0.0
            text = f"skipping {done} of {total} items: {seconds:.0f} s, {left:.0f} s left"
            self._console.print(text, end="\r", markup=False, highlight=False)
        elif done >= total:
            self.note(f"skipped {total} items of data to come back to the place: {seconds:.1f} s")

    def saves(self, interval: SaveInterval, *, saved: bool) -> None:
        """Show how often the run is saved by itself: in the bar; and, changed, after a save."""
        self._saves = interval
        if (saved or self._reported is None) and interval.is_worth_reporting(self._reported):
            self._reported = interval
            self.note(str(interval))

    def advance(self, step: int) -> None:
        """Show that `step` steps are completed."""
        if self._bar is not None and self._task is not None:
            text = f"step {step}/{self._total}"
            if self._saves is not None and self._saves.steps is not None:
                text += f", saves every {self._saves.steps}"
            self._bar.update(self._task, completed=step, description=text)

    def statistics(self, step: int, record: Mapping[str, Any]) -> None:
        """Show statistics in one line."""
        parts = [f"{key} {record[key]:{form}}" for key, form in _SHOWN.items() if key in record]
        self.note("  ".join([f"step {step}/{self._total}", *parts]))

    def close(self) -> None:
        """Take the progress bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def difference_table(differences: Iterable[Difference]) -> Table:
    """Return differences as a table: setting, stored, now, verdict, effect."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("setting", "stored", "now", "verdict", "effect"):
        table.add_column(column, overflow="fold", no_wrap=column == "verdict")
    for one in differences:
        cells = (one.path, *one.values(), one.verdict, one.effect)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    return table


class NoDisplay(Display):
    """A display that shows nothing."""

    def start(self, *, total: int, step: int) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""
