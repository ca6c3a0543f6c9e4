"""A training process of the demo, and what its run directory tells while it lives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from unbroken.errors import UnbrokenError
from unbroken.storage import LocalStorage
from unbroken.store import Journal
from unbroken.store.layout import HISTORY_NAME, METRICS_NAME, STAGING

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


class Watch:
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
