"""An assertion for tests of data loaders: exact continuation from every batch."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from unbroken.check import CheckRequest, CheckResult, Status, check_script
from unbroken.errors import ConfigError


def assert_loader_resumes_at_every_step(
    make_loader: Callable[[], Any], *, steps: int | None = None
) -> None:
    """Prove that a data loader continues exactly from its state after each of its batches.

    For each k, the state that a loader had after k batches is loaded into a fresh loader before
    it is iterated, and this one must give the same remaining batches, bit for bit. Going on
    must not change a state that was taken before. The state after the very last batch is left
    out: loaders disagree on whether it is the end of a pass or the beginning of the next. The
    global random generators are neither saved nor set.

    Source: the idea is that of `grain.python.testing` (google/grain).

    Args:
        make_loader: Returns a fresh loader that is iterable; `state_dict` and `load_state_dict`
            are its own, or its iterator's.
        steps: How many batches; None: all.

    Raises:
        AssertionError: A batch differs, is missing or is too much; the message names the first.

    Example:
        >>> class Numbers:
        ...     next = 1
        ...     def __iter__(self):
        ...         while self.next < 4:
        ...             self.next += 1
        ...             yield self.next - 1
        ...     def state_dict(self): return {"next": self.next}
        ...     def load_state_dict(self, state): self.next = state["next"]
        >>> assert_loader_resumes_at_every_step(Numbers)
        >>> Numbers.load_state_dict = lambda self, state: None
        >>> assert_loader_resumes_at_every_step(Numbers)
        Traceback (most recent call last):
        ...
        AssertionError: restored after batch 1: batch 2 is batch 1
    """
    batches, states = _uninterrupted(make_loader(), steps)
    for done, (state, kept) in enumerate(states[:-1], start=1):
        if _digest(state) != _digest(kept):
            raise AssertionError(f"the state after batch {done} was changed by going on")
        ours = _resumed(make_loader(), kept, None if steps is None else steps - done)
        _compare(batches, ours, done)


def _uninterrupted(loader: Any, steps: int | None) -> tuple[list[str], list[tuple[Any, Any]]]:
    """Return the digests of all batches, and after each the state and a copy of it."""
    iterator = iter(loader)
    owner = _owner(loader, iterator)
    batches, states = [], []
    for batch in islice(iterator, steps):
        batches.append(_digest(batch))
        state = owner.state_dict()
        states.append((state, copy.deepcopy(state)))
    if len(batches) < 2:
        raise AssertionError(f"nothing to resume: the loader gave {len(batches)} batches")
    return batches, states


def _resumed(loader: Any, state: Any, steps: int | None) -> list[str]:
    if hasattr(loader, "load_state_dict"):
        loader.load_state_dict(copy.deepcopy(state))
        iterator = iter(loader)
    else:
        iterator = iter(loader)
        _owner(loader, iterator).load_state_dict(copy.deepcopy(state))
    return [_digest(batch) for batch in islice(iterator, steps)]


def _owner(loader: Any, iterator: Iterator[Any]) -> Any:
    """Return which of the two has the state."""
    return loader if hasattr(loader, "state_dict") else iterator


def _compare(batches: Sequence[str], ours: Sequence[str], done: int) -> None:
    where = f"restored after batch {done}"
    for number, (expected, found) in enumerate(zip(batches[done:], ours, strict=False), done + 1):
        if expected != found:
            known = f"batch {batches.index(found) + 1}" if found in batches else "a new one"
            raise AssertionError(f"{where}: batch {number} is {known}")
    if len(batches) - done != len(ours):
        counts = f"expected {len(batches) - done}, found {len(ours)}"
        raise AssertionError(f"{where}: number of batches: {counts}")


def _digest(value: Any) -> str:
    from unbroken.recorder.digests import TensorDigester, batch_digest

    found = batch_digest(value, TensorDigester(sampled=False))
    return "" if found is None else str(found[0])


# An assertion for other projects' tests: a training script resumes exactly.


def assert_resumes_exactly(
    command: str | Path | Sequence[str],
    *arguments: str,
    resume_command: str | Sequence[str] | None = None,
    at: Sequence[int] = (),
    kills: int = 2,
    steps: int | None = None,
    seed: int = 0,
    timeout: float = 600.0,
    folder: str | Path | None = None,
    clean: Sequence[str] = (),
) -> CheckResult:
    """Prove that a training script, killed and started again, is the same run bit for bit.

    The script is run without a kill twice and with SIGKILLs once, as `unbroken check` does; see
    there for what is compared.

    Args:
        command: A Python script, or the words of a command; `{out}` in them is the output folder
            of a run.
        arguments: Words that follow.
        resume_command: What continues a killed run; None: the same.
        at: The steps after which to kill; empty: `kills` random ones.
        kills: How many random kills.
        steps: End each run after so many optimizer steps; None: at its own end.
        seed: Where the random steps come from.
        timeout: Seconds for each start of the script.
        folder: The working folder of the command; None: the current one.
        clean: What the script leaves there.

    Returns:
        What was found.

    Raises:
        AssertionError: It is not exact, or that could not be told; the message says why.
        ConfigError: The command cannot be started, or a value makes no sense.

    Example:
        >>> assert_resumes_exactly("no-such-script.py", kills=1)
        Traceback (most recent call last):
        ...
        unbroken.errors.ConfigError: no-such-script.py: no such script
    """
    here = Path.cwd() if folder is None else Path(folder)
    again = None if resume_command is None else _words(resume_command, here)
    request = CheckRequest(
        command=(*_words(command, here), *arguments),
        resume_command=again,
        at=tuple(at),
        kills=kills,
        steps=steps,
        seed=seed,
        timeout=timeout,
        folder=here,
        clean=tuple(clean),
    )
    result = check_script(request)
    if result.verdict.status is not Status.EXACT:
        raise AssertionError("\n".join((str(result.verdict), *result.verdict.evidence)))
    return result


def _words(command: str | Path | Sequence[str], folder: Path) -> tuple[str, ...]:
    """Return the words of a command; a script's name is one that is run by this Python."""
    if not isinstance(command, (str, Path)):
        return tuple(command)
    if isinstance(command, str) and not command.endswith(".py"):
        return tuple(shlex.split(command))
    if not (folder / command).is_file():
        raise ConfigError(str(command), "no such script")
    return sys.executable, str(command)
