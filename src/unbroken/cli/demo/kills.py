"""Killing a run at a planned moment, and finding out where the kill has hit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from unbroken.errors import UnbrokenError
from unbroken.storage import LocalStorage
from unbroken.store import Journal
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


# A training process of the demo, and what its run directory tells while it lives.


# A small model gains nothing from threads, and loses much where other work keeps them waiting.
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}

_PATIENCE_SECONDS = 300.0
_SHOWN_LINES = 40


class ChildFailedError(UnbrokenError):
    """A training process of the demo ended by itself, with an error."""


class Child:
    """`unbroken train` in a process group of its own, so that it ends with all its workers.

    As a context manager it leaves no process behind, whatever happens.

    Args:
        arguments: The words after `unbroken train`.
        folder: The directory in which it runs.
        log: The file that gets what it prints.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "unbroken", "train", *arguments]
        self._name = " ".join(command[1:])
        self._began = time.monotonic()
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 (our own program)
                command,
                cwd=folder,
                env={**os.environ, **ENVIRONMENT},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id, which is also that of its group."""
        return self._process.pid

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def is_alive(self) -> bool:
        """Whether it has not come to its end."""
        return self._process.poll() is None

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

    def wait(self) -> None:
        """Wait for its end.

        Raises:
            ChildFailedError: It failed.
        """
        self.wait_until(lambda: False)

    def kill(self) -> None:
        """SIGKILL it and its workers, and wait until it is gone. Harmless after its end."""
        if self.is_alive:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """Stop it on the spot; on Linux this returns when it stands still, or is gone."""
        self._signal(signal.SIGSTOP)
        if sys.platform == "linux":
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def unfreeze(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _refuse_failure(self) -> None:
        if self._process.returncode != 0:
            raise self._failure(f"ended with status {self._process.returncode}")

    def _failure(self, what: str) -> ChildFailedError:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        hint = "\n".join(["its last output:", *lines[-_SHOWN_LINES:]])
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

    def metrics(self) -> list[dict[str, Any]]:
        """Return all records of metrics.jsonl."""
        return list(self._metrics.records())

    def step(self) -> int:
        """Return the last step that was logged; 0 before the first."""
        return max((record["step"] for record in self.metrics()), default=0)

    def staged(self) -> list[str]:
        """Return the checkpoints that are being written, or that a kill left half written."""
        try:
            return sorted(os.listdir(self.folder / STAGING))
        except FileNotFoundError:
            return []


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
class Hit:
    """Where a kill has hit, as the run directory shows it.

    Attributes:
        phase: In words.
        seconds: How long the process had lived.
        staged: The half-written checkpoints that it left.
    """

    phase: str
    seconds: float
    staged: tuple[str, ...]


@dataclass(frozen=True)
class RunStart:
    """What a start has found.

    Attributes:
        record: Its record in the history of the run.
        staged: The half-written checkpoints that are still there after it.
    """

    record: dict[str, Any]
    staged: tuple[str, ...]


def await_start(child: Child, watch: RunObserver, starts: int) -> RunStart | None:
    """Wait until a process has chosen where to begin; None if it was over before.

    Args:
        child: The process.
        watch: Its run directory.
        starts: How many starts the run had before this one.
    """
    if not child.wait_until(lambda: len(watch.starts()) > starts):
        return None
    return RunStart(watch.starts()[-1], tuple(watch.staged()))


def kill_in_start(moment: Moment, child: Child, watch: RunObserver, pace: RunPace) -> Hit | None:
    """Kill a process that has just begun; None if it came to its end before."""
    starts = len(watch.starts())
    is_time = child.wait_until(lambda: child.seconds >= moment.fraction * pace.start)
    return _kill(child, watch, starts) if is_time else None


def kill_in_training(moment: Moment, child: Child, watch: RunObserver, pace: RunPace) -> Hit | None:
    """Kill a process that trains, as the moment says; None if it came to its end before."""
    starts = len(watch.starts()) - 1  # this one does not count: it has begun already
    if not child.wait_until(lambda: watch.step() >= moment.step):
        return None
    if moment.kind == "saving":
        is_time = _freeze_in_a_save(child, watch, moment.fraction * _SAVE_SECONDS)
    else:
        time.sleep(moment.fraction * pace.step)
        is_time = child.is_alive
    return _kill(child, watch, starts) if is_time else None


def _freeze_in_a_save(child: Child, watch: RunObserver, delay: float) -> bool:
    """Stop the process inside a save; if the commit won the race, try at the next save."""
    while child.wait_until(lambda: bool(watch.staged()), pause=_POLL_SECONDS):
        time.sleep(delay)
        child.freeze()
        if watch.staged():
            return child.is_alive
        child.unfreeze()
        delay /= 2
    return False


def _kill(child: Child, watch: RunObserver, starts: int) -> Hit:
    seconds = child.seconds
    child.kill()
    return Hit(_phase(watch, starts), seconds, tuple(watch.staged()))


def _phase(watch: RunObserver, starts: int) -> str:
    if len(watch.starts()) == starts:
        return "while starting"
    staged = watch.staged()
    if staged:
        return f"inside the save of {staged[-1].rpartition('.')[0]}"
    return f"while training, after step {watch.step()}"
