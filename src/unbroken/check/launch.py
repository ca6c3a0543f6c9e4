"""Starting the script with the recorder in it, and seeing it end."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from unbroken.check.isolation import VARIABLE, Workspace
from unbroken.check.recorder.protocol import RecordPlan
from unbroken.check.recording import Recording, read_recordings
from unbroken.errors import ConfigError

_ENTRY = Path(__file__).parent / "entry"
_PLAN = "UNBROKEN_CHECK_PLAN"
_GRACE_SECONDS = 5.0  # for the other ranks to come to the same step
_END_SECONDS = 30.0  # for what was killed to be gone
_POLL_SECONDS = 0.02
_TAIL = 15


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


def launch(
    words: Sequence[str], place: Workspace, records: Path, plan: RecordPlan, timeout: float
) -> Launch:
    """Run a command to its end, with the recorder in it and in all that it starts.

    Args:
        words: The command.
        place: Where it works.
        records: An empty folder for plan, recordings and output.
        plan: What the recorder is to do; `folder` and `parent` are filled in here.
        timeout: Seconds until it is ended.

    Raises:
        ConfigError: There is no such program.
    """
    plan_path, log = records / "plan.json", records / "output.log"
    plan.write(plan_path)
    began = time.monotonic()
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(  # noqa: S603  (the user's own command)
                place.command(words),
                cwd=place.folder,
                env=_environment(place, plan_path),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise ConfigError(words[0], f"cannot be started: {error.strerror}") from error
        is_timed_out = not _wait(process, plan_path, timeout)
        _end_all(process, plan_path, grace=0.0 if is_timed_out else _GRACE_SECONDS)
    tail = log.read_text(errors="replace").splitlines()[-_TAIL:]
    seconds = time.monotonic() - began
    status = process.wait()
    return Launch(status, is_timed_out, seconds, tuple(tail), read_recordings(records))


def _environment(place: Workspace, plan: Path) -> dict[str, str]:
    paths = [str(_ENTRY), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        _PLAN: str(plan),
        VARIABLE: str(place.out),
    }


def _wait(process: subprocess.Popen[bytes], plan: Path, timeout: float) -> bool:
    """Return whether the process ended in time; end all of it if we are interrupted."""
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        return False
    except BaseException:
        _end_all(process, plan, grace=0.0)
        raise
    return True


def _end_all(process: subprocess.Popen[bytes], plan: Path, grace: float) -> None:
    """SIGKILL what is left of a launch and see it gone; ranks may first come to their own end."""
    until = time.monotonic() + grace
    while processes_of(plan, b"RANK=") and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    if process.poll() is None:
        process.kill()
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
