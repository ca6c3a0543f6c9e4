"""Getting back what each rank has of its own, on as many ranks as there were or on others."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from unbroken.capture import load_tensors
from unbroken.changes.differences import Difference
from unbroken.checkpoint.coverage.attributes import NAME
from unbroken.checkpoint.save.rank_shares import (
    MODES,
    own_key,
    own_state_file,
    state_digest,
    with_modes,
)
from unbroken.distributed import Group
from unbroken.errors import CorruptCheckpointError, StateMismatchError
from unbroken.store import Manifest

_ANYWHERE = ("rng", "values", NAME, MODES)
"""What a rank can go on without having had it: generators are seeded anew, others are rank 0's."""


def state_of_rank(
    tree: Mapping[str, Any],
    manifest: Manifest,
    group: Group,
    per_rank: Collection[str] | None,
    read: Callable[[str], Mapping[str, Any]],
    *,
    alike: bool,
    apart: Collection[str] = (),
    may_choose: bool = True,
) -> tuple[dict[str, Any], bool, tuple[Difference, ...]]:
    """Return what this rank has of its own in a checkpoint, in place of what rank 0 has.

    Args:
        tree: The decoded state of rank 0: those objects alone that are wanted.
        manifest: Of the checkpoint.
        group: The ranks that resume.
        per_rank: As `Checkpointer` has it.
        read: Decodes a file of the checkpoint.
        alike: Whether all ranks must read the same, as one reads for all of them.
        apart: As `Checkpointer` has it.
        may_choose: Whether the caller can say `per_rank`, which a hint then tells.

    Returns:
        The state by name, whether the random generators of this rank have to begin anew, and what
        of it fits no other number of ranks.

    Raises:
        StateMismatchError: Each of another number of ranks had a state of its own.
    """
    saved, rank = ranks_with_own_state(manifest), group.rank
    if saved == 1:
        return {}, False, ()
    movable = (*_ANYWHERE, *apart)
    names = [
        name
        for name in _own_tree(read, 1)
        if name in tree and (per_rank is None or name in (*per_rank, NAME, MODES, *apart))
    ]
    differing: tuple[Difference, ...] = ()
    if saved != group.world_size:
        left = [name for name in names if name not in movable]
        _refuse_what_cannot_move(left, saved, group.world_size, may_choose=may_choose)
        differing = tuple(_of_other_ranks(names, saved, group.world_size))
    reseeds_rank = rank >= saved and "rng" in names
    if alike:
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
    names: Collection[str], saved: int, here: int, *, may_choose: bool
) -> None:
    for_all = "; or take rank 0's for all: ranks=RankPolicy(..., per_rank=())" if may_choose else ""
    for name in names:
        raise StateMismatchError(
            name,
            "each rank has a state of its own in the checkpoint",
            expected=f"{saved} ranks",
            found=here,
            hint=f"resume on as many ranks{for_all}",
        )
