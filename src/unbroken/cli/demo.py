"""`unbroken demo`: a run that is killed again and again against one that is not."""

from __future__ import annotations

import json
import os
import random
import secrets
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from rich.console import Console

from unbroken.check.launch import RunningCommand
from unbroken.cli.tables import make_console, size_text
from unbroken.errors import ConfigError, UnbrokenError
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, Diff, Journal, diff_checkpoints
from unbroken.store.format.names import HISTORY_NAME, METRICS_NAME, STAGING

# What the demo trains, and when it kills.


Kind = Literal["starting", "training", "saving"]


@dataclass(frozen=True)
class Moment:
    """When one kill is to come.

    Attributes:
        kind: "starting": after `fraction` of the time that a start takes; "training": after
            `step` was logged and `fraction` of a step more; "saving": inside the first save
            that begins after `step` was logged.
        step: The step to wait for.
        fraction: A random number from 0 to 1.
    """

    kind: Kind
    step: int
    fraction: float


def plan_kills(*, kills: int, steps: int, seed: int) -> list[Moment]:
    """Return random moments: one inside a save; of three or more, one while starting.

    Example:
        >>> [moment.kind for moment in plan_kills(kills=1, steps=60, seed=5)]
        ['saving']
        >>> sorted(moment.kind for moment in plan_kills(kills=4, steps=60, seed=5))
        ['saving', 'starting', 'training', 'training']
    """
    draw = random.Random(seed)  # noqa: S311 (no secret)
    kinds: list[Kind] = ["saving"]
    if kills >= 3:
        kinds.append("starting")
    kinds += ["training"] * (kills - len(kinds))
    draw.shuffle(kinds)
    # Not at the end: a kill inside a save may need several saves until it wins the race.
    targets = sorted(draw.choices(range(1, steps - 2 * save_steps_for(steps)), k=kills))
    return [Moment(kind, step, draw.random()) for kind, step in zip(kinds, targets, strict=True)]


def save_steps_for(steps: int) -> int:
    """Return how often the demo saves: a handful of times, and not at the end of an epoch."""
    return max(2, steps // 9)


def config_text(*, steps: int) -> str:
    """Return the YAML file of the demo's run.

    Example:
        >>> "max_steps: 60" in config_text(steps=60)
        True
    """
    return f"""\
# A small GPT-2 on real text, with everything that makes resuming hard:
# dropout, shuffling, gradient accumulation, worker processes, a schedule, clipping, evaluation.
max_steps: {steps}
batch_size: 16
micro_batch_size: 8
dataloader_num_workers: 2
learning_rate: 2e-3
lr_scheduler_type: cosine
warmup_steps: {max(1, steps // 10)}
weight_decay: 0.1
max_grad_norm: 1.0
eval_steps: {max(2, steps // 4)}
save_steps: {save_steps_for(steps)}
logging_steps: 1
log_data_digest: true
seed: 42
model:
  model_type: gpt2
  n_layer: 4
  n_head: 4
  n_embd: 128
  n_positions: 64
  resid_pdrop: 0.1
  embd_pdrop: 0.1
  attn_pdrop: 0.1
data:
  train: builtin
  eval_fraction: 0.05
  tokenizer: bpe
  vocab_size: 1024
  block_size: 64
  cache: tokens
"""


# A training process of the demo, and what its run directory shows while it lives.


# A small model gains nothing from threads, and loses much where other work keeps them waiting.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

_PATIENCE_SECONDS = 300.0
_SHOWN_LINES = 40


class ChildFailedError(UnbrokenError):
    """A training process of the demo ended by itself, with an error."""


class Child(RunningCommand):
    """A process of `unbroken train`, whose failure is an error here."""

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path) -> None:
        words = ["-m", "unbroken", "train", *arguments]
        self._name = " ".join(words)
        super().__init__([sys.executable, *words], folder, log, ENVIRONMENT)

    def wait_until(self, is_true: Callable[[], bool], *, pause: float = 0.005) -> bool:
        """Wait for something; return False if the process reached its end before.

        Raises:
            ChildFailedError: It failed, or neither happened for minutes.
        """
        while self.seconds < _PATIENCE_SECONDS:
            ended = not self.is_alive
            if is_true():
                return True
            if ended:
                self._refuse_failure()
                return False
            time.sleep(pause)
        raise self._failure(f"has done nothing new for {_PATIENCE_SECONDS:.0f} seconds")

    def finish(self) -> None:
        """Wait for its end.

        Raises:
            ChildFailedError: It failed.
        """
        self.wait_until(lambda: False)

    def _refuse_failure(self) -> None:
        status = self.wait()
        if status != 0:
            raise self._failure(f"ended with status {status}")

    def _failure(self, what: str) -> ChildFailedError:
        hint = "\n".join(["its last output:", *self.last_lines(_SHOWN_LINES)])
        return ChildFailedError(self._name, what, hint=hint)


