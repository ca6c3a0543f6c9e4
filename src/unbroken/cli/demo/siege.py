"""The run that is killed again and again, and each time started by the same command."""

from __future__ import annotations

from collections.abc import Sequence

from unbroken.cli.demo.child import Child
from unbroken.cli.demo.kill import (
    Hit,
    Pace,
    Start,
    await_start,
    kill_in_start,
    kill_in_training,
)
from unbroken.cli.demo.recipe import Moment
from unbroken.cli.demo.stage import Stage


class Siege:
    """Starts a run, kills it at each moment, and tells what was hit and what the next start found.

    Args:
        stage: The stage.
        run: The name of the run.
        more: More words of its command.
        pace: How fast the machine is.
    """

    def __init__(self, stage: Stage, run: str, more: Sequence[str], pace: Pace) -> None:
        self._stage = stage
        self._run = run
        self._more = more
        self._pace = pace
        self._watch = stage.watch(run)
        self._left: tuple[str, ...] = ()  # half-written checkpoints that the last kill left

    def survive(self, moments: Sequence[Moment]) -> int:
        """Kill the run at each moment, then let it reach its end; return the number of kills."""
        for number, moment in enumerate(moments, start=1):
            with self._process() as child:
                hit = self._until_killed(moment, child)
            if hit is None:
                self._stage.say(f"   the run came to its end before kill {number}")
                return number - 1
            self._stage.say(
                f"   kill {number}   {hit.phase} ({hit.seconds:.1f} s after this start)"
            )
            self._left = hit.staged
        with self._process() as child:
            self._tell_start(self._await_start(child))
            child.wait()
        return len(moments)

    def _until_killed(self, moment: Moment, child: Child) -> Hit | None:
        if moment.kind == "starting":
            return kill_in_start(moment, child, self._watch, self._pace)
        start = self._await_start(child)
        self._tell_start(start)
        return None if start is None else kill_in_training(moment, child, self._watch, self._pace)

    def _process(self) -> Child:
        self._starts = len(self._watch.starts())
        return self._stage.start(self._run, self._more)

    def _await_start(self, child: Child) -> Start | None:
        with self._stage.waiting("starting"):
            return await_start(child, self._watch, self._starts)

    def _tell_start(self, start: Start | None) -> None:
        if start is not None:
            for line in start_lines(start, self._left):
                self._stage.say(f"   {line}")


def start_lines(start: Start, left: Sequence[str]) -> list[str]:
    """Return in words what a start has found and done.

    Args:
        start: The start.
        left: The half-written checkpoints that the kill before it left.
    """
    record = start.record
    folder = record["checkpoint"]
    found = (
        "no checkpoint yet: begins at step 0" if folder is None else f"goes on from {_name(folder)}"
    )
    swept = [name for name in left if name not in start.staged]
    return [
        f"start    {found}",
        *(f"         swept the half-written .staging/{name}" for name in swept),
        *(
            f"         not used: {item['checkpoint']}: {item['reason']}"
            for item in record["rejected"]
        ),
        *(
            f"         set aside: {item['from']} is now {item['to']}"
            for item in record["set_aside"]
        ),
    ]


def _name(folder: str) -> str:
    return folder.rstrip("/").rpartition("/")[2]
