"""What git knows of a folder: the commit that is checked out, and whether files differ from it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from unbroken.store.digest import digest_of

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_LINKS = 5  # a reference that names a reference


def read_commit(folder: Path, *, seconds: float = 1.0) -> str | None:
    """Return the commit that is checked out in the repository around a folder.

    It is read from the files of git, so that git need not be installed. Only where they do not
    tell (git may keep its references in a table) git is asked.

    Args:
        folder: An absolute path, in a repository or its worktree or not.
        seconds: How long git may take.

    Returns:
        40 or 64 hexadecimal digits; None if there is no repository, or no commit in it yet.
    """
    git = _git_folder(folder)
    if git is None:
        return None
    commit = _resolve(git) or _ask(folder, seconds, "rev-parse", "--verify", "HEAD")
    return commit if commit is not None and _HASH.fullmatch(commit) else None


def is_dirty(folder: Path, *, seconds: float = 1.0) -> bool | None:
    """Return whether a tracked file of the repository around a folder differs from its commit.

    Files that git does not track do not count. Nothing in the repository is written or locked.

    Args:
        folder: An absolute path.
        seconds: How long git may take.

    Returns:
        None if there is no repository or no git, or if it takes longer.
    """
    if _git_folder(folder) is None:
        return None
    listed = _ask(folder, seconds, "status", "--porcelain", "--untracked-files=no")
    return None if listed is None else listed != ""


def changes_digest(folder: Path, *, seconds: float = 1.0) -> str | None:
    """Return a digest of how tracked files around a folder differ from the commit; None: not."""
    if not is_dirty(folder, seconds=seconds):
        return None
    text = _ask(folder, seconds, "diff", "--no-ext-diff", "--no-color", "HEAD")
    return None if text is None else digest_of(text.encode())


def _git_folder(folder: Path) -> Path | None:
    """Return where git keeps its files for a folder: .git, or what a file of that name names."""
    for parent in (folder, *folder.parents):
        git = parent / ".git"
        link = _text(git)  # worktrees and submodules
        if link is not None and link.startswith("gitdir: "):
            return parent / link.removeprefix("gitdir: ")
        if (git / "HEAD").is_file():
            return git
    return None


def _resolve(git: Path) -> str | None:
    """Follow HEAD through references to a commit."""
    shared = git / (_text(git / "commondir") or "")
    found = _text(git / "HEAD")
    for _ in range(_MAX_LINKS):
        if found is None or not found.startswith("ref: "):
            return found
        name = found.removeprefix("ref: ")
        found = _text(git / name) or _text(shared / name) or _packed(shared, name)
    return None


def _packed(shared: Path, name: str) -> str | None:
    lines = (_text(shared / "packed-refs") or "").splitlines()
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {name}")), None)


def _text(path: Path) -> str | None:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return None


def _ask(folder: Path, seconds: float, *arguments: str) -> str | None:
    """Return what git prints; None if it is not there, fails, or takes too long."""
    # As a hook of git, this process may have been told of another repository.
    environment = {name: value for name, value in os.environ.items() if name[:4] != "GIT_"}
    try:
        done = subprocess.run(  # noqa: S603  # no shell; the arguments are those of this file
            ["git", "-c", "core.fsmonitor=false", *arguments],  # noqa: S607  # git is where PATH has it
            cwd=folder,
            env={**environment, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