class RunObserver:
    """What a run directory shows from outside, while another process works in it.

    Args:
        folder: The run directory, which need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        storage = LocalStorage(folder, create=False)
        self._history = Journal(storage, HISTORY_NAME)
        self._metrics = Journal(storage, METRICS_NAME)

    def starts(self) -> list[dict[str, Any]]:
        """Return what each start of the run has found."""
        records: list[dict[str, Any]] = list(self._history.records())
        return [record for record in records if record.get("event") == "started"]

    def repeated(self) -> list[str]:
        """Return in words what each start has found of the steps that it repeated."""
        records = [one for one in self._history.records() if one.get("event") == "repeated"]
        return [
            f"steps {one['from']} to {one['to']} repeated with the same bits"
            if one.get("same")
            else str(one.get("words"))
            for one in records
        ]

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl."""
        return list(self._metrics.records())

    def records_until(self, step: int) -> dict[str, dict[str, Any]]:
        """Return the records of metrics.jsonl up to a step; one that is there twice stands out."""
        found: dict[str, dict[str, Any]] = {}
        for record in self.metrics():
            if record["step"] <= step:
                name = f"step {record['step']}" + ("" if "loss" in record else ", evaluation")
                while name in found:
                    name += ", once more"
                found[name] = record
        return found

    def step(self) -> int:
        """Return the last step that was logged; 0 before the first."""
        return max((record["step"] for record in self.metrics()), default=0)

    def staged(self) -> list[str]:
        """Return the checkpoints that are being written, or that a kill left half written."""
        try:
            return sorted(os.listdir(self.folder / STAGING))
        except FileNotFoundError:
            return []


# Two runs compared: tensors and values by `diff_checkpoints`, losses and data by their records.


_TIMING = ("seconds", "logged_seconds", "tokens_per_second")  # no two runs agree on these


@dataclass(frozen=True)
class ComparedPart:
    """What comparing one kind of thing has shown.

    Attributes:
        what: The kind.
        unit: What is counted.
        total: How many there are in either run.
        different: Those that differ, or that only one run has.
        nbytes: The bytes that were compared; None where that says nothing.
    """

    what: str
    unit: str
    total: int
    different: tuple[str, ...]
    nbytes: int | None = None

    @property
    def is_same(self) -> bool:
        """Whether there was something to compare, and nothing differs."""
        return self.total > 0 and not self.different

    def __str__(self) -> str:
        """Return it as one line of a table."""
        size = "" if self.nbytes is None else f", {size_text(self.nbytes)}"
        total = f"{self.total} {self.unit}{size}"
        if self.is_same:
            verdict = "the same"
        elif self.total == 0:
            verdict = "NOTHING TO COMPARE"
        else:
            verdict = f"{len(self.different)} differ, first {self.different[0]}"
        return f"{self.what:<18} {total:<24} {verdict}"


def compare_runs(left: Path, right: Path, *, step: int) -> list[ComparedPart]:
    """Compare two run directories at a step; every byte of both checkpoints is verified first.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
    """
    one, other = _verified(left, step), _verified(right, step)
    diff = diff_checkpoints(one, other)
    sizes = {path: entry.nbytes for path, entry in one.manifest.tensors.items()}
    sizes = {**dict.fromkeys(other.manifest.tensors, 0), **sizes}
    records, others = (RunObserver(folder).records_until(step) for folder in (left, right))
    return [
        *(_compare_tensors(what, sizes, diff, is_chosen) for what, is_chosen in _TENSORS.items()),
        _compare_values(diff),
        *(
            _compare_records(what, _chosen(records, is_chosen), _chosen(others, is_chosen))
            for what, is_chosen in _METRICS.items()
        ),
    ]


