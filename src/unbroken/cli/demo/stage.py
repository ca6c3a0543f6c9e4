"""Where the demo happens: one folder for its runs, one console for its story."""

from __future__ import annotations

import shlex
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from unbroken.cli.demo.child import ENVIRONMENT, Child, Watch
from unbroken.errors import ConfigError

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

    def watch(self, run: str) -> Watch:
        """Look at a run directory from outside."""
        return Watch(self.folder / run)

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
