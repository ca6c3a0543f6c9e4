"""What the ranks of a run have in common before they begin, and what each has of its own.

All run the same code with the same settings. A plain value may be another one on each rank: a
number in a loss, a data set or a module that says which rank it is. So a checkpoint holds rank 0's
facts, and of each other rank those that differ; a rank that resumes is compared with what that rank
was. The state that was each rank's own comes back on as many ranks, or on others where it can.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from unbroken.capture import load_tensors
from unbroken.changes.differences import Difference, by_severity
from unbroken.checkpoint.coverage.attributes import ATTRIBUTES_KEY
from unbroken.checkpoint.save.rank_shares import (
    MODES,
    state_digest,
    with_modes,
)
from unbroken.distributed import Group, disagreement, name_ranks
from unbroken.errors import CorruptCheckpointError, RankError, StateMismatchError
from unbroken.fingerprint import COMPILED
from unbroken.fingerprint.environment import environment_facts
from unbroken.store import Manifest
from unbroken.store.format.names import own_key, own_state_file

# Facts.


_SOFTWARE = ("python", "torch", "numpy")


def agree_on_versions(group: Group) -> None:
    """Raise unless all ranks run the same versions of what all of them have imported.

    Args:
        group: The ranks.

    Raises:
        RankError: Naming the ranks with another version.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> agree_on_versions(SingleProcess())
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


RANK_FACTS_KEY = "of_ranks"
"""Where the facts of a checkpoint hold what other ranks have otherwise: by rank, `RankFact`s."""

RankFact = list[Any]
"""The nested keys of a fact, then its value if the rank has one."""

_FOR_ALL = ("callbacks", "eval_data")  # one rank may evaluate, and print, for all
_OF_MODELS = ("layer", "frozen", "attn_implementation")


def others_of_ranks(
    group: Group,
    facts: Mapping[str, Any],
    *,
    per_rank: Collection[str] = (),
    one_data_set: bool = False,
) -> dict[str, list[RankFact]]:
    """Return which facts other ranks have than rank 0; all ranks call this.

    Args:
        group: The ranks.
        facts: Those of this rank: settings, fingerprint, environment.
        per_rank: Objects of which each rank has its own.
        one_data_set: Whether all ranks are given the same data, and share them out.

    Returns:
        By rank, what is not as on rank 0.

    Raises:
        RankError: The ranks run other code, or other settings, or train another model, or, where
            they are to share them, have other data: naming the ranks, the fact and its values.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> others_of_ranks(SingleProcess(), {"settings": {"seed": 1}})
        {}
    """
    if group.world_size == 1:
        return {}
    text = json.dumps(facts, sort_keys=True)
    digests: list[Any] = group.gather("what is trained", xxhash.xxh3_128_hexdigest(text.encode()))
    if len(set(digests)) == 1:
        return {}
    own = json.loads(text) if group.rank == 0 else None
    first: Any = group.broadcast("what rank 0 trains", own)
    ranks: list[Any] = group.gather("what differs", [*_others(first, json.loads(text), ())])
    _refuse_other_trainings(first, ranks, per_rank, one_data_set=one_data_set)
    return {str(rank): others for rank, others in enumerate(ranks) if others}


def facts_of_rank(
    stored: Mapping[str, Any], now: Mapping[str, Any], rank: int, world_size: int
) -> Mapping[str, Any]:
    """Return the facts with which a rank is to be compared.

    On as many ranks as there were, those that it had itself. On others nobody can say what a value
    that differs by rank would be: it is taken as it is now.

    Args:
        stored: The facts of a checkpoint.
        now: Those of this rank.
        rank: Its number.
        world_size: How many there are.

    Example:
        >>> stored = {"settings": {"rank": 0}, "environment": {"world_size": 2}}
        >>> stored[RANK_FACTS_KEY] = {"1": [[["settings", "rank"], 1]]}
        >>> facts_of_rank(stored, {}, 1, 2)["settings"]
        {'rank': 1}
    """
    others = stored.get(RANK_FACTS_KEY)
    if not isinstance(others, Mapping) or not others:
        return stored
    environment = stored.get("environment")
    if isinstance(environment, Mapping) and environment.get("world_size") == world_size:
        own = others.get(str(rank), [])
    else:
        own = [[keys, *_at(now, keys)] for many in others.values() for keys, *_ in many]
    found: dict[str, Any] = json.loads(json.dumps(stored))
    for keys, *value in own:
        _put(found, keys, value)
    return found