_TENSORS: dict[str, Callable[[str], bool]] = {
    "weights": lambda path: path.startswith("model."),
    "optimizer": lambda path: path.startswith("optimizer."),
    "other tensors": lambda path: not path.startswith(("model.", "optimizer.")),
}
_METRICS: dict[str, Callable[[str], bool]] = {
    "loss of each step": lambda field: field == "loss",
    "order of the data": lambda field: field == "data_digest",
    "all other metrics": lambda field: field not in ("loss", "data_digest", *_TIMING),
}


def _verified(folder: Path, step: int) -> CheckpointReader:
    reader = CheckpointReader(LocalStorage(folder, create=False), f"checkpoint-{step}")
    reader.check_rest()
    return reader


def _compare_tensors(
    what: str, sizes: Mapping[str, int], diff: Diff, is_chosen: Callable[[str], bool]
) -> ComparedPart:
    chosen = [path for path in sizes if is_chosen(path)]
    different = tuple(one.path for one in diff.tensors if is_chosen(one.path))
    return ComparedPart(
        what, "tensors", len(chosen), different, sum(sizes[path] for path in chosen)
    )


def _compare_values(diff: Diff) -> ComparedPart:
    """Return what differs in the files without tensors: counters, random generators, ...

    How a run was set up, and where, stands in other groups; the demo chose that itself.
    """
    stored = [one for one in diff.groups if one.name in ("state", "files") or ".json" in one.name]
    paths = [
        one.path
        for group in (*stored, *(one for one in diff.groups if one.name == "progress"))
        for one in group.differences
        if one.path.rpartition(".")[2] not in _TIMING
    ]
    total = sum(group.count for group in stored)
    return ComparedPart("all other values", "values", total, tuple(paths))


def _chosen(
    records: Mapping[str, dict[str, Any]], is_chosen: Callable[[str], bool]
) -> dict[str, str]:
    """Return the chosen fields of each record that has any, as text that tells floats apart."""
    chosen = {
        name: {field: value for field, value in record.items() if is_chosen(field)}
        for name, record in records.items()
    }
    return {name: json.dumps(part, sort_keys=True) for name, part in chosen.items() if part}


def _compare_records(what: str, one: Mapping[str, str], other: Mapping[str, str]) -> ComparedPart:
    names = {**one, **other}
    different = tuple(name for name in names if one.get(name) != other.get(name))
    return ComparedPart(what, "records", len(names), different)


# Where the demo happens: one folder for its runs, one console for what it reports.


CONFIG_NAME = "demo.yaml"


class Stage:
    """The folder with the configuration and the runs, and the console."""

    def __init__(self, folder: Path, console: Console, config: str) -> None:
        self.folder = folder
        self._console = console
        (folder / CONFIG_NAME).write_text(config, encoding="utf-8")

    def say(self, *lines: str) -> None:
        """Print the next lines at once."""
        for line in lines:
            self._console.print(line, soft_wrap=True)
        self._console.file.flush()

    def waiting(self, what: str) -> AbstractContextManager[object]:
        """Show on a terminal what the demo waits for."""
        return self._console.status(what)

    def command(self, run: str, more: Sequence[str] = ()) -> str:
        """Return the command that trains a run, as a shell takes it."""
        settings = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        program = ["python", "-m", "unbroken", "train"]
        return shlex.join([*settings, *program, *self._arguments(run, more)])

    def start(self, run: str, more: Sequence[str] = ()) -> Child:
        """Start the process that trains a run."""
        return Child(self._arguments(run, more), self.folder, self.folder / f"{run}.log")

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


_POLL_SECONDS = 0.0005
_SAVE_SECONDS = 0.02  # about what a save of the demo takes; a wrong guess only costs tries


@dataclass(frozen=True)
class RunPace:
    """How fast the machine is, measured on the run that is not killed.

    Attributes:
        start: Seconds from the beginning of a process to the beginning of training.
        step: Seconds of a step.
    """

    start: float
    step: float


@dataclass(frozen=True)
class RunStart:
    """What a start has found.

    Attributes:
        record: Its record in the history of the run.
        staged: The half-written checkpoints that are still there after it.
    """

    record: dict[str, Any]
    staged: tuple[str, ...]

    def lines(self, left: Sequence[str]) -> list[str]:
        """Return in words what the start has found and done.

        Args:
            left: The half-written checkpoints that the kill before it left.
        """
        folder = self.record["checkpoint"]
        found = (
            "no checkpoint yet: begins at step 0"
            if folder is None
            else f"goes on from {folder.rstrip('/').rpartition('/')[2]}"
        )
        swept = [name for name in left if name not in self.staged]
        return [
            f"start    {found}",
            *(f"         swept the half-written .staging/{name}" for name in swept),
            *(
                f"         not used: {item['checkpoint']}: {item['reason']}"
                for item in self.record["rejected"]
            ),
            *(
                f"         set aside: {item['from']} is now {item['to']}"
                for item in self.record["set_aside"]
            ),
        ]


