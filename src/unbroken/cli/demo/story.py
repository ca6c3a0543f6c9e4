"""The demo as a story: what is done, what was hit, what was found."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from unbroken.cli.demo.comparison import Finding, compare
from unbroken.cli.demo.kill import Pace
from unbroken.cli.demo.recipe import Moment, config_text, plan_kills, save_steps_for
from unbroken.cli.demo.siege import Siege
from unbroken.cli.demo.stage import Stage, demo_folder, ended_by_sigterm
from unbroken.cli.tables import make_console, size_text

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

    def _train_in_peace(self) -> Pace:
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
        return Pace(start=start, step=(seconds - start) / self._steps)

    def _train_under_fire(
        self, moments: Sequence[Moment], seed: int, pace: Pace, more: Sequence[str]
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

    def _findings(self, run: str, step: int) -> list[Finding]:
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


def _sentence(finding: Finding) -> str:
    size = "" if finding.nbytes is None else f", {size_text(finding.nbytes)}"
    total = f"{finding.total} {finding.unit}{size}"
    if finding.is_same:
        verdict = "the same"
    elif finding.total == 0:
        verdict = "NOTHING TO COMPARE"
    else:
        verdict = f"{len(finding.different)} differ, first {finding.different[0]}"
    return f"{finding.what:<18} {total:<24} {verdict}"
