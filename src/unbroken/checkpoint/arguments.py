"""What a Checkpointer is given by keyword: mistakes are named, with what was meant."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from types import FunctionType
from typing import Any, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader

from unbroken.changes.compare import DifferenceFilter, ResumePolicy
from unbroken.changes.differences import brief
from unbroken.checkpoint.cadence import SavePolicy, SaveSteps
from unbroken.checkpoint.resume.readers import ReadFrom
from unbroken.distributed import Group, SingleProcess
from unbroken.errors import ConfigError, one_of
from unbroken.introspection import has
from unbroken.store import KeepPolicy

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_POLICY = ("allow", "skip", "exact_resume", "parts")
_OF_SAVE = {
    **{name: name for name in ("max_lost_minutes", "mtbf_hours")},
    "save_minutes": "minutes",
    "save_mode": "mode",
}
_OF_RANKS = ("group", "read_from", "per_rank")
_OF_FACTS = {"fingerprint": "more", "examine": "filter", "told": "made_by_settings"}
_OF_CLOCK = ("wall_clock",)
_OF_LOOPS = ("batch_size", "accumulate", "until")
_IN_POLICIES = (*_OF_SAVE, *_OF_RANKS, *_OF_FACTS, *_OF_CLOCK, "policy")
_SHORT, _NEAR = 40, 0.6


@dataclass(frozen=True)
class RankPolicy:
    """The ranks that train the same model, and which of them reads and stores what.

    Args:
        group: The ranks, each calling every method. Each stores its share of a checkpoint, and
            rank 0 commits. None: this process alone.
        read_from: "all": every rank reads what it needs, and they divide the verification;
            "rank0": rank 0 reads and sends each tensor to the others, which need not see the
            run directory; it also stores all, so that no tensor may be sharded.
        per_rank: Objects saved separately by every rank ("rng" and "values" among them). All other
            objects must be identical on all ranks. None: whatever differs when it is saved.
        may_differ: Objects that every rank saves separately where they differ, besides those that
            `per_rank` names. On more ranks, new ones begin with rank 0's.
    """

    group: Group | None = None
    read_from: ReadFrom = "all"
    per_rank: Collection[str] | None = None
    may_differ: Collection[str] = ()

    def __post_init__(self) -> None:
        check_kinds(group=self.group, per_rank=self.per_rank, may_differ=self.may_differ)
        if self.read_from not in get_args(ReadFrom):
            expected = one_of(get_args(ReadFrom))
            raise ConfigError("read_from", expected=expected, found=repr(self.read_from))

    @classmethod
    def of(cls, ranks: RankPolicy | Group | None) -> RankPolicy:
        """Return what is given, or the policy of a group that is given alone."""
        return ranks if isinstance(ranks, RankPolicy) else cls(ranks)

    @property
    def given_group(self) -> Group:
        """The ranks; this process alone where none are given."""
        return SingleProcess() if self.group is None else self.group


@dataclass(frozen=True)
class RunFacts:
    """What a run depends on, to be compared on resume, besides the objects and the code.

    Args:
        settings: Groups of plain values: {"data": {"path": ...}}.
        more: Returns more groups of facts; called once, before a resume.
        filter: Called with the facts of a checkpoint and the differences found, before anything
            is loaded: returns all that matter, or raises to refuse the checkpoint.
        made_by_settings: Names of objects whose hyperparameters are compared by this already.
        check_values: Called with the values of a checkpoint, before anything is loaded: raises
            CorruptCheckpointError where they are none that the run can have saved.
        other_objects: Returns objects that training uses besides the registered ones, by name:
            callbacks, a trainer. What training makes of their attributes is saved and restored.
            What is of data stands under "data" and "eval_data".
        one_data_set: Whether all ranks are given the same data, and share them out.
        reads_ahead: Whether batches are read before they are used.
        is_complete: Whether the objects and these facts are all that training depends on. Then
            nothing else is looked for, and the caller tells what a resume finds.
    """

    settings: Mapping[str, Any] | None = None
    more: Callable[[], Mapping[str, Any]] | None = None
    filter: DifferenceFilter | None = None
    made_by_settings: Collection[str] = ()
    check_values: Callable[[Any], None] | None = None
    other_objects: Callable[[], Mapping[str, object]] = dict
    one_data_set: bool = False
    reads_ahead: bool = False
    is_complete: bool = False

    def __post_init__(self) -> None:
        check_kinds(settings=self.settings, more=self.more, filter=self.filter)
        check_kinds(made_by_settings=self.made_by_settings, other_objects=self.other_objects)

    @classmethod
    def of(cls, facts: RunFacts | Mapping[str, Any] | None) -> RunFacts:
        """Return what is given, or the facts that are settings alone."""
        return facts if isinstance(facts, RunFacts) else cls(facts)


@dataclass(frozen=True)
class Clock:
    """The clocks that a run goes by.

    Args:
        monotonic: Seconds that never go back.
        wall: Seconds since 1970, for the dates in manifests.
    """

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        check_kinds(clock=self.monotonic, wall_clock=self.wall)


def save_policy_of(save: SavePolicy | None, save_steps: SaveSteps) -> SavePolicy:
    """Return the policy of saves that two keywords give.

    Raises:
        ConfigError: They contradict each other, or a value is of another kind.
    """
    policy = SavePolicy() if save is None else save
    if save_steps is not None:
        if policy.steps is not None:
            found = f"save_steps={save_steps!r} and {policy.steps!r} in save"
            raise ConfigError("save_steps", "is given twice", found=found)
        policy = replace(policy, steps=save_steps)
    check_kinds(save_minutes=policy.minutes, max_lost_minutes=policy.max_lost_minutes)
    check_kinds(mtbf_hours=policy.mtbf_hours, layout=policy.layout)
    return policy


def check_keywords(save: object, keep: object, resume: object, clock: object) -> None:
    """Raise where a keyword got a value of another kind.

    Raises:
        ConfigError: With the value that was meant.
    """
    if save is not None and not isinstance(save, SavePolicy):
        hint = f"save=SavePolicy(steps={save!r}), from unbroken"
        raise ConfigError("save", expected="a SavePolicy", found=repr(save), hint=hint)
    if clock is not None and not isinstance(clock, Clock):
        hint = "clock=Clock(monotonic=..., wall=...), from unbroken.checkpoint"
        raise ConfigError("clock", expected="a Clock", found=repr(clock), hint=hint)
    if keep is not None and not isinstance(keep, KeepPolicy):
        last = keep if isinstance(keep, int) else 3
        hint = f"keep=KeepPolicy(last={last}), from unbroken"
        raise ConfigError("keep", expected="a KeepPolicy", found=repr(keep), hint=hint)
    if resume is not None and not isinstance(resume, ResumePolicy):
        hint = f"say so when you resume: resume({resume!r})"
        if resume in ("require", "prefer"):
            hint = f'resume=ResumePolicy(exact_resume="{resume}"), from unbroken'
        raise ConfigError("resume", expected="a ResumePolicy", found=repr(resume), hint=hint)


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
        if name in taken or name in _IN_POLICIES:
            raise _taken(where, name, f"state={{'own_{name}': ...}}")
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
    return all(has(value, name) for name in ("rank", "world_size", "gather", "broadcast", "agree"))


def _is_directory(value: object) -> bool:
    return isinstance(value, str | os.PathLike) or has(value, "describe")


def _are_callbacks(value: object) -> bool:
    if not isinstance(value, Collection):
        return False
    return all(has(one, "on_step_end") and not isinstance(one, type) for one in value)


_PARTS = (SavePolicy, KeepPolicy, ResumePolicy, RankPolicy, RunFacts, Clock, FunctionType, type)
_FUNCTION = ("a function", callable, None)
_MINUTES = ("a number", _is_number, None)
_NEEDED = (
    *("directory", "callbacks", "types", "clock", "wall_clock"),
    *("made_by_settings", "may_differ", "other_objects", "layout"),
)
_KINDS: Mapping[str, tuple[str, Callable[[Any], bool], str | None]] = {
    "directory": ("a path", _is_directory, "the run directory comes first, without a name"),
    "branch": ("a name", lambda value: isinstance(value, str), None),
    **dict.fromkeys(("save_minutes", "max_lost_minutes", "mtbf_hours"), _MINUTES),
    **dict.fromkeys(("clock", "wall_clock", "more", "filter", "tell"), _FUNCTION),
    **dict.fromkeys(("other_objects", "layout"), _FUNCTION),
    "types": ("classes", _are_types, "types=[Name], the classes themselves"),
    "settings": (
        "a dict",
        lambda value: isinstance(value, Mapping),
        'groups of plain values: settings={"data": {"path": "..."}}',
    ),
    "state": ("a dict", lambda value: isinstance(value, Mapping), 'state={"name": object}'),
    "callbacks": ("callbacks", _are_callbacks, "callbacks=[MyCallback()]"),
    **dict.fromkeys(("made_by_settings", "may_differ"), ("names of objects", _are_texts, None)),
    "per_rank": (
        "names of objects",
        _are_texts,
        'RankPolicy(per_rank=["rng", "values"]); None: whatever differs',
    ),
    "group": ("the ranks", _is_group, "group=join(), from unbroken.distributed"),
}


def check_objects(
    objects: Mapping[str, object], keywords: Collection[str], reserved: Sequence[str]
) -> None:
    """Raise where an object to save is none (a misspelt keyword, a number), or its name is taken.

    Args:
        objects: What was given by names that are no keywords.
        keywords: The keywords there are.
        reserved: Names that a checkpoint has for parts of its own.

    Raises:
        ConfigError: With the nearest keyword, or what to give instead.
    """
    if taken := [name for name in reserved if name in objects]:
        raise _taken(f"Checkpointer({taken[0]}=...)", taken[0], f"own_{taken[0]}=...")
    for name, value in objects.items():
        if name in _IN_POLICIES or _is_plain(value):
            what = "is neither an argument of a Checkpointer nor an object to save"
            raise ConfigError(_spelled(name, value), what, hint=_meant(name, value, keywords))
        for path, one in _within(name, value):
            _refuse_data(path, one)


_PARTS_OF_ALL = {
    "rng": "the states of the random generators",
    "values": "what a save is given beside the objects",
    "attributes": "what training has made of attributes",
    "gradients": "the gradients of a window that is not over",
    "modes": "the modes of modules that differ between ranks",
}


def _taken(where: str, name: str, instead: str) -> ConfigError:
    of = _PARTS_OF_ALL.get(name, "a part of every run, or an argument")
    what = f"this name stands for {of}: choose another"
    return ConfigError(where, what, hint=f"for example {instead}")


def _is_plain(value: object) -> bool:
    """Return whether a value has no state: a number, a text, a list of these, a class."""
    if type(value) in (list, tuple, set, frozenset) and value:
        return all(map(_is_plain, value))  # type: ignore[call-overload]
    return isinstance(value, (*_PLAIN, *_PARTS))


def _spelled(name: str, value: object) -> str:
    text = repr(value)
    return f"Checkpointer({name}={text if len(text) <= _SHORT else '...'})"


def _meant(name: str, value: object, keywords: Collection[str]) -> str:
    if value is None:
        return "leave it out where there is none"
    if name in _IN_POLICIES or name in _OF_POLICY:
        return f"{_in_policy(name, value)}, from unbroken"
    if name in _OF_LOOPS:
        return f"run.steps({name}={value!r})"
    if name == "resume_from_checkpoint":
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


def _in_policy(name: str, value: object) -> str:
    """Return how a value is given that belongs into a policy."""
    text = brief(repr(value), _SHORT)
    if name in _OF_SAVE:
        return f"save=SavePolicy({_OF_SAVE[name]}={text})"
    if name in _OF_RANKS:
        return f"ranks=RankPolicy({name}={text})"
    if name in _OF_FACTS:
        return f"settings=RunFacts({_OF_FACTS[name]}={text})"
    if name in _OF_CLOCK:
        return "clock=Clock(wall=...)"
    return "resume=ResumePolicy(...)" if name == "policy" else f"resume=ResumePolicy({name}={text})"


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
            hint="Checkpointer(..., data=it) does, and gives its batches by run.steps(); or data = "
            "batch_source(it, seed=0, global_batch_size=...), from unbroken: train on `batch.data` "
            "for each batch of data.iterate(), and call data.used(batch)",
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
