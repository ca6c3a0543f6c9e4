"""`unbroken check`: whether a training script resumes exactly, told as a story or as JSON."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from unbroken.check import Answer, Culprit, Question, Status, Verdict, prove
from unbroken.cli.commands import Check
from unbroken.cli.tables import make_console, print_json
from unbroken.errors import ConfigError

_STYLES = {Status.EXACT: "bold green", Status.NOT_EXACT: "bold red", Status.UNKNOWN: "bold yellow"}


def question_of(asked: Check) -> Question:
    """Return what the words of the command line ask.

    Raises:
        ConfigError: They ask for what cannot be.
    """
    again = None if asked.resume_command is None else tuple(shlex.split(asked.resume_command))
    return Question(
        command=asked.command,
        resume_command=again,
        steps=asked.steps,
        at=_steps(asked.at),
        kills=asked.kills,
        seed=asked.seed,
        clean=asked.clean,
        timeout=asked.timeout,
        digests=asked.digests,
        keep=None if asked.keep is None else Path(asked.keep),
    )


def _steps(text: str | None) -> tuple[int, ...]:
    try:
        return () if text is None else tuple(int(step) for step in text.split(","))
    except ValueError:
        raise ConfigError("--at", expected="steps such as 7 or 7,12", found=text) from None


def print_check(question: Question, *, as_json: bool) -> int:
    """Check a script and print what was found; return 0 exact, 1 not exact, 2 could not tell.

    Raises:
        ConfigError: The question cannot be asked, or the command cannot be started.
    """
    if as_json:
        answer = prove(question)
        print_json(_answer_json(answer))
    else:
        console = make_console()
        answer = prove(question, lambda line: console.print(line))
        _print_answer(console, answer)
    return answer.verdict.status.exit_code


def _print_answer(console: Console, answer: Answer) -> None:
    console.print()
    is_one = len(answer.kills) < 2
    for after, verdict in answer.kills if not is_one else ():
        console.print(f"Killed after step {after}")
        _print_verdict(console, verdict)
    if is_one:
        _print_verdict(console, answer.verdict)
    else:
        status = answer.verdict.status
        console.print(f"In all: {status.value.upper()}", style=_STYLES[status])
    if answer.overhead is not None:
        seconds = f"{answer.seconds:.0f} s in all"
        console.print(f"The recorder took {answer.overhead:.1%} of a step; {seconds}.")


def _print_verdict(console: Console, verdict: Verdict) -> None:
    status = verdict.status
    head = Text(status.value.upper(), style=_STYLES[status])
    if verdict.culprit is not Culprit.NONE:
        head.append(f"  {verdict.culprit}", style="bold")
    where = [f"step {verdict.step}"] if verdict.step is not None else []
    where += [f"rank {verdict.rank}"] if verdict.rank is not None else []
    if where and status is not Status.EXACT:
        head.append(f"  at {', '.join(where)}", style="default")
    console.print(head)
    for line in (verdict.words, *verdict.evidence):
        console.print(_indented(line))
    if verdict.also:
        console.print(_indented(f"also: {', '.join(verdict.also)}"))


def _indented(line: str) -> Padding:
    return Padding(line, (0, 0, 0, 2), expand=False)


def _answer_json(answer: Answer) -> dict[str, Any]:
    return {
        "verdict": _verdict_json(answer.verdict),
        "kills": [{"after": after, **_verdict_json(one)} for after, one in answer.kills],
        "steps": answer.steps,
        "ranks": answer.ranks,
        "overhead": answer.overhead,
        "seconds": round(answer.seconds, 3),
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {
        "status": verdict.status.value,
        "culprit": verdict.culprit.value,
        "words": verdict.words,
        "evidence": list(verdict.evidence),
        "step": verdict.step,
        "rank": verdict.rank,
        "also": [one.value for one in verdict.also],
    }
