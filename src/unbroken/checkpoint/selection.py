"""What `resume_from_checkpoint` may say, read into one value."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from unbroken.errors import ConfigError

ResumeFrom = bool | int | str | os.PathLike[str] | None
"""What the user may give: see `Selection.parse`."""

_WORDS: dict[str, Literal["auto", "must", "never", "best"]] = {
    "auto": "auto",
    "latest": "must",
    "last": "must",
    "must": "must",
    "true": "must",
    "never": "never",
    "false": "never",
    "best": "best",
}


@dataclass(frozen=True)
class Selection:
    """Which checkpoint to resume from.

    Attributes:
        kind: "auto": the newest intact one, or a fresh start when there is none;
            "must": the newest intact one, or an error; "never": a fresh start;
            "best": the one with the best metric; "step": `step`; "path": `path`;
            "begun": the newest intact one of a run that began in `path`.
        step: The step asked for, with kind "step".
        path: The checkpoint folder asked for, with kind "path" and "begun".
    """

    kind: Literal["auto", "must", "never", "best", "step", "path", "begun"]
    step: int | None = None
    path: Path | None = None

    @classmethod
    def parse(cls, value: ResumeFrom | Selection) -> Selection:
        """Read what the user gave.

        Args:
            value: "auto" or None; True, "must", "latest" or "last"; False or "never"; "best";
                a step number (1200 or "1200"); the path of a checkpoint folder.

        Raises:
            ConfigError: If `value` is none of these.

        Example:
            >>> Selection.parse("latest").kind, Selection.parse(1200).step
            ('must', 1200)
        """
        if isinstance(value, Selection):
            return value
        if value is None:
            return cls("auto")
        if isinstance(value, bool):
            return cls("must" if value else "never")
        if isinstance(value, int):
            return cls("step", step=_positive(value))
        if isinstance(value, os.PathLike):
            return cls("path", path=Path(value))
        return cls._of_text(value)

    @classmethod
    def _of_text(cls, text: object) -> Selection:
        if not isinstance(text, str) or not text:
            raise ConfigError("resume_from_checkpoint", expected=_CHOICES, found=repr(text))
        word = _WORDS.get(text.lower())
        if word is not None:
            return cls(word)
        if text.lstrip("-").isdecimal():
            return cls("step", step=_positive(int(text)))
        return cls("path", path=Path(text))


_CHOICES = '"auto", "must", "never", "best", a step number or a checkpoint folder'


def _positive(step: int) -> int:
    if step < 0:
        raise ConfigError("resume_from_checkpoint", "a step is never negative", found=step)
    return step