def from_rank_0(group: Group, own: tuple[Difference, ...]) -> tuple[Difference, ...]:
    """Return what rank 0 is to tell: its own differences, and what it takes others alone to see.

    Another processor, say, may be that of one rank. On other ranks than 0, their own.

    Args:
        group: The ranks; each calls this.
        own: What this rank has found.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> from_rank_0(SingleProcess(), ())
        ()
    """
    if group.world_size == 1:
        return own
    found = [[one.path, *one.values(), one.effect, one.verdict] for one in own]
    ranks: list[Any] = group.gather("what differs from the checkpoint", found)
    if group.rank > 0:
        return own
    more: dict[str, Difference] = {}
    for rank, others in enumerate(ranks):
        for path, stored, now, effect, verdict in others:
            if verdict != "harmless" and all(path != one.path for one in own):
                reported = Difference(
                    path, stored, now, f"{effect} ({name_ranks([rank])})", verdict
                )
                more.setdefault(path, reported)
    return by_severity((*own, *more.values()))


def _others(first: Any, own: Any, keys: tuple[str, ...]) -> Iterator[RankFact]:
    if not (isinstance(first, dict) and isinstance(own, dict)):
        if first != own:
            yield [[*keys], own]
        return
    for key in sorted({**first, **own}):
        if key not in own:
            yield [[*keys, key]]
        elif key not in first:
            yield [[*keys, key], own[key]]
        else:
            yield from _others(first[key], own[key], (*keys, key))


def _at(facts: Any, keys: list[str]) -> list[Any]:
    """Return what is there, as a list; an empty one where nothing is."""
    for key in keys:
        if not isinstance(facts, Mapping) or key not in facts:
            return []
        facts = facts[key]
    return [json.loads(json.dumps(facts))]


def _put(facts: dict[str, Any], keys: list[str], value: list[Any]) -> None:
    *outer, last = keys
    for key in outer:
        if not isinstance(facts.get(key), dict):
            facts[key] = {}
        facts = facts[key]
    if value:
        facts[last] = value[0]
    else:
        facts.pop(last, None)


def _refuse_other_trainings(
    first: Mapping[str, Any],
    ranks: list[list[RankFact]],
    per_rank: Collection[str],
    *,
    one_data_set: bool,
) -> None:
    """Raise where ranks differ in more than plain values."""
    found = [{tuple(keys): value for keys, *value in others} for others in ranks]
    paths = dict.fromkeys(keys for others in found for keys in others)
    has_own_values = any(keys[1:3] == ("data", "values") for keys in paths)
    for keys in paths:
        if keys[0] != "fingerprint" or not {*keys[1:3]}.isdisjoint(per_rank):
            continue
        values = [others.get(keys, _at(first, [*keys])) for others in found]
        shared = one_data_set and not has_own_values
        has_other_data = shared and keys[1] == "data" and _are_other_data(keys, values)
        if has_other_data or _is_other_code(keys, values):
            raise _other_training(keys, values)


def _is_other_code(keys: tuple[str, ...], values: list[list[Any]]) -> bool:
    """Return whether such a difference means that ranks train otherwise."""
    _, group, *names = keys
    if names[:1] == ["modules"] and group == "code":  # each rank may load some of its own
        loaded = {str(value[0]) for value in values if value}
        return len({one for one in loaded if not one.startswith(COMPILED)}) > 1
    if group == "code":  # git may not have answered in time, or not be there
        return names != ["git_dirty"] and all(value and value[0] is not None for value in values)
    if group in _FOR_ALL or any(name.endswith(("values", "globals")) for name in names):
        return False
    if group == "optimizer" or "source" in names or names[-1:] in (["class"], ["name"]):
        return True
    return group == "model" and not {*names[:2]}.isdisjoint(_OF_MODELS)


def _are_other_data(keys: tuple[str, ...], values: list[list[Any]]) -> bool:
    if keys[2:] == ("records",):
        lists = [value[0] for value in values if value and isinstance(value[0], list)]
        return any(a != b for one in lists for a, b in zip(lists[0], one, strict=False))
    return keys[2:] in (("length",), ("fingerprint",)) and all(values)


def _other_training(keys: tuple[str, ...], values: list[list[Any]]) -> RankError:
    texts = [json.dumps(value[0]) if value else "nothing" for value in values]
    hint = "all ranks run the same script with the same settings and packages"
    return disagreement(texts, ".".join(keys[1:]), hint)


# State.


_ANYWHERE = ("rng", "values", ATTRIBUTES_KEY, MODES)
"""What a rank can go on without having had it: generators are seeded anew, others are rank 0's."""


