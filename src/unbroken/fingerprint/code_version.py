"""Which code a run was started from: the script, and the commit of its repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

from unbroken.store import Json
from unbroken.store.format.digest import digest_of

# What git knows of a folder: the commit that is checked out, and whether files differ from it.


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


_PACKAGE = "unbroken"
_SITES = {"site-packages", "dist-packages"}


def code_facts() -> dict[str, Json]:
    """Return which code this process was started from.

    The facts are those of the first call: a file that is edited while training runs was loaded
    before. That call takes as long as `git status`, one second at most. No file or folder is
    written, and no path is told.

    Returns:
        `script`: the file name of the script, or the module of `python -m`; None in a notebook
        or an interpreter. `script_digest`: of its bytes. `git_commit` and `git_dirty` (whether
        tracked files differ from it): of the repository that the script is in. `unbroken`: the
        version. Of installed commands (`unbroken train`, pytest) only the name is told: their
        packages' versions say what they are. None: there is none, or it could not be known.

    Example:
        >>> sorted(code_facts())
        ['git_commit', 'git_dirty', 'script', 'script_digest', 'unbroken']
    """
    return dict(_facts())


@cache
def _facts() -> dict[str, Json]:
    return facts_of(sys.modules.get("__main__"))


def facts_of(main: ModuleType | None) -> dict[str, Json]:
    """Return the facts about a process whose main module is `main`."""
    name, path = _name_and_path(main)
    digest, commit, dirty = None, None, None
    if path is not None and not _is_installed(main, path):
        digest = _digest(path)
        commit, dirty = read_commit(path.parent), is_dirty(path.parent)
    return {
        "script": name,
        "script_digest": digest,
        "git_commit": commit,
        "git_dirty": dirty,
        "unbroken": vars(sys.modules[_PACKAGE])["__version__"],  # imports point down
    }


def _name_and_path(main: ModuleType | None) -> tuple[str | None, Path | None]:
    file = getattr(main, "__file__", None)
    if file is None:  # a notebook, an interpreter, python -c
        return None, None
    path = Path(file).resolve()
    spec = getattr(main, "__spec__", None)
    return path.name if spec is None else spec.name.removesuffix(".__main__"), path


def _is_installed(main: ModuleType | None, path: Path) -> bool:
    """Return whether a main module is not the user's own: unbroken's, or an installed command."""
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name.partition(".")[0] == _PACKAGE:
        return True
    if _SITES & set(path.parts):
        return True
    folders = [sysconfig.get_path(name) for name in ("stdlib", "scripts")]
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)


def _digest(path: Path) -> str | None:
    try:
        return digest_of(path.read_bytes())
    except OSError:
        return None
