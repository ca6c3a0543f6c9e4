"""The whole check: two references, a run that is killed and resumed, and the verdict."""

from __future__ import annotations

import os
import random
import shlex
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from unbroken.check.compare import states_before
from unbroken.check.isolation import Separation, Workspace, Workspaces, choose_separation
from unbroken.check.judge import Kill, Reference, judge_killed, judge_resumed, make_reference
from unbroken.check.launch import Launch, launch
from unbroken.check.recording import Recording
from unbroken.check.verdict import Culprit, Status, Verdict, not_exact
from unbroken.errors import ConfigError
from unbroken.recorder.protocol import Digests, RecordPlan, state_keys

# What a launch of the script means: by how it ended and by what it did.


def states_of(recordings: Iterable[Recording]) -> dict[str, int]:
    """Return at which step each state of the reference stands, for the recorder."""
    table: dict[str, int] = {}
    for recording in recordings:
        for position, (optimizer, state) in enumerate(states_before(recording)):
            if optimizer == recording.steps[0].optimizer:
                for key in state_keys(state.params, state.moments, state.counts):
                    table.setdefault(key, position)
    return table


def judge_launch(reference: Reference, run: Launch, kill: Kill, *, is_last: bool) -> Verdict:
    """Return the verdict on one resume: first by what it did, then by how it ended."""
    if run.is_timed_out:
        return run.failure(Culprit.TIMED_OUT)
    if not any(recording.steps for recording in run.ranks.values()):
        if run.status != 0:
            words = f"the resume command failed with status {run.status} before its first step"
            return not_exact(Culprit.RESUME_FAILED, words, *run.output)
        words = f"the resume command ended at once: after step {kill.after} nothing was trained"
        return not_exact(Culprit.NOTHING_TRAINED, words, *run.output)
    verdict = judge_resumed(reference, run.ranks, kill, is_whole=is_last and run.status == 0)
    if verdict.status is Status.EXACT and run.status != 0 and not (run.is_killed and not is_last):
        words = f"the resumed run ended with status {run.status}"
        return not_exact(Culprit.RESUME_FAILED, words, *run.output)
    return verdict


def summary_of(kills: Sequence[tuple[int, Verdict]]) -> Verdict:
    """Return the worst verdict; that nothing was saved before one kill is not the worst."""
    bad = [verdict for _, verdict in kills if verdict.status is Status.NOT_EXACT]
    unsure = [verdict for _, verdict in kills if verdict.status is Status.UNKNOWN]
    exact = [verdict for _, verdict in kills if verdict.status is Status.EXACT]
    if bad:
        return bad[0]
    if unsure and not (exact and all(one.culprit is Culprit.NEVER_SAVED for one in unsure)):
        return unsure[0]
    if unsure:
        note = f"{len(unsure)} of {len(kills)} kills came before the first checkpoint"
        return replace(exact[-1], evidence=(*exact[-1].evidence, note))
    return exact[-1]