class KilledRun:
    """A run that is killed at each moment; it says what was hit and what the next start found."""

    def __init__(self, stage: Stage, run: str, more: Sequence[str], pace: RunPace) -> None:
        self._stage = stage
        self._run = run
        self._more = more
        self._pace = pace
        self._watch = stage.watch(run)
        self._repeats = 0  # of how many it was told that they repeated steps
        self._starts = 0  # how many the run had before the process that runs now
        self._left: tuple[str, ...] = ()  # half-written checkpoints that the last kill left

    def survive(self, moments: Sequence[Moment]) -> int:
        """Kill the run at each moment, then let it reach its end; return the number of kills."""
        for number, moment in enumerate(moments, start=1):
            with self._process() as child:
                if not self._reaches(moment, child):
                    self._stage.say(f"   the run came to its end before kill {number}")
                    return number - 1
                self._kill(child, number)
        with self._process() as child:
            self._has_begun(child)
            child.finish()
        self._tell_of_repeated_steps()
        return len(moments)

    def _tell_of_repeated_steps(self) -> None:
        lines = self._watch.repeated()
        self._stage.say(*(f"            {line}" for line in lines[self._repeats :]))
        self._repeats = len(lines)

    def _process(self) -> Child:
        self._starts = len(self._watch.starts())
        return self._stage.start(self._run, self._more)

    def _reaches(self, moment: Moment, child: Child) -> bool:
        """Wait for the moment of a kill; return False if the process came to its end before."""
        if moment.kind == "starting":
            return child.wait_until(lambda: child.seconds >= moment.fraction * self._pace.start)
        if not self._has_begun(child):
            return False
        if not child.wait_until(lambda: self._watch.step() >= moment.step):
            return False
        if moment.kind == "saving":
            return self._is_frozen_in_a_save(child, moment.fraction * _SAVE_SECONDS)
        time.sleep(moment.fraction * self._pace.step)
        return child.is_alive

    def _has_begun(self, child: Child) -> bool:
        """Wait until a process has chosen where to begin, and say so; False if it ended before."""
        with self._stage.waiting("starting"):
            if not child.wait_until(lambda: len(self._watch.starts()) > self._starts):
                return False
        start = RunStart(self._watch.starts()[-1], tuple(self._watch.staged()))
        self._stage.say(*(f"   {line}" for line in start.lines(self._left)))
        return True

    def _is_frozen_in_a_save(self, child: Child, delay: float) -> bool:
        """Stop the process inside a save; if the commit won the race, try at the next save."""
        while child.wait_until(lambda: bool(self._watch.staged()), pause=_POLL_SECONDS):
            time.sleep(delay)
            child.freeze()
            if self._watch.staged():
                return child.is_alive
            child.unfreeze()
            delay /= 2
        return False

    def _kill(self, child: Child, number: int) -> None:
        """Kill it, and say where that has hit."""
        seconds = child.seconds
        child.kill()
        self._left = tuple(self._watch.staged())
        if len(self._watch.starts()) == self._starts:
            phase = "while starting"
        elif self._left:
            phase = f"inside the save of {self._left[-1].rpartition('.')[0]}"
        else:
            phase = f"while training, after step {self._watch.step()}"
        self._tell_of_repeated_steps()
        self._stage.say(f"   kill {number}   {phase} ({seconds:.1f} s after this start)")


# The four parts of the demo, and what they show.


_PEACE, _KILLED, _CONTROL = "uninterrupted", "killed", "control"
_OTHER_ORDER = ("--data-seed", "1")


def run_demo(
    *,
    keep: str | None,
    steps: int,
    kills: int,
    seed: int | None,
    killed_arguments: Sequence[str] = (),
) -> int:
    """Run the demo and report it; return 0 only if the killed run is the same run.

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
            child.finish()
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
        kills = KilledRun(self._stage, _KILLED, more, pace).survive(moments)
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
        found = compare_runs(folder / _PEACE, folder / run, step=step)
        self._stage.say(*(f"   {finding}" for finding in found))
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
