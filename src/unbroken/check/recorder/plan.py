"""What the recorder is to do in one launch of the script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

Digests = Literal["auto", "full", "sampled"]


@dataclass(frozen=True)
class Plan:
    """The recorder's orders; a step is one call of `optimizer.step()` by the outermost optimizer.

    Attributes:
        folder: Where each process writes its recording.
        digests: Every byte ("full"), blocks of large tensors ("sampled"), or by the size of
            the model ("auto").
        kill_after: The step of the run after which the process and its launchers are killed.
        stop_after: The step of the run after which the process ends with status 0.
        states: Which step a state is after, by the keys of `state_keys`: from it a resumed
            process knows which step of the run its first one is.
        parent: The process that launched the script; it and what is above are never killed.
    """

    folder: str
    digests: Digests = "auto"
    kill_after: int | None = None
    stop_after: int | None = None
    states: Mapping[str, int] = field(default_factory=dict)
    parent: int = 0

    def write(self, path: Path) -> None:
        """Write the plan for `read`."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Plan:
        """Return the plan that stands in a file."""
        return cls(**json.loads(Path(path).read_text()))


def state_keys(params: str, moments: str, counts: str) -> tuple[str, str]:
    """Return the names of a state: by all its parts, and by its parameters alone.

    Example:
        >>> state_keys("a", "b", "c")
        ('a/b/c', 'a')
    """
    return f"{params}/{moments}/{counts}", params
