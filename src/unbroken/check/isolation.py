"""Where each run of the script works, so that no run sees what another one left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatch
from pathlib import Path

from unbroken.errors import ConfigError

PLACEHOLDER = "{out}"
VARIABLE = "UNBROKEN_CHECK_OUT"
MAX_COPY_BYTES = 1 << 30
_NOT_COPIED = (".git", ".venv", "venv", "node_modules", "__pycache__", ".*_cache")
_NO_CHECKPOINT = (".log", ".txt", ".jsonl", ".csv", ".md", ".py", ".pyc")


class Separation(StrEnum):
    """How the runs are kept apart."""

    PLACEHOLDER = "an output folder for each run, in the place of {out}"
    VARIABLE = f"an output folder for each run, which the script takes from {VARIABLE}"
    CLEAN = "what --clean names is removed before each run"
    COPY = "a copy of the current folder for each run, in which the script works"


@dataclass(frozen=True)
class Workspace:
    """Where one run works, over all its starts.

    Attributes:
        folder: Its working folder.
        out: Its output folder.
        watched: Where its checkpoints are expected.
    """

    folder: Path
    out: Path
    watched: tuple[Path, ...]

    def command(self, words: Sequence[str]) -> list[str]:
        """Return a command with the output folder in it."""
        return [word.replace(PLACEHOLDER, str(self.out)) for word in words]

    def bytes_written_since(self, moment_ns: int) -> int:
        """Return the size of all files written since, logs and program text left out."""
        return sum(
            status.st_size
            for root in self.watched
            for path in ([root] if root.is_file() else root.rglob("*"))
            if path.suffix not in _NO_CHECKPOINT and path.is_file() and "tfevents" not in path.name
            if (status := path.stat()).st_mtime_ns >= moment_ns
        )


@dataclass(frozen=True)
class Workspaces:
    """Makes a workspace for each run.

    Args:
        root: An empty folder for copies and outputs.
        current: The folder in which the user gave the command.
        separation: How the runs are kept apart.
        clean: With `Separation.CLEAN`: what the script leaves behind, relative to `current`.
    """

    root: Path
    current: Path
    separation: Separation
    clean: tuple[Path, ...] = ()

    def make(self, name: str) -> Workspace:
        """Return a fresh workspace for a run."""
        out = self.root / name / "out"
        out.mkdir(parents=True)
        if self.separation is Separation.CLEAN:
            self.remove_leftovers()
            return Workspace(self.current, out, (out, *self.clean))
        if self.separation is Separation.COPY:
            folder = self.root / name / "folder"
            shutil.copytree(self.current, folder, ignore=self._not_copied, symlinks=True)
            return Workspace(folder, out, (out, folder))
        return Workspace(self.current, out, (out,))

    def _not_copied(self, folder: str, names: list[str]) -> list[str]:
        """Return what of a folder is not copied: what is not the script's, and our own root."""
        return [
            name
            for name in names
            if _is_left_out(name) or (Path(folder) / name).resolve() == self.root.resolve()
        ]

    def remove_leftovers(self) -> None:
        """Remove what the script leaves in place."""
        for path in self.clean:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def choose_separation(
    commands: Sequence[Sequence[str]], current: Path, clean: Sequence[str]
) -> tuple[Separation, tuple[Path, ...]]:
    """Return how the runs of a command are kept apart, and what has to be removed for it.

    Args:
        commands: The command and the resume command.
        current: The folder in which they are given.
        clean: What the user says the script leaves behind.

    Raises:
        ConfigError: What is to be removed is there already, or is not below the current folder;
            the folder is too large to be copied.

    Example:
        >>> choose_separation([["python", "train.py", "--out", "{out}"]], Path(), ())[0].name
        'PLACEHOLDER'
    """
    if clean:
        return Separation.CLEAN, tuple(_checked(current, one) for one in clean)
    words = [word for command in commands for word in command]
    if any(PLACEHOLDER in word for word in words):
        return Separation.PLACEHOLDER, ()
    if any(_mentions_variable(current / word) for word in words):
        return Separation.VARIABLE, ()
    _check_size(current)
    return Separation.COPY, ()


def _is_left_out(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in _NOT_COPIED)


def _checked(current: Path, name: str) -> Path:
    path = current / name
    if current.resolve() not in path.resolve().parents:
        raise ConfigError("--clean", "must lie below the current folder", found=name)
    if path.exists() or path.is_symlink():
        hint = "move it away first: the check removes it before each run"
        raise ConfigError("--clean", "is there already", found=name, hint=hint)
    return path


def _mentions_variable(path: Path) -> bool:
    try:
        return path.is_file() and VARIABLE.encode() in path.read_bytes()
    except OSError:  # a word that is no path at all
        return False


def _check_size(current: Path) -> None:
    size = 0
    for folder, inner, files in os.walk(current):
        inner[:] = [name for name in inner if not _is_left_out(name)]
        paths = [Path(folder) / name for name in files]
        size += sum(path.stat().st_size for path in paths if not path.is_symlink())
        if size > MAX_COPY_BYTES:
            hint = (
                f"write {PLACEHOLDER} in the command where the script's output folder stands, let "
                f"the script use ${VARIABLE}, or name what it leaves behind with --clean"
            )
            raise ConfigError(
                "the current folder", "is too large to be copied for each run", hint=hint
            )
