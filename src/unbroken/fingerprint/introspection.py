"""Ask objects of users for attributes and results: whatever their code raises, nothing fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MemberDescriptorType
from typing import Any

from unbroken.data import has


@dataclass(frozen=True)
class Failed:
    """What a call raised."""

    error: Exception


def try_call(call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a user's code; return its result, or `Failed` with what it raised."""
    try:
        return call(*arguments)
    except Exception as error:  # users' code runs here, and a fact must never end a run
        return Failed(error)


def safe_getattr(thing: object, name: str) -> Any:
    """Return an attribute, or None where there is none or its property raises.

    Of an object that answers any name, only what it or its class holds counts.
    """
    found = try_call(getattr, thing, name, None)
    made_up = found is not None and try_call(has, thing, name) is not True
    return None if made_up or isinstance(found, Failed) else found


def safe_call(thing: object, method: str) -> Any:
    """Return what a method without arguments returns, or None where there is none or it raises."""
    call = safe_getattr(thing, method)
    found = try_call(call) if callable(call) else None
    return None if isinstance(found, Failed) else found


def attributes_of(thing: object) -> dict[str, Any]:
    """Return the attributes in an object itself, slots too, without running any code of it."""
    kind: Any = type(thing)
    slots = {name: try_call(member.__get__, thing) for name, member in _slots(kind)}
    found = {name: value for name, value in slots.items() if not isinstance(value, Failed)}
    own = try_call(object.__getattribute__, thing, "__dict__")
    return {**found, **own} if isinstance(own, dict) else found


@functools.lru_cache(maxsize=512)
def _slots(owner: Any) -> list[tuple[str, MemberDescriptorType]]:
    members = (item for base in owner.__mro__ for item in vars(base).items())
    return [(name, one) for name, one in members if isinstance(one, MemberDescriptorType)]
