"""The demo as a story: what is done, what was hit, what was found."""

from __future__ import annotations

import secrets
import shlex
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from unbroken.cli.demo.comparison import ComparedPart, compare
from unbroken.cli.demo.kills import (
    ENVIRONMENT,
    Child,
    Hit,
    Moment,
    RunObserver,
    RunPace,
    RunStart,
    await_start,
    config_text,
    kill_in_start,
    kill_in_training,
    plan_kills,
    save_steps_for,
)
from unbroken.cli.tables import make_console, size_text
from unbroken.errors import ConfigError

# Where the demo happens: one folder for its runs, one console for its story.


CONFIG_NAME = "demo.yaml"


class Stage:
    """The folder with the configuration and the runs, and the console.

    Args:
        folder: The folder.
        console: Where the story is told.
        config: The text of the YAML file that all runs use.
    """

    def __init__(self, folder: Path, console: Console, config: str) -> None:
        self.folder = folder
        self._console = console
        (folder / CONFIG_NAME).write_text(config, encoding="utf-8")

    def say(self, *lines: str) -> None:
        """Tell the next lines of the story, at once."""
        for line in lines:
            self._console.print(line, soft_wrap=True)
        self._console.file.flush()

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Show on a terminal that something goes on."""
        return self._console.status(what)

    def command(self, run: str, more: Sequence[str] = ()) -> str:
        """Return the command that trains a run, as a shell takes it."""
        settings = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        program = ["python", "-m", "unbroken", "train"]
        return shlex.join([*settings, *program, *self._arguments(run, more)])

    def start(self, run: str, more: Sequence[str] = ()) -> Child:
        """Start the process that trains a run."""
        log = self.folder / f"{run}.log"
        return Child(self._arguments(run, more), self.folder, log)

    def watch(self, run: str) -> RunObserver:
        """Look at a run directory from outside."""
        return RunObserver(self.folder / run)

    def _arguments(self, run: str, more: Sequence[str]) -> list[str]:
        return [CONFIG_NAME, "--output-dir", run, *more]


@contextmanager
def demo_folder(keep: str | None) -> Iterator[Path]:
    """Give a folder: the one to keep, or a temporary one.

    Raises:
        ConfigError: The one to keep is not empty, or is no folder.
    """
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="unbroken-demo-") as folder:
            yield Path(folder)
        return
    path = Path(keep).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError("--keep", expected="a new or empty folder", found=keep)
    path.mkdir(parents=True, exist_ok=True)
    yield path


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end the demo as Ctrl-C does: its processes are ended first."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


# The run that is killed again and again, and each time started by the same command.


class Siege:
    """Starts a run, kills it at each moment, and tells what was hit and what the next start found.

    Args:
        stage: The stage.
        run: The name of the run.
        more: More words of its command.
        pace: How fast the machine is.
    """

    def __init__(self, stage: Stage, run: str, more: Sequence[str], pace: RunPace) -> None:
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

    def _await_start(self, child: Child) -> RunStart | None:
        with self._stage.waiting("starting"):
            return await_start(child, self._watch, self._starts)

    def _tell_start(self, start: RunStart | None) -> None:
        if start is not None:
            for line in start_lines(start, self._left):
                self._stage.say(f"   {line}")


def start_lines(start: RunStart, left: Sequence[str]) -> list[str]:
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


_PEACE, _KILLED, _CONTROL = "uninterrupted", "killed", "control"
_OTHER_ORDER = ("--data-seed", "1")


def tell(
    *,
    keep: str | None,
    steps: int,
    kills: int,
    seed: int | None,
    killed_arguments: Sequence[str] = (),
) -> int:
    """Run the demo and tell it; return 0 only if the killed run is the same run.

    Args:
        keep: The folder for the runs, new or empty; None: a temporary one.
        steps: Optimizer steps of each run.
        kills: How often the second run is killed.
        seed: Where the moments of the kills come from; None: a new one, which is shown.
        killed_arguments: More words for the command of the killed run. With words that change
            the run, the demo must fail.

    Raises:
        ChildFailedError: A training process failed by itself.
        ConfigError: The folder is not empty.
    """
    seed = secrets.randbelow(1_000_000) if seed is None else seed
    moments = plan_kills(kills=kills, steps=steps, seed=seed)
    with demo_folder(keep) as folder, ended_by_sigterm():
        stage = Stage(folder, make_console(), config_text(steps=steps))
        is_same = _Demo(stage, steps).run(moments, seed, killed_arguments)
        if keep is not None:
            stage.say(f"The runs are kept: unbroken ls {keep}")
    return 0 if is_same else 1


class _Demo:
    """The four parts of the demo."""

    def __init__(self, stage: Stage, steps: int) -> None:
        self._stage = stage
        self._steps = steps
        self._began = time.monotonic()

    def run(self, moments: Sequence[Moment], seed: int, killed_arguments: Sequence[str]) -> bool:
        """Do all parts; return whether the comparisons came out as they must."""
        self._stage.say(
            f"A small GPT-2 with dropout learns from Hamlet for {self._steps} steps, twice: once",
            "without a kill, once killed again and again. Then all bits of both are compared.",
        )
        pace = self._train_in_peace()
        is_killed = self._train_under_fire(moments, seed, pace, killed_arguments)
        is_same = self._compare()
        can_fail = self._compare_with_control()
        self._conclude(is_killed=is_killed, is_same=is_same, can_fail=can_fail)
        return is_killed and is_same and can_fail

    def _train_in_peace(self) -> RunPace:
        self._stage.say("", "1. Without a kill", f"   {self._stage.command(_PEACE)}")
        watch = self._stage.watch(_PEACE)
        with self._stage.start(_PEACE) as child, self._stage.waiting("training"):
            child.wait_until(lambda: bool(watch.starts()))
            start = child.seconds
            child.wait()
            seconds = child.seconds
        losses = [record["loss"] for record in watch.metrics() if "loss" in record]
        self._stage.say(
            f"   {seconds:.0f} s, {start:.0f} of them to load Python's libraries; "
            f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {watch.step()}"
        )
        return RunPace(start=start, step=(seconds - start) / self._steps)

    def _train_under_fire(
        self, moments: Sequence[Moment], seed: int, pace: RunPace, more: Sequence[str]
    ) -> bool:
        """Return whether every kill has hit."""
        self._stage.say(
            "",
            "2. Killed by SIGKILL at random moments, and each time started by the same command",
            f"   {self._stage.command(_KILLED, more)}",
        )
        kills = Siege(self._stage, _KILLED, more, pace).survive(moments)
        times = "1 kill" if kills == 1 else f"{kills} kills"
        self._stage.say(
            f"   finished: step {self._stage.watch(_KILLED).step()} of {self._steps}, "
            f"after {times} (the same moments again: --seed {seed})"
        )
        return kills == len(moments)

    def _compare(self) -> bool:
        self._stage.say("", f"3. Both runs compared at step {self._steps}, byte by byte")
        found = self._findings(_KILLED, self._steps)
        return all(finding.is_same for finding in found)

    def _compare_with_control(self) -> bool:
        step = save_steps_for(self._steps)
        self._stage.say(
            "",
            f"4. Can this comparison fail? The run with its data in another order, at step {step}",
            f"   {self._stage.command(_CONTROL, _OTHER_ORDER)}",
        )
        folder = self._stage.folder / _CONTROL / f"checkpoint-{step}"
        with self._stage.start(_CONTROL, _OTHER_ORDER) as child, self._stage.waiting("training"):
            child.wait_until(folder.is_dir)
        found = {finding.what: finding for finding in self._findings(_CONTROL, step)}
        must_differ = ("weights", "optimizer", "loss of each step", "order of the data")
        return not any(found[what].is_same for what in must_differ)

    def _findings(self, run: str, step: int) -> list[ComparedPart]:
        folder = self._stage.folder
        found = compare(folder / _PEACE, folder / run, step=step)
        self._stage.say(*(f"   {_sentence(finding)}" for finding in found))
        return found

    def _conclude(self, *, is_killed: bool, is_same: bool, can_fail: bool) -> None:
        seconds = time.monotonic() - self._began
        if not is_same:
            verdict = "NOT THE SAME: the killed run differs from the uninterrupted one."
        elif not is_killed:
            verdict = "NOT SHOWN: the run came to its end before all kills; try more --steps."
        elif not can_fail:
            verdict = "NOT SHOWN: the comparison missed a run that must differ."
        else:
            verdict = "The killed run is the same run, bit for bit."
        self._stage.say("", f"{verdict} ({seconds:.0f} s)")


def _sentence(finding: ComparedPart) -> str:
    size = "" if finding.nbytes is None else f", {size_text(finding.nbytes)}"
    total = f"{finding.total} {finding.unit}{size}"
    if finding.is_same:
        verdict = "the same"
    elif finding.total == 0:
        verdict = "NOTHING TO COMPARE"
    else:
        verdict = f"{len(finding.different)} differ, first {finding.different[0]}"
    return f"{finding.what:<18} {total:<24} {verdict}"
