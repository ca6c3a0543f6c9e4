"""Every error that unbroken raises on purpose, grouped by what a caller would do about it.

    UnbrokenError
    ├── ConfigError (ValueError)              fix the configuration or the call
    ├── DataError (ValueError)                fix the data set or the loader
    ├── CaptureError (TypeError)              take out, or wrap, the value that cannot be stored
    ├── RunDirectoryError (OSError)           choose another run directory, or repair this one
    │   └── LockHeldError                     stop the other process first
    ├── SaveError (OSError)                   make room or repair the disk; nothing saved is lost
    ├── OutOfMemoryError (RuntimeError)       choose a smaller micro-batch
    ├── StepVerificationError (RuntimeError)  look at the machine: a bit flipped, or a kernel varies
    ├── RankError (RuntimeError)              see the rank that it names: it failed or disagrees
    │   └── RankTimeoutError (TimeoutError)   see the rank that it names: it did not answer
    └── CheckpointError
        ├── CheckpointNotFoundError (FileNotFoundError)   name another checkpoint
        ├── CorruptCheckpointError            use another checkpoint; this one is damaged
        ├── NewerFormatError                  upgrade unbroken
        ├── StateMismatchError (ValueError)   make the model, optimizer, ... fit the checkpoint
        └── DifferenceError (ValueError)      take a changed setting back, or name it

Each message reads *where: what: expected X, found Y*; what to do about it is the hint,
kept as a note (PEP 678) so that a traceback shows it. The facts are attributes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

# What a terminal obeys or turns around, and what no encoding has: control characters but tab and
# newline, marks of direction, separators of lines, and halves of pairs (undecodable bytes).
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""Return a text that is safe to show, whoever wrote it: what a terminal would obey is escaped.

    The escapes are those of JSON, so that a JSON document stays the same document.

    Example:
        >>> printable("a\x1b[2J name\udcff")
        'a\\u001b[2J name\\udcff'
    """
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class UnbrokenError(Exception):
    """The root of all errors that unbroken raises on purpose.

    Args:
        where: The place: a checkpoint, a file, a field of the configuration.
        what: What is wrong there.
        expected: The value that would have been right, if there is one.
        found: The value that is there, if there is one.
        hint: What to do about it; shown under the message.

    Attributes:
        exit_code: The exit status of the command line for this class of error.

    Example:
        >>> print(ConfigError("learning_rate", "must be positive", found=-1.0))
        learning_rate: must be positive: found -1.0
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        where: str,
        what: str = "",
        *,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.where = where
        self.what = what
        self.expected = expected
        self.found = found
        self.hint = hint
        self.message = _sentence(where, what, expected, found)
        super().__init__(self.message)
        if hint is not None:
            self.add_note(printable(hint))

    def respell(self, spell: Callable[[str], str]) -> None:
        """Spell what is said as it is spelled where the caller is: see `spelled`."""
        self.what, self.message = spell(self.what), spell(self.message)
        self.hint = None if self.hint is None else spell(self.hint)
        self.args = (self.message,)
        self.__notes__ = [spell(note) for note in getattr(self, "__notes__", [])]

    def __str__(self) -> str:
        """Return *where: what: expected X, found Y*, without the hint."""
        return self.message


Place = Literal["loop", "command", "host"]
"""Where settings are spelled otherwise than in our own Trainer: in a loop around a Checkpointer, in
a command line, in the Trainer of another library, which has not all of them."""

_NAMES = re.compile(r"""(?<!ResumePolicy\()\b(allow|skip)=\[([^\]]*)\]""")
_WHICH = re.compile(r"""resume_from_checkpoint=(?:"([^"]*)"|'([^']*)')""")
_POLICIES = (
    (re.compile(r"""(?<!\()\bsave_mode=(['"]\w+['"])"""), r"save=SavePolicy(mode=\1)"),
    (re.compile(r"""(?<!\()\bread_from=(['"]\w+['"])"""), r"ranks=RankPolicy(read_from=\1)"),
)
_OF_A_TRAINER = re.compile(
    r"""(?<!\()\b(save_mode|read_from|save_steps|micro_batch_size|eval_batch_size)=(['"]?)(\w+)\2"""
)
_SWITCHED_ON = re.compile(r"(?<!\()\b(gradient_checkpointing|full_determinism)=True")
_TYPES = re.compile(r"pass the class itself: types=\[([^\]]*)\]")
_NO_TYPES = r"let what is saved hold plain values in place of \1"
_UNSEEN = re.compile(r"""a folder that only rank 0 sees: read_from=['"]rank0['"]""")
_SEEN = "put the run directory where all ranks see it"
_STRICT = re.compile(r"""(?<!ResumePolicy\()\bexact_resume=['"](\w+)['"]""")


