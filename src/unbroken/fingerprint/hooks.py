"""Hooks that a user has put on modules, parameters and optimizers: they run in every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unbroken.fingerprint.asking import asked
from unbroken.fingerprint.source import called_by

ON_MODULES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
ON_PARAMETERS = ("_backward_hooks", "_post_accumulate_grad_hooks")
ON_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


_NOT_THE_USERS = ("unbroken.", "torch.distributed.")  # how ranks share a model is no part of it


def hooks_on(thing: object, names: Iterable[str]) -> dict[str, list[Any]]:
    """Return the hooks on a thing by the name of their kind, but for those of FSDP2 and of ours.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(1, 1)
        >>> handle = layer.register_forward_hook(print)
        >>> hooks_on(layer, ON_MODULES)
        {'_forward_hooks': [<built-in function print>]}
    """
    found = {name: _own_hooks(asked(thing, name)) for name in names}
    return {name: hooks for name, hooks in found.items() if hooks}


def _own_hooks(hooks: Any) -> list[Any]:
    each = hooks.values() if isinstance(hooks, dict) else ()
    return [hook for hook in each if not _is_not_the_users(hook)]


def _is_not_the_users(hook: Any) -> bool:
    function, _ = called_by(hook)
    return str(asked(function, "__module__")).startswith(_NOT_THE_USERS)
