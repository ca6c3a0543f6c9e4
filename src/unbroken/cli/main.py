"""The command `unbroken`: choose what to do, and turn errors into exit statuses.

Nothing heavy is imported before it is known to be needed: `ls`, `show`, `verify`, `diff` and
`--help` load neither torch nor numpy.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from unbroken.errors import UnbrokenError, printable, spelled

_FAILED = 1
_TROUBLE_OF_DIFF = 2  # as of diff(1), whose 1 says that the two differ
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; errors are one sentence, no traceback.

    The status is 0 if all is well, 2 for a wrong command line or configuration, 75 for a
    training that was asked to stop and saved, 130 after Ctrl-C, and else the `exit_code` of
    the error's class in `unbroken.errors`. Of `diff` it is 0, 1 if the two differ, else 2.

    Args:
        arguments: The words after `unbroken`; None: those of this process.

    Raises:
        SystemExit: For `--help`, for a wrong command line, and when a training was stopped.

    Example:
        >>> main(["ls", "no-such-folder"])
        5
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    _write_what_cannot_be_encoded_as_escapes()
    try:
        status = _run(given)
        sys.stdout.flush()
    except UnbrokenError as error:
        _print_error(error)
        return _failure(given, error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader went away. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except OSError as error:  # what the disk says: no permission, no room
        sys.stderr.write(printable(f"{type(error).__name__}: {error}\n"))
        return _failure(given, _FAILED)
    return status


def _run(given: list[str]) -> int:
    if given[:1] == ["train"]:
        return _train()(given[1:])
    if given == ["--version"]:
        from unbroken import __version__

        sys.stdout.write(f"unbroken {__version__}\n")
        return 0
    from unbroken.cli.commands import parse_command

    return parse_command(given).run()


def _train() -> Callable[[Sequence[str]], int]:
    """Import PyTorch; the garbage collector would look at all of it again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        from unbroken.language_model.train import train
    finally:
        if was_on:
            gc.enable()
    return train


def _failure(given: Sequence[str], status: int) -> int:
    return _TROUBLE_OF_DIFF if given[:1] == ["diff"] else status


def _print_error(error: UnbrokenError) -> None:
    error.respell(partial(spelled, place="command"))
    lines = [f"{type(error).__name__}: {error}"]
    if error.hint is not None:
        lines += [f"  {line}" for line in error.hint.split("\n")]
    sys.stderr.write(printable("\n".join(lines)) + "\n")


def _write_what_cannot_be_encoded_as_escapes() -> None:
    """Let a terminal or a pipe that is not UTF-8 have a name all the same."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
