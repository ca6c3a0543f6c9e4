"""Starting a command with all its processes, with the recorder in it or not, and seeing it end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from unbroken.check.isolation import VARIABLE, Workspace
from unbroken.check.recording import Recording, read_recordings
from unbroken.check.verdict import Culprit, Verdict, unknown
from unbroken.errors import ConfigError
from unbroken.recorder.protocol import RecordPlan

_ENTRY = Path(__file__).parent / "entry"
_PLAN = "UNBROKEN_CHECK_PLAN"
_GRACE_SECONDS = 5.0  # for the other ranks to come to the same step
_END_SECONDS = 30.0  # for what was killed to be gone
_POLL_SECONDS = 0.02
_TAIL = 15


class RunningCommand:
    """A command in a process group of its own, which ends with all its workers.

    As a context manager it leaves no process of the group behind, whatever happens.

    Args:
        words: The command.
        folder: The directory in which it runs.
        log: The file to which its output is appended.
        variables: Environment variables besides those of this process.

    Raises:
        ConfigError: There is no such program.
    """

    def __init__(
        self, words: Sequence[str], folder: Path, log: Path, variables: Mapping[str, str]
    ) -> None:
        self._log = log
        self._began = time.monotonic()
        with log.open("ab") as output:
            try:
                self._process = subprocess.Popen(  # noqa: S603  (the user's command, or our own)
                    list(words),
                    cwd=folder,
                    env={**os.environ, **variables},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(words[0], f"cannot be started: {error.strerror}") from error

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

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; return the exit status, negative if a signal ended it.

        Raises:
            subprocess.TimeoutExpired: It is still running.
        """
        return self._process.wait(timeout)

    def last_lines(self, count: int) -> list[str]:
        """Return the last lines that it wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]

    def kill(self) -> None:
        """SIGKILL it and its workers, and wait until it has ended. Harmless after its end."""
        if self.is_alive:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """Stop it on the spot; on Linux this returns when it stands still, or has ended."""
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


@dataclass(frozen=True)
class Launch:
    """One start of the script, from beginning to end.

    Attributes:
        status: The exit status; negative: the signal that ended it.
        is_timed_out: Whether it was ended because it took too long.
        seconds: How long it took.
        output: The last lines that it wrote.
        ranks: What the recorder saw, by rank.
    """

    status: int
    is_timed_out: bool
    seconds: float
    output: tuple[str, ...]
    ranks: Mapping[int, Recording]

    @property
    def is_killed(self) -> bool:
        """Whether SIGKILL ended it."""
        return self.status == -signal.SIGKILL

    def failure(self, culprit: Culprit) -> Verdict:
        """Return the verdict on a launch that went wrong by itself."""
        if self.is_timed_out:
            words = f"not at its end after {self.seconds:.0f} s (--timeout)"
            return unknown(Culprit.TIMED_OUT, words)
        return unknown(culprit, f"the script ended with status {self.status}", *self.output)

    def why_not_killed(self) -> Verdict | None:
        """Return why the kill that was planned did not come; None: it came."""
        if self.is_killed:
            return None
        if self.is_timed_out or self.status != 0:
            return self.failure(Culprit.SCRIPT_FAILED)
        return unknown(Culprit.NOT_KILLED, "the run came to its end before the kill")


def launch(
    words: Sequence[str], workspace: Workspace, records: Path, plan: RecordPlan, timeout: float
) -> Launch:
    """Run a command to its end, with the recorder in it and in all that it starts.

    Args:
        words: The command.
        workspace: Where it works.
        records: An empty folder for plan, recordings and output.
        plan: What the recorder is to do; `folder` and `parent` are filled in here.
        timeout: Seconds until it is ended.

    Raises:
        ConfigError: There is no such program.
    """
    plan_path = records / "plan.json"
    plan.write(plan_path)
    variables = _variables(workspace, plan_path)
    command = RunningCommand(
        workspace.command(words), workspace.folder, records / "output.log", variables
    )
    is_timed_out = not _wait(command, plan_path, timeout)
    _end_all(command, plan_path, grace=0.0 if is_timed_out else _GRACE_SECONDS)
    tail, seconds = command.last_lines(_TAIL), command.seconds
    return Launch(command.wait(), is_timed_out, seconds, tuple(tail), read_recordings(records))


def _variables(workspace: Workspace, plan: Path) -> dict[str, str]:
    paths = [str(_ENTRY), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        _PLAN: str(plan),
        VARIABLE: str(workspace.out),
    }


def _wait(command: RunningCommand, plan: Path, timeout: float) -> bool:
    """Return whether the command ended in time; end all of it if we are interrupted."""
    try:
        command.wait(timeout)
    except subprocess.TimeoutExpired:
        return False
    except BaseException:
        _end_all(command, plan, grace=0.0)
        raise
    return True


def _end_all(command: RunningCommand, plan: Path, grace: float) -> None:
    """SIGKILL what is left of a launch and see it ended; ranks may first come to their own end."""
    until = time.monotonic() + grace
    while processes_of(plan, b"RANK=") and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    command.kill()
    until = time.monotonic() + _END_SECONDS
    while (left := processes_of(plan)) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def processes_of(plan: Path, having: bytes = b"") -> list[int]:
    """Return the living processes of a launch: those whose environment names its plan.

    Args:
        plan: The path of the plan.
        having: Only those that have a variable that begins so.
    """
    mark = f"{_PLAN}={plan}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # gone, or another user's
            variables = (folder / "environ").read_bytes().split(b"\0")
            if mark in variables and any(one.startswith(having) for one in variables):
                found.append(int(folder.name))
    return found
