"""What a user's subclass of a trainer does in a step: its code, and the settings that this uses."""

from __future__ import annotations

import torch

from unbroken.fingerprint.own_attributes import own_attributes
from unbroken.fingerprint.source_code import (
    functions_of,
    is_user_code,
    qualified_name,
    source_digest,
)
from unbroken.fingerprint.values import Plain, facts_of_items, names_used_by, values_around


def subclass_facts(thing: object, *, leave_out: frozenset[str]) -> dict[str, Plain]:
    """Return what the user's own classes of an object do, and the settings that they use for it.

    Attributes count as they are now: what training will have made of them is no setting.

    Args:
        thing: An object whose base class is a library's.
        leave_out: Methods that the training does not depend on.

    Example:
        >>> import ast
        >>> subclass_facts(ast.NodeVisitor(), leave_out=frozenset())  # all of it is a library's
        {'classes': [], 'source': {}, 'globals': {}, 'values': {}}
    """
    kinds = [one for one in type(thing).__mro__ if functions_of(one, leave_out)]
    named = {qualified_name(one): one for one in kinds}
    around = {name: values_around(one, leave_out) for name, one in named.items()}
    used = names_used_by(*kinds, leave_out=leave_out) if kinds else set()
    own = own_attributes(thing).items()
    settings = {n: value for n, value in own if n in used and _is_setting(value)}
    source: dict[str, Plain] = {n: source_digest(k, leave_out=leave_out) for n, k in named.items()}
    return {
        "classes": [*named],
        "source": source,
        "globals": {name: values for name, values in around.items() if values},
        "values": facts_of_items(settings, used=used),
    }


def _is_setting(value: object) -> bool:
    """Return whether a value is no object of a library, such as a writer, and no network."""
    if isinstance(value, torch.nn.Module):
        return next(value.parameters(), None) is None
    plain = (bool, int, float, str, list, tuple, set, dict, torch.Tensor, torch.dtype)
    return isinstance(value, plain) or callable(value) or is_user_code(type(value))
