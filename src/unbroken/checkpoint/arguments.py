"""What a Checkpointer is given by keyword: mistakes are named, with what was meant."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from difflib import get_close_matches
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from unbroken.changes.compare import ResumePolicy
from unbroken.changes.differences import brief
from unbroken.data import has
from unbroken.errors import ConfigError
from unbroken.store import KeepPolicy

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_POLICY = ("allow", "skip", "exact_resume", "parts")
_OF_RESUME = ("resume", "resume_from_checkpoint")
_SHORT, _NEAR = 40, 0.6


def check_keywords(keep: object, policy: object) -> None:
    """Raise where a keyword got a value of another kind.

    Raises:
        ConfigError: With the value that was meant.
    """
    if keep is not None and not isinstance(keep, KeepPolicy):
        last = keep if isinstance(keep, int) else 3
        hint = f"keep=KeepPolicy(last={last}), from unbroken"
        raise ConfigError("keep", expected="a KeepPolicy", found=repr(keep), hint=hint)
    if policy is not None and not isinstance(policy, ResumePolicy):
        word = policy if policy in ("require", "prefer") else "require"
        hint = (
            f'policy=ResumePolicy(exact_resume="{word}") or policy=ResumePolicy(allow=["..."]), '
            "from unbroken"
        )
        raise ConfigError("policy", expected="a ResumePolicy", found=repr(policy), hint=hint)


def check_kinds(**given: object) -> None:
    """Raise where an argument is of another type than it must be.

    Args:
        given: Arguments of a Checkpointer, by name; None where it may be left out.

    Raises:
        ConfigError: With what was expected.
    """
    for name, value in given.items():
        expected, is_one, hint = _KINDS[name]
        if (value is None and name in _NEEDED) or not (value is None or is_one(value)):
            found = f"{type(value).__name__} {brief(repr(value), _SHORT)}"
            raise ConfigError(name, expected=expected, found=found, hint=hint)


def check_state(state: Mapping[str, object], taken: Collection[str]) -> None:
    """Raise where something in the state of a Trainer cannot be saved by its name.

    Args:
        state: As a Trainer takes it.
        taken: Names that have another meaning.

    Raises:
        ConfigError: With what to give instead.
    """
    check_kinds(state=state)
    for name, value in state.items():
        where = f"state[{name!r}]"
        if name in taken:
            raise ConfigError(where, "this name is taken: choose another")
        if _is_plain(value):
            raise ConfigError(where, "is no object to save", found=repr(value), hint=_IN_STATE)
        for path, one in _within(name, value):
            if _is_bare_loader(one):
                hint = "a Trainer that gets it as train_dataset knows its place, and saves that"
                what = f"a {type(one).__name__} does not know its place, so that it cannot be saved"
                raise ConfigError(f"state: {path}", what, hint=hint)


_IN_STATE = (
    "what training depends on is compared as settings={...}; a value that training changes belongs "
    "into an attribute of an object of your own"
)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _are_texts(value: object) -> bool:
    is_many = isinstance(value, Collection) and not isinstance(value, str | bytes)
    return is_many and all(isinstance(one, str) for one in value)  # type: ignore[attr-defined]


def _are_types(value: object) -> bool:
    if not isinstance(value, Collection):  # what gives them once is looked at when they are used
        return isinstance(value, Iterable)
    return all(isinstance(one, type) for one in value)


def _is_group(value: object) -> bool:
    return all(has(value, name) for name in ("rank", "world_size", "gather", "share", "agree"))


def _is_directory(value: object) -> bool:
    return isinstance(value, str | os.PathLike) or has(value, "describe")


def _are_callbacks(value: object) -> bool:
    if not isinstance(value, Collection):
        return False
    return all(has(one, "on_step_end") and not isinstance(one, type) for one in value)


_FUNCTION = ("a function", callable, None)
_MINUTES = ("a number", _is_number, None)
_NEEDED = ("directory", "callbacks", "types", "told", "clock", "wall_clock")
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool], str | None]] = {
    "directory": ("a path", _is_directory, "the run directory comes first, without a name"),
    "branch": ("a name", lambda value: isinstance(value, str), None),
    **dict.fromkeys(("save_minutes", "max_lost_minutes", "mtbf_hours"), _MINUTES),
    **dict.fromkeys(("clock", "wall_clock", "fingerprint", "examine", "tell"), _FUNCTION),
    "types": ("classes", _are_types, "types=[Name], the classes themselves"),
    "settings": (
        "a dict",
        lambda value: isinstance(value, Mapping),
        'groups of plain values: settings={"data": {"path": "..."}}',
    ),
    "state": ("a dict", lambda value: isinstance(value, Mapping), 'state={"name": object}'),
    "callbacks": ("callbacks", _are_callbacks, "callbacks=[MyCallback()]"),
    "told": ("names of objects", _are_texts, None),
    "per_rank": (
        "names of objects",
        _are_texts,
        'per_rank=["rng", "values"]; None: whatever differs',
    ),
    "group": ("the ranks", _is_group, "group=join(), from unbroken.distributed"),
}


def check_objects(objects: Mapping[str, object], keywords: Collection[str]) -> None:
    """Raise where an object to save is none: a keyword that was misspelt, a loader, a number.

    Args:
        objects: What was given by names that are no keywords.
        keywords: The keywords there are.

    Raises:
        ConfigError: With the nearest keyword, or what to give instead.
    """
    for name, value in objects.items():
        if _is_plain(value):
            what = "is neither an argument of a Checkpointer nor an object to save"
            raise ConfigError(_spelled(name, value), what, hint=_meant(name, value, keywords))
        for path, one in _within(name, value):
            _refuse_data(path, one)


def _is_plain(value: object) -> bool:
    """Return whether a value has no state: a number, a text, a list of these, a class."""
    if type(value) in (list, tuple, set, frozenset) and value:
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    is_part = isinstance(value, KeepPolicy | ResumePolicy | FunctionType | type)
    return isinstance(value, _PLAIN) or is_part


def _spelled(name: str, value: object) -> str:
    text = repr(value)
    return f"Checkpointer({name}={text if len(text) <= _SHORT else '...'})"


def _meant(name: str, value: object, keywords: Collection[str]) -> str:
    if value is None:
        return "leave it out where there is none"
    if name in _OF_POLICY:
        return f"policy=ResumePolicy({name}={value!r}), from unbroken"
    if name in _OF_RESUME:
        return f"say so when you resume: resume({value!r})"
    if name in ("output_dir", "folder", "path", "run_dir"):
        return "the run directory is the first argument, without a name"
    near = get_close_matches(name, keywords, n=1, cutoff=_NEAR)
    if near:
        return f"did you mean {near[0]}?"
    return (
        "what training depends on is compared as settings={...}; a value that training changes is "
        f"saved by save(step, {{{name!r}: ...}}), and is in `values` after a resume"
    )


def _within(path: str, value: object) -> Iterator[tuple[str, object]]:
    if type(value) in (list, tuple, dict):
        held: Any = value
        for key, item in held.items() if isinstance(held, dict) else enumerate(held):
            yield from _within(f"{path}.{key}", item)
    else:
        yield path, value


def _refuse_data(path: str, value: object) -> None:
    if _is_bare_loader(value):
        kind = type(value).__name__
        raise ConfigError(
            path,
            f"a {kind} does not know its place, so that it cannot be saved",
            hint="data = batch_source(it, seed=0, global_batch_size=...), from unbroken, knows it: "
            "Checkpointer(..., data=data); train on `batch.data` for each batch of data.from_(), "
            "and call data.used(batch)",
        )


def _is_bare_loader(value: object) -> bool:
    has_state = has(value, "state_dict") and has(value, "load_state_dict")
    return isinstance(value, DataLoader) and not has_state


def tell_line(line: str) -> None:
    """Print a line at once: whoever is killed next has said it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def loggable(value: object, path: str) -> Any:
    """Return a value of a record of statistics as JSON has it.

    Raises:
        ConfigError: It is neither a number nor a text, nor a list or a mapping of these.

    Example:
        >>> loggable({"loss": torch.tensor(0.5), "rates": (np.float32(1.0),)}, "record")
        {'loss': 0.5, 'rates': [1.0]}
    """
    if isinstance(value, np.generic) or (
        isinstance(value, torch.Tensor | np.ndarray) and _count(value) == 1
    ):
        return loggable(value.item(), path)
    if isinstance(value, Mapping):
        return {str(name): loggable(one, f"{path}.{name}") for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [loggable(one, f"{path}.{place}") for place, one in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    found, hint = f"a {type(value).__name__}", "give numbers, texts, and lists and dicts of these"
    if isinstance(value, torch.Tensor | np.ndarray):
        found = f"{found} of shape {tuple(value.shape)}"
        hint = "give one number, such as its mean, or a list: value.tolist()"
    raise ConfigError(f"log({path!r})", expected="a number or a text", found=found, hint=hint)


def _count(array: torch.Tensor | np.ndarray[Any, Any]) -> int:
    return array.numel() if isinstance(array, torch.Tensor) else array.size