@dataclass(frozen=True)
class CheckRequest:
    """Which script is to be checked, and how.

    Attributes:
        command: The words that start it; `{out}` in them is the run's output folder.
        resume_command: The words that continue it; None: the same.
        steps: End each run after so many optimizer steps; None: let it come to its end.
        at: The steps after which it is killed; empty: `kills` random ones.
        kills: How many kills, if `at` names none.
        seed: Where the random steps come from.
        clean: What the script leaves in the current folder and is to be removed between runs.
        timeout: Seconds for each start of the script.
        digests: "full": every byte; "sampled": blocks of large tensors; "auto": by the size.
        folder: Where the command is given; None: the current folder.
        keep: Keep recordings and outputs in this new folder; None: a temporary one.

    Example:
        >>> CheckRequest(("python", "train.py"), at=(7, 12)).kills
        2
    """

    command: tuple[str, ...]
    resume_command: tuple[str, ...] | None = None
    steps: int | None = None
    at: tuple[int, ...] = ()
    kills: int = 2
    seed: int = 0
    clean: tuple[str, ...] = ()
    timeout: float = 3600.0
    digests: Digests = "auto"
    folder: Path | None = None
    keep: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be asked.

        Raises:
            ConfigError: No command, or a number that makes no sense.
        """
        if not self.command:
            hint = "unbroken check -- python train.py"
            raise ConfigError("check", "the command is missing", hint=hint)
        if self.at and (min(self.at) < 1 or list(self.at) != sorted(set(self.at))):
            raise ConfigError("--at", expected="steps in rising order, from 1", found=self.at)
        for name, value in {"--kills": self.kills, "--steps": self.steps}.items():
            if value is not None and value < 1:
                raise ConfigError(name, expected="at least 1", found=value)
        if self.timeout <= 0:
            raise ConfigError("--timeout", expected="more than 0", found=self.timeout)


@dataclass(frozen=True)
class CheckResult:
    """What a check has found.

    Attributes:
        verdict: The outcome.
        kills: The verdict on each resume, by the step after which the kill before it came.
        steps: The steps of the reference; 0 if there is none.
        ranks: How many ranks the script has.
        overhead: The recorder's share of the time of a step; None if it is not known.
        seconds: How long everything took.
    """

    verdict: Verdict
    kills: tuple[tuple[int, Verdict], ...] = ()
    steps: int = 0
    ranks: int = 0
    overhead: float | None = None
    seconds: float = 0.0


Tell = Callable[[str], None]


def check_script(request: CheckRequest, tell: Tell = lambda _: None) -> CheckResult:
    """Find out whether a script resumes exactly; it is started at least four times.

    Exact means: every optimizer step after each resume has the same data, loss, learning rate,
    gradients, weights, buffers, optimizer state and random generators, bit for bit, as the
    same step of the uninterrupted run. The script is not changed; its processes are killed by
    SIGKILL right after the optimizer step that is named.

    Args:
        request: What is to be checked.
        tell: Called with each line that is to be shown.

    Raises:
        ConfigError: The command cannot be started, a kill lies beyond the end of the run, or the
            runs cannot be kept apart.
    """
    began = time.monotonic()
    with _working_folder(request.keep) as root:
        result = _Check(request, root, tell).result()
    return replace(result, seconds=time.monotonic() - began)


@contextmanager
def _working_folder(keep: Path | None) -> Iterator[Path]:
    if keep is None:
        with tempfile.TemporaryDirectory(
            prefix="unbroken-check-", ignore_cleanup_errors=True
        ) as it:
            yield Path(it)
        return
    if keep.exists() and any(keep.iterdir()):
        raise ConfigError("--keep", "the folder is not empty", found=keep)
    keep.mkdir(parents=True, exist_ok=True)
    yield keep.resolve()


class _Check:
    """The parts of a check, in their order."""

    def __init__(self, request: CheckRequest, root: Path, tell: Tell) -> None:
        self._request = request
        self._root = root
        self._tell = tell
        self._resume = request.resume_command or request.command
        current = request.folder if request.folder is not None else Path.cwd()
        commands = (request.command, self._resume)
        separation, clean = choose_separation(commands, current, request.clean)
        self._workspaces = Workspaces(root, current, separation, clean)
        self._launches = 0

    def result(self) -> CheckResult:
        """Return what was found; leave nothing of the runs in the user's folder."""
        self._tell(f"Kept apart: {self._workspaces.separation}.")
        try:
            reference = self._make_reference()
            if isinstance(reference, Verdict):
                return CheckResult(reference)
            kills = tuple(self._kill_and_resume(reference))
        finally:
            if self._workspaces.separation is Separation.CLEAN:
                self._workspaces.remove_leftovers()
        overheads = [one.overhead for one in reference.ranks.values() if one.overhead is not None]
        return CheckResult(
            summary_of(kills),
            kills,
            reference.steps,
            len(reference.ranks),
            max(overheads, default=None),
        )

    def _make_reference(self) -> Reference | Verdict:
        """Run the script twice without a kill."""
        self._tell(f"1. Without a kill, twice: {shlex.join(self._request.command)}")
        runs = []
        for name in ("reference-1", "reference-2"):
            plan = RecordPlan("", self._request.digests, stop_after=self._request.steps)
            run = self._launch(self._request.command, self._workspaces.make(name), plan)
            if run.is_timed_out or run.status != 0:
                return run.failure(Culprit.SCRIPT_FAILED)
            steps = max((len(one.steps) for one in run.ranks.values()), default=0)
            ranks = f" on {len(run.ranks)} ranks" if len(run.ranks) > 1 else ""
            self._tell(f"   {steps} steps{ranks}, {run.seconds:.0f} s")
            runs.append(run.ranks)
        return make_reference(*runs)

    def _kill_and_resume(self, reference: Reference) -> Iterator[tuple[int, Verdict]]:
        """Kill the script at each chosen step; yield the verdict on each resume."""
        moments = self._moments(reference.steps)
        self._tell(f"2. Killed after {_list(moments)}: {shlex.join(self._resume)}")
        workspace, began = self._workspaces.make("killed"), time.time_ns()
        first = self._launch(self._request.command, workspace, self._plan(moments[0]))
        wrong = judge_killed(reference, first.ranks) or first.why_not_killed()
        if wrong is not None:
            yield moments[0], wrong
            return
        params = max(one.param_bytes for one in reference.ranks.values())
        states = states_of(reference.ranks.values())
        for number, moment in enumerate(moments):
            saved = workspace.bytes_written_since(began) >= max(params // 2, 1)
            following = moments[number + 1] if number + 1 < len(moments) else None
            again = self._launch(self._resume, workspace, self._plan(following, states))
            verdict = judge_launch(reference, again, Kill(moment, saved), is_last=following is None)
            self._tell(f"   killed after step {moment}, resumed: {verdict.status}")
            yield moment, verdict
            if verdict.status is Status.NOT_EXACT or not again.is_killed:
                return

    def _moments(self, steps: int) -> tuple[int, ...]:
        """Return the steps after which to kill; there must be a step left after each."""
        if self._request.at:
            if max(self._request.at) >= steps:
                expected = f"below {steps}, the steps of the run"
                raise ConfigError("--at", expected=expected, found=max(self._request.at))
            return self._request.at
        if steps < 2:
            raise ConfigError("check", "the run is too short to be killed", found=f"{steps} step")
        possible = range(max(1, steps // 3), steps)
        count = min(self._request.kills, len(possible))
        return tuple(sorted(random.Random(self._request.seed).sample(possible, count)))  # noqa: S311

    def _plan(self, kill_after: int | None, states: dict[str, int] | None = None) -> RecordPlan:
        return RecordPlan("", self._request.digests, kill_after, self._request.steps, states or {})

    def _launch(self, words: Sequence[str], workspace: Workspace, plan: RecordPlan) -> Launch:
        self._launches += 1
        records = self._root / "records" / f"launch-{self._launches}"
        records.mkdir(parents=True)
        plan = replace(plan, folder=str(records), parent=os.getpid())
        return launch(words, workspace, records, plan, self._request.timeout)


def _list(steps: Sequence[int]) -> str:
    names = " and ".join([", ".join(map(str, steps[:-1])), str(steps[-1])]) if steps[1:] else ""
    return f"steps {names}" if names else f"step {steps[0]}"
