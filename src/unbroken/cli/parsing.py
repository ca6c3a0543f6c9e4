"""From the words of a command line to the command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import tyro

from unbroken.cli.commands import COMMANDS, Check, Demo, Diff, Doctor, Ls, Plan, Show, Verify

_DESCRIPTION = (
    "A PyTorch training run that is killed at any moment and started again is the same run, "
    "bit for bit."
)


def parse_command(given: Sequence[str]) -> Check | Demo | Diff | Doctor | Ls | Plan | Show | Verify:
    """Return the command that the words ask for.

    Raises:
        SystemExit: With status 0 after `--help`, with 2 if the words ask for nothing known.

    Example:
        >>> parse_command(["verify", "runs/gpt2", "--step", "10"]).step
        10
    """
    classes = cast("dict[str, Any]", COMMANDS)
    own, command = _before_and_after_dashes(given)
    found = cast(
        "Check | Demo | Diff | Doctor | Ls | Plan | Show | Verify",
        tyro.extras.subcommand_cli_from_dict(
            classes, prog="unbroken", description=_DESCRIPTION, args=own
        ),
    )
    return replace(found, command=tuple(command)) if isinstance(found, Check) else found


def _before_and_after_dashes(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return our own words, and those of the command that `check` is to run."""
    words = list(given)
    if words[:1] != ["check"] or "--" not in words:
        return words, []
    dashes = words.index("--")
    return words[:dashes], words[dashes + 1 :]
