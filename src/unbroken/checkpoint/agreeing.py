"""What the ranks of a run must have in common before they resume."""

from __future__ import annotations

import sys
from typing import Any

from unbroken.checkpoint.environment import environment_facts
from unbroken.distributed import Group

_SOFTWARE = ("python", "torch", "numpy")


def agree_on_versions(group: Group) -> None:
    """Raise unless all ranks run the same versions of what all of them have imported.

    Args:
        group: The ranks.

    Raises:
        RankError: Naming the ranks with another version.

    Example:
        >>> from unbroken.distributed import Alone
        >>> agree_on_versions(Alone())
    """
    if group.world_size == 1:
        return
    own = {
        name: value
        for name, value in environment_facts().items()
        if name in _SOFTWARE or name.startswith("packages.")
    }
    own["unbroken"] = vars(sys.modules["unbroken"])["__version__"]  # imports point down
    ranks: Any = group.gather("the packages", sorted(own))
    shared = set(own).intersection(*ranks)
    group.agree("versions", {name: own[name] for name in sorted(shared)})
