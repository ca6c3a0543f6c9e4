"""An assertion for other projects' tests: a training script resumes exactly."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from unbroken.check import Answer, Question, Status, prove
from unbroken.errors import ConfigError


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
) -> Answer:
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
    question = Question(
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
    answer = prove(question)
    if answer.verdict.status is not Status.EXACT:
        raise AssertionError("\n".join((str(answer.verdict), *answer.verdict.evidence)))
    return answer


def _words(command: str | Path | Sequence[str], folder: Path) -> tuple[str, ...]:
    """Return the words of a command; a script's name is one that is run by this Python."""
    if not isinstance(command, (str, Path)):
        return tuple(command)
    if isinstance(command, str) and not command.endswith(".py"):
        return tuple(shlex.split(command))
    if not (folder / command).is_file():
        raise ConfigError(str(command), "no such script")
    return sys.executable, str(command)