def state_of_rank(
    tree: Mapping[str, Any],
    manifest: Manifest,
    group: Group,
    per_rank: Collection[str] | None,
    read: Callable[[str], Mapping[str, Any]],
    *,
    read_by_rank_0: bool,
    may_differ: Collection[str] = (),
    can_set_per_rank: bool = True,
) -> tuple[dict[str, Any], bool, tuple[Difference, ...]]:
    """Return what this rank has of its own in a checkpoint, in place of what rank 0 has.

    Args:
        tree: The decoded state of rank 0: those objects alone that are wanted.
        manifest: Of the checkpoint.
        group: The ranks that resume.
        per_rank: As `Checkpointer` has it.
        read: Decodes a file of the checkpoint.
        read_by_rank_0: Whether rank 0 reads for all, and so all must read the same.
        may_differ: Objects that may differ between ranks, as `RankPolicy` has it.
        can_set_per_rank: Whether the caller can say `per_rank`, which a hint then tells.

    Returns:
        The state by name, whether the random generators of this rank have to begin anew, and what
        of it fits no other number of ranks.

    Raises:
        StateMismatchError: Each of another number of ranks had a state of its own.
    """
    saved, rank = ranks_with_own_state(manifest), group.rank
    if saved == 1:
        return {}, False, ()
    movable = (*_ANYWHERE, *may_differ)
    names = [
        name
        for name in _own_tree(read, 1)
        if name in tree
        and (per_rank is None or name in (*per_rank, ATTRIBUTES_KEY, MODES, *may_differ))
    ]
    differing: tuple[Difference, ...] = ()
    if saved != group.world_size:
        left = [name for name in names if name not in movable]
        _refuse_what_cannot_move(left, saved, group.world_size, can_set_per_rank=can_set_per_rank)
        differing = tuple(_of_other_ranks(names, saved, group.world_size))
    reseeds_rank = rank >= saved and "rng" in names
    if read_by_rank_0:
        first = load_tensors({name: tree[name] for name in names})
        found = [first, *(load_tensors(_own_tree(read, other)) for other in range(1, saved))]
        own = found[rank] if rank < saved else first
    else:
        own = _own_tree(read, rank) if 0 < rank < saved else tree
    return {name: own[name] for name in names if name in own}, reseeds_rank, differing


def ranks_with_own_state(manifest: Manifest) -> int:
    """Return how many ranks stored state of their own; 1 where all had the same."""
    files = {file.name for file in manifest.files}
    count = 1
    while own_state_file(count) in files:
        count += 1
    return count


def with_own_modes(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a state in which those modules evaluate that did on this rank."""
    modes = load_tensors(tree.pop(MODES, {}))
    is_by_name = isinstance(modes, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in modes.values()
    )
    if not is_by_name:
        raise CorruptCheckpointError(MODES, "are no names of modules, by object")
    return {name: with_modes(value, modes, name) for name, value in tree.items()} if modes else tree


def reseed_rank(rng: Mapping[str, Any], rank: int) -> None:
    """Seed the global generators of a rank that had none, from those of rank 0."""
    seed = int(state_digest(rng)[:15], 16) ^ rank
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _own_tree(read: Callable[[str], Mapping[str, Any]], rank: int) -> Mapping[str, Any]:
    own = read(own_state_file(rank)).get(own_key(rank))
    if not isinstance(own, Mapping):
        raise CorruptCheckpointError(own_state_file(rank), "is not the state of this rank")
    return own


def _of_other_ranks(names: Collection[str], saved: int, here: int) -> Iterator[Difference]:
    """Yield what each rank had of its own, and other ranks cannot go on with."""
    ranks, now = f"one of each of {saved} ranks", f"{here} ranks"
    more = "those of further ranks do not come back" if here < saved else "new ones get rank 0's"
    for name in names:
        if name not in ("rng", "values"):
            yield Difference(name, ranks, now, f"each rank had its own: {more}", "not covered")


def _refuse_what_cannot_move(
    names: Collection[str], saved: int, here: int, *, can_set_per_rank: bool
) -> None:
    for_all = (
        "; or take rank 0's for all: ranks=RankPolicy(..., per_rank=())" if can_set_per_rank else ""
    )
    for name in names:
        raise StateMismatchError(
            name,
            "each rank has a state of its own in the checkpoint",
            expected=f"{saved} ranks",
            found=here,
            hint=f"resume on as many ranks{for_all}",
        )
