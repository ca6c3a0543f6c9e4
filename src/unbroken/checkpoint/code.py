"""Which code a run was started from: the script, and the commit of its repository."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from unbroken.checkpoint.differences import Difference, Rule, compare
from unbroken.checkpoint.git import is_dirty, read_commit
from unbroken.store import Json
from unbroken.store.digest import digest_of

_PACKAGE = "unbroken"
_SITES = {"site-packages", "dist-packages"}
_UNSEEN = "whether the training depends on it cannot be seen"
_RENAMED: Rule = ("harmless", "the script has another name; it is the same, byte for byte")
CODE_RULES: Mapping[str, Rule] = {
    "code.script": ("equivalent", f"another script was started: {_UNSEEN}"),
    "code.script_digest": ("equivalent", f"the script is not the same file: {_UNSEEN}"),
    "code.git_commit": ("equivalent", f"another commit is checked out: {_UNSEEN}"),
    "code.git_dirty": ("equivalent", f"files differ from the commit, or do no longer: {_UNSEEN}"),
    "code.unbroken": ("equivalent", "another version of unbroken; its changelog tells of changes"),
}
"""The verdict and the effect of each fact about the code that differs."""


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


def code_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any] | None = None
) -> tuple[Difference, ...]:
    """Return how the code of a start differs from that of a checkpoint, as far as files tell.

    All that differs is "equivalent": a change may be a comment, or the loss. `git_dirty` is no
    exception: at one commit it can only change when tracked files did. (That files are dirty at
    both starts says nothing about whether they are the same; only the script is compared.) A
    script that was renamed, and has the same bytes, is "harmless". What one side does not know
    is no difference.

    Args:
        stored: `code_facts()` of the checkpoint.
        now: Those of this start; None: of this process.

    Returns:
        Differences whose paths begin with "code.".

    Example:
        >>> stored = {"script": "train.py", "script_digest": "5a", "git_dirty": None}
        >>> now = {"script": "train.py", "script_digest": "c3", "git_dirty": True}
        >>> for difference in code_differences(stored, now):
        ...     print(difference.path, difference.verdict)
        code.script_digest equivalent
    """
    before, after = _known(stored), _known(code_facts() if now is None else now)
    rules = dict(CODE_RULES)
    digest = before.get("code.script_digest")
    if digest is not None and digest == after.get("code.script_digest"):
        rules["code.script"] = _RENAMED
    return compare(before, after, rules)


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {f"code.{name}": value for name, value in facts.items() if value is not None}
