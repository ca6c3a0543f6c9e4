"""From the words of a command line to the command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import tyro

from unbroken.cli.commands import COMMANDS, Demo, Diff, Doctor, Ls, Show, Verify

_DESCRIPTION = (
    "A PyTorch training run that is killed at any moment and started again is the same run, "
    "bit for bit."
)


def parse_command(given: Sequence[str]) -> Demo | Diff | Doctor | Ls | Show | Verify:
    """Return the command that the words ask for.

    Raises:
        SystemExit: With status 0 after `--help`, with 2 if the words ask for nothing known.

    Example:
        >>> parse_command(["verify", "runs/gpt2", "--step", "10"]).step
        10
    """
    classes = cast("dict[str, Any]", COMMANDS)
    return cast(
        "Demo | Diff | Doctor | Ls | Show | Verify",
        tyro.extras.subcommand_cli_from_dict(
            classes, prog="unbroken", description=_DESCRIPTION, args=list(given)
        ),
    )