def spelled(text: str, place: Place) -> str:
    """Return a text in which the settings of a Trainer are spelled as another place takes them.

    Example:
        >>> hint = "go on with the new value: allow=['seed']"
        >>> spelled(hint, "loop")
        "go on with the new value: resume=ResumePolicy(allow=['seed'])"
        >>> spelled(hint, "command")
        'go on with the new value: --allow seed'
    """
    if place == "loop":
        text = _NAMES.sub(r"resume=ResumePolicy(\1=[\2])", text)
        for pattern, policy in _POLICIES:
            text = pattern.sub(policy, text)
        text = _STRICT.sub(r"resume=ResumePolicy(exact_resume='\1')", text)
        return _WHICH.sub(lambda found: f'resume("{found[1] or found[2]}")', text)
    text = _TYPES.sub(_NO_TYPES, text)
    if place == "host":
        return _UNSEEN.sub(_SEEN, text)
    text = _OF_A_TRAINER.sub(lambda found: f"{_option(found[1])} {found[3]}", text)
    text = _SWITCHED_ON.sub(lambda found: _option(found[1]), text)
    text = _NAMES.sub(lambda found: f"--{found[1]} {_words(found[2])}", text)
    text = _STRICT.sub(r"--exact-resume \1", text)
    return _WHICH.sub(lambda found: f"--resume {found[1] or found[2]}", text)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _words(names: str) -> str:
    words = (name.strip().strip("\"'") for name in names.split(","))
    return " ".join(f"'{word}'" if "*" in word else word for word in words)


def _sentence(where: str, what: str, expected: object, found: object) -> str:
    values = []
    if expected is not None:
        values.append(f"expected {expected}")
    if found is not None:
        values.append(f"found {found}")
    return printable(": ".join(part for part in (where, what, ", ".join(values)) if part))


def one_of(options: Iterable[object]) -> str:
    """Return choices as the text of what was expected.

    Example:
        >>> print(ConfigError("read_from", expected=one_of(["all", "rank0"]), found="rank1"))
        read_from: expected one of: all, rank0, found rank1
    """
    return f"one of: {', '.join(map(str, options))}"


class ConfigError(UnbrokenError, ValueError):
    """A setting or an argument is wrong; nothing was started."""

    exit_code: ClassVar[int] = 2


class DataError(UnbrokenError, ValueError):
    """The data set or the loader cannot give what training needs."""

    exit_code: ClassVar[int] = 3


class CaptureError(UnbrokenError, TypeError):
    """A value of the training state cannot be stored; `where` is its path."""

    exit_code: ClassVar[int] = 4


class RunDirectoryError(UnbrokenError, OSError):
    """The run directory is unusable: something else lives there, or it is not writable."""

    exit_code: ClassVar[int] = 5


class LockHeldError(RunDirectoryError):
    """Another live process works in the run directory; `found` names it."""

    exit_code: ClassVar[int] = 6


class SaveError(UnbrokenError, OSError):
    """A checkpoint could not be stored; all earlier checkpoints are as they were."""

    exit_code: ClassVar[int] = 7


class OutOfMemoryError(UnbrokenError, RuntimeError):
    """A step does not fit into the memory of the device; the run is as it was before the step."""

    exit_code: ClassVar[int] = 14


class StepVerificationError(UnbrokenError, RuntimeError):
    """A step gave other bits when it was run again, or memory changed that nothing wrote.

    Nothing of the step was saved; all earlier checkpoints are as they were.

    Args:
        step: The number of the step.
        tensor: What differs first: a module, a parameter or a moment of the optimizer.
        rank: The rank where it was found.
    """

    exit_code: ClassVar[int] = 17

    def __init__(
        self,
        where: str,
        what: str = "",
        *,
        step: int = 0,
        tensor: str = "",
        rank: int = 0,
        **more: Any,
    ) -> None:
        self.step, self.tensor, self.rank = step, tensor, rank
        super().__init__(where, what, **more)


class RankError(UnbrokenError, RuntimeError):
    """Another rank failed or disagrees; see the rank that it names.

    Args:
        ranks: The ranks to look at, in order; empty where nobody can tell.
    """

    exit_code: ClassVar[int] = 15

    def __init__(
        self, where: str, what: str = "", *, ranks: tuple[int, ...] = (), **more: Any
    ) -> None:
        self.ranks = ranks
        super().__init__(where, what, **more)


class RankTimeoutError(RankError, TimeoutError):
    """Another rank did not answer in time: it is slow, stopped or gone."""

    exit_code: ClassVar[int] = 16


class CheckpointError(UnbrokenError):
    """A checkpoint cannot be used."""

    exit_code: ClassVar[int] = 8


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No such checkpoint exists, or none that is intact."""

    exit_code: ClassVar[int] = 9


class CorruptCheckpointError(CheckpointError):
    """The bytes of a checkpoint are not those that its manifest promises."""

    exit_code: ClassVar[int] = 10


class NewerFormatError(CheckpointError):
    """The checkpoint was written in a format that is newer than this version reads."""

    exit_code: ClassVar[int] = 11


class StateMismatchError(CheckpointError, ValueError):
    """The checkpoint does not fit the live model, optimizer or other object; all is as it was."""

    exit_code: ClassVar[int] = 12


class DifferenceError(CheckpointError, ValueError):
    """A setting that training depends on is not what it was; nothing was changed.

    Args:
        differences: All that were found, the gravest first.
    """

    exit_code: ClassVar[int] = 13

    def __init__(
        self, where: str, what: str = "", *, differences: tuple[object, ...] = (), **more: Any
    ) -> None:
        self.differences = differences
        super().__init__(where, what, **more)
