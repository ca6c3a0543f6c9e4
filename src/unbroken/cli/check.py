"""`unbroken check`: whether a training script resumes exactly, in words or as JSON."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from unbroken.check import CheckRequest, CheckResult, Culprit, Status, Verdict, check_script
from unbroken.cli.tables import make_console, print_json

_STYLES = {Status.EXACT: "bold green", Status.NOT_EXACT: "bold red", Status.UNKNOWN: "bold yellow"}


def print_check(request: CheckRequest, *, as_json: bool) -> int:
    """Check a script and print what was found; return 0 exact, 1 not exact, 2 could not tell.

    Raises:
        ConfigError: The request cannot be asked, or the command cannot be started.
    """
    if as_json:
        result = check_script(request)
        print_json(_result_json(result))
    else:
        console = make_console()
        result = check_script(request, lambda line: console.print(line))
        _print_result(console, result)
    return result.verdict.status.exit_code


def _print_result(console: Console, result: CheckResult) -> None:
    console.print()
    is_one = len(result.kills) < 2
    for after, verdict in result.kills if not is_one else ():
        console.print(f"Killed after step {after}")
        _print_verdict(console, verdict)
    if is_one:
        _print_verdict(console, result.verdict)
    else:
        status = result.verdict.status
        console.print(f"In all: {status.value.upper()}", style=_STYLES[status])
    if result.overhead is not None:
        seconds = f"{result.seconds:.0f} s in all"
        console.print(f"The recorder took {result.overhead:.1%} of a step; {seconds}.")


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


def _result_json(result: CheckResult) -> dict[str, Any]:
    return {
        "verdict": _verdict_json(result.verdict),
        "kills": [{"after": after, **_verdict_json(one)} for after, one in result.kills],
        "steps": result.steps,
        "ranks": result.ranks,
        "overhead": result.overhead,
        "seconds": round(result.seconds, 3),
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
