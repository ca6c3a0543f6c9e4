"""What each rank of a save stores: its share of what all have in common, and what is its own.

Ranks have modules and optimizers in common: tensors that are the same on all of them, or of which
each holds a part. All other state (random generators, data loaders, ...) is stored once where it
is the same on all ranks, and for each rank where it is not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import xxhash

from unbroken.capture import (
    Captured,
    Encoded,
    FileOf,
    TensorLeaf,
    capture_rng,
    encode,
    is_sharded,
    raw,
    structure_to_bytes,
)
from unbroken.capture.codec.leaves import TensorMemo
from unbroken.checkpoint.coverage.attributes import ATTRIBUTES_KEY
from unbroken.distributed import Group, divide, name_ranks
from unbroken.errors import ConfigError, RankError
from unbroken.store.format.names import STATE_FILE, file_of_rank, own_key, own_state_file

# Whether what is stored once is the same on all ranks: the weights and moments of replicas.
#
# A local expert, a head for each rank, or replicas that a bug let drift apart would be stored as
# rank 0 has them; an optimizer's state, of which each rank stores a share, would even be mixed. A
# digest of every byte would cost a tenth of the save of a large model. There a sample is
# compared: of each tensor blocks at even distances, other ones at each save.


_FEW = 32 << 20  # bytes of all tensors: as many are compared as a whole, in 3 ms
_ALL = 1 << 62  # bytes: more than a tensor has
_BLOCK = 1024  # bytes
_EVERY = 512  # blocks, one is compared: other ones at each save
_FEWEST = 4  # blocks of a tensor
_GOLDEN = 0x9E3779B1  # multiples of it are spread evenly (Knuth)


def agree_on_replicas(
    group: Group, leaves: Sequence[TensorLeaf], save: int, *, may_differ: bool = True
) -> None:
    """Raise unless these tensors are the same on all ranks, as far as the sample shows.

    Args:
        group: The ranks; all have the same leaves.
        leaves: What is stored once.
        save: The number of the save: it chooses the sample.
        may_differ: Whether the caller can have each rank's own stored, which the hint then tells.

    Raises:
        RankError: Naming a tensor, and the ranks on which it is another one.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> agree_on_replicas(SingleProcess(), [], save=0)
    """
    block = _ALL if sum(leaf.nbytes for leaf in leaves) <= _FEW else _BLOCK
    samples = [sample_of(leaf.tensor, save, block=block) for leaf in leaves]
    host = _on_the_host(samples)
    digests = group.gather("what is stored once", xxhash.xxh3_128_hexdigest(host.numpy().data))
    if len(set(map(str, digests))) > 1:
        raise _differing(group, [leaf.path for leaf in leaves], samples, may_differ=may_differ)


def sample_of(tensor: torch.Tensor, turn: int, *, block: int = _BLOCK) -> torch.Tensor:
    """Return a view on some bytes of a tensor, as rows; on all of a small one, as one row.

    Args:
        tensor: Any; of one that is not contiguous the elements in C order are looked at.
        turn: Chooses the offsets; the same ones in tensors of the same length.
        block: How many bytes there are at each offset.

    Example:
        >>> sample_of(torch.zeros(1 << 20), turn=3).shape
        torch.Size([8, 1024])
    """
    whole = tensor if tensor.is_contiguous() else raw(tensor).contiguous()
    start, count, length, row = rows_of_sample(whole.nbytes, turn, block=block)
    start += int(whole.storage_offset()) * whole.element_size()
    rows = torch.empty(0, dtype=torch.uint8, device=whole.device)
    return rows.set_(whole.untyped_storage(), start, (count, length), (row, 1))


@functools.lru_cache(maxsize=64)  # many tensors are of the same length
def rows_of_sample(nbytes: int, turn: int, *, block: int = _BLOCK) -> tuple[int, int, int, int]:
    """Return where the rows of a sample lie: the first begin, how many, their length and distance.

    Args:
        nbytes: The length of the tensor.
        turn: As `sample_of` takes it.
        block: As `sample_of` takes it.

    Example:
        >>> rows_of_sample(1 << 20, turn=0), rows_of_sample(100, turn=0)
        ((0, 4, 1024, 262144), (0, 1, 100, 100))
    """
    count = max(_FEWEST, nbytes // (_BLOCK * _EVERY))
    row, shift = nbytes // count, turn * _GOLDEN
    if row < block:
        return 0, 1, nbytes, nbytes
    # What is left over is at either end.
    return shift % (nbytes - row * count + 1) + shift % (row - block + 1), count, block, row


def _on_the_host(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return all samples one after the other; what is on a device comes in few copies."""
    alike: dict[tuple[torch.device, bool], list[torch.Tensor]] = {}
    for sample in samples:
        alike.setdefault((sample.device, len(sample) > 1), []).append(sample)
    parts = [gathered(own).cpu() for own in alike.values()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def gathered(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a copy of samples, one after the other: of equal width, or of one row each."""
    if len(samples[0]) == 1:
        return torch.cat([sample.view(-1) for sample in samples])
    return torch.cat([*samples]).view(-1)


def _differing(
    group: Group, paths: Sequence[str], samples: Sequence[torch.Tensor], *, may_differ: bool
) -> RankError:
    own = [xxhash.xxh3_64_hexdigest(_on_the_host([sample]).numpy().data) for sample in samples]
    ranks = [list(map(str, digests)) for digests in map(_as_list, group.gather("each tensor", own))]
    usual = max(ranks, key=ranks.count)
    odd = tuple(rank for rank, digests in enumerate(ranks) if digests != usual)
    rows = zip(paths, *ranks, strict=True)
    differing = [path for path, *digests in rows if len(set(digests)) > 1]
    more = f" (and {len(differing) - 1} more tensors)" if differing[1:] else ""
    owners = dict.fromkeys(path.partition(".")[0].partition(":")[0] for path in differing)
    each = ", ".join(f'"{name}"' for name in (*owners, "rng", "values"))
    alike = "begin with the same weights (seed before the model is built), and sum all gradients"
    apart = f"if the ranks should not be alike: ranks=RankPolicy(..., per_rank=[{each}])"
    return RankError(
        name_ranks(odd),
        f"{differing[0]}{more}: is not what the other ranks have, and is stored once for all",
        ranks=odd,
        hint=f"{alike}; {apart}" if may_differ else alike,
    )


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


_LARGE = 32 << 20  # bytes
MODES = "modes_of_modules"
"""Where a state tree says which modules of a rank evaluate, where ranks differ."""

Place = tuple[int, int]
"""Where a tensor lies: its address, and its length in bytes."""


@dataclass(frozen=True)
class RankShare:
    """What one rank stores in a save.

    Attributes:
        leaves: The tensors, or parts of tensors.
        files: The files without tensors, by name: each makes its content, later.
    """

    leaves: tuple[TensorLeaf, ...]
    files: Mapping[str, Callable[[], bytes]]


@dataclass(frozen=True)
class CapturedState:
    """What one rank captured for a save, and what is said of who stores it.

    Attributes:
        tree: The state tree, with "rng" and "values".
        per_rank: The names of which each rank stores its own; None: whatever differs.
        differing: More names of which each rank stores its own; what training made of attributes
            is one of them where it differs.
        from_rank_0: Buffers that other ranks get from rank 0: what they have meanwhile is nothing.
        may_choose: Whether the caller can say `per_rank`, which a hint then tells.
    """

    tree: Mapping[str, Any]
    per_rank: Collection[str] | None = None
    differing: Collection[str] = ()
    from_rank_0: Collection[Place] = ()
    may_choose: bool = True


@dataclass
class SharePlan:
    """Who stores what. Ranks divide it again only when one of them has something else to store.

    Attributes:
        memo: What is known of the tensors.
        saves: How many there were on several ranks.
    """

    memo: TensorMemo = field(default_factory=TensorMemo)
    saves: int = 0
    _offered: list[Any] | None = None
    _mine: frozenset[str] = frozenset()

    def mine(self, group: Group, leaves: Sequence[TensorLeaf]) -> frozenset[str]:
        """Return the paths of those of these leaves that this rank stores; see `divide`."""
        offered = [
            (one.path, one.dtype, one.shape, one.offsets, one.global_shape, one.sharded is None)
            for one in leaves
        ]
        if group.any(offered != self._offered):
            self._offered = None
            self._mine = divide(group, {leaf.path: _whole(leaf) for leaf in leaves})
            self._offered = offered
        return self._mine


def plan_share(
    group: Group,
    state: CapturedState,
    file_of: FileOf,
    plan: SharePlan,
    without_storage: Sequence[int] = (),
) -> RankShare:
    """Return what this rank stores of a captured state; all ranks call this.

    Args:
        group: The ranks.
        state: What this rank captured.
        file_of: Gives each leaf its file and its name there.
        plan: How the save before was divided.
        without_storage: Ranks that cannot store; with one of them, rank 0 stores all.

    Raises:
        CaptureError: A value cannot be stored.
        ConfigError: A rank that cannot store has something that rank 0 has not.
        RankError: The ranks have other objects, or another state of what is stored once.
    """
    tree, per_rank = state.tree, state.per_rank
    if group.world_size == 1:
        encoded = encode(dict(tree), file_of=file_of, memo=plan.memo)
        content = partial(structure_to_bytes, encoded.structure)
        return RankShare(encoded.leaves, {STATE_FILE: content})
    private = _private_names(group, tree, per_rank).union(state.differing)
    common = {name: value for name, value in tree.items() if name not in private}
    own = {name: tree[name] for name in tree if name in private}
    encoded = group.run_on_all(
        "capture the state",
        lambda: encode({**common, **own}, file_of=file_of, memo=plan.memo),
    )
    if without_storage:
        _refuse_what_only_others_have(encoded, own, without_storage)
    if per_rank:
        _agree_on_the_rest(group, common)
    together = [name for name, value in common.items() if _are_alike(name, value)]
    _agree_on_structure(group, encoded, together)
    _agree_on_copies(group, encoded)
    replicas = _replicas(encoded, together, state.from_rank_0)
    agree_on_replicas(group, replicas, plan.saves, may_differ=state.may_choose and per_rank != ())
    plan.saves += 1
    mine = _planned(group, encoded, common, plan, divided=not without_storage)
    if group.rank == 0:
        return RankShare(mine, {STATE_FILE: partial(structure_to_bytes, encoded.structure)})
    if not own:
        return RankShare(mine, {})
    of_this_rank = encode({own_key(group.rank): own}, file_of=_in_file_of_rank(file_of, group.rank))
    files = {own_state_file(group.rank): partial(structure_to_bytes, of_this_rank.structure)}
    return RankShare((*mine, *of_this_rank.leaves), files)


def differing(
    group: Group, tree: Mapping[str, Any], names: Collection[str], save: int
) -> frozenset[str]:
    """Return which of these differ between ranks, as far as a sample of large tensors shows.

    Args:
        group: The ranks; all have objects of these names, or none has.
        tree: What was captured.
        names: What may be looked at; what ranks have in common is not, nor what is not there.
        save: The number of the save: it chooses the sample.
    """
    return _private_names(group, {n: tree[n] for n in names if n in tree}, None, save)


def _private_names(
    group: Group,
    tree: Mapping[str, Any],
    per_rank: Collection[str] | None,
    save: int | None = None,
) -> frozenset[str]:
    """Return the names of what each rank has of its own."""
    if per_rank is not None:
        own = frozenset(per_rank).intersection(tree)
        moved = {name: tree[name] for name in (ATTRIBUTES_KEY, MODES) if name in tree}
        return own | (_private_names(group, moved, None) if moved else own)
    digests = group.run_on_all(
        "capture the state",
        lambda: {
            n: state_digest({n: value}, save)
            for n, value in tree.items()
            if not _are_alike(n, value)
        },
    )
    ranks: Any = group.gather("what is the same on all ranks", digests)
    return frozenset(name for name in digests if len({one.get(name) for one in ranks}) > 1)


def state_digest(tree: Any, save: int | None = None) -> str:
    """Return a digest of a small state, tensors included.

    Args:
        tree: The state.
        save: Of a large tensor a sample is taken, which this number chooses; None: all of it.

    Example:
        >>> state_digest({"step": 1}) == state_digest({"step": 1.0})
        False
    """
    encoded = encode(tree)
    digest = xxhash.xxh3_128(structure_to_bytes(encoded.structure))
    for leaf in encoded.leaves:
        if save is None or leaf.nbytes <= _LARGE:
            _add(digest, leaf)
        else:
            digest.update(gathered([sample_of(leaf.tensor, save)]).cpu().numpy().data)
    return digest.hexdigest()


def _add(digest: xxhash.xxh3_128, leaf: TensorLeaf) -> xxhash.xxh3_128:
    for chunk in leaf.chunks():
        digest.update(chunk)
    return digest


def _are_alike(name: str, value: Any) -> bool:
    """Return whether ranks have an object in common; one may follow a run with objects alone."""
    return name != ATTRIBUTES_KEY and _is_common(value)


def _is_common(value: Any) -> bool:
    """Return whether a registered object is, or holds, one that the ranks have in common."""
    if isinstance(value, Captured):
        if value.kind == "gradients":  # whole ones are each rank's own, until they are added
            return any(map(is_sharded, value.state["parameters"].values()))
        return value.kind in ("module", "optimizer") or is_sharded(value.state)
    if isinstance(value, Mapping):
        return any(_is_common(item) for item in value.values())
    return isinstance(value, list | tuple) and any(map(_is_common, value))


def _refuse_what_only_others_have(
    encoded: Encoded, own: Collection[str], without_storage: Sequence[int]
) -> None:
    """Raise if rank 0, which is to store all, does not hold all."""
    cut = (leaf.path for leaf in encoded.leaves if leaf.sharded is not None)
    path = next(chain(own, cut), None)
    if path is not None:
        raise ConfigError(
            path,
            f"is of each rank, but {name_ranks(without_storage)} cannot store it: where rank 0 "
            "saves is not there",
            hint='put the run directory where all ranks see it; read_from="rank0" is for models '
            "and states that all ranks have alike",
        )


def _agree_on_the_rest(group: Group, common: Mapping[str, Any]) -> None:
    """Raise unless schedules and the like are the same, where each rank's own are named."""
    apart = ("rng", "values", MODES)
    names = [n for n, value in common.items() if not (n in apart or _is_common(value))]
    own = group.run_on_all("capture the state", lambda: {n: state_digest(common[n]) for n in names})
    try:
        group.agree("what per_rank does not name", own)
    except RankError as error:
        error.add_note("per_rank names what is each rank's own; None: whatever differs")
        raise


def _agree_on_structure(group: Group, encoded: Encoded, common: Iterable[str]) -> None:
    """Raise unless all ranks have the same parameters, state and options of optimizers, ..."""
    structure: Any = encoded.structure
    found = {
        name: xxhash.xxh3_128_hexdigest(structure_to_bytes(_of_all_ranks(structure[name])))
        for name in common
    }
    try:
        group.agree("the state to be saved, without tensors", found)
    except RankError as error:
        error.add_note("an optimizer that keeps another state on each rank cannot be saved")
        raise


def _agree_on_copies(group: Group, encoded: Encoded) -> None:
    """Raise unless what sharded modules hold whole is the same on all ranks: buffers, ..."""
    cut = _cut(encoded)
    found = {
        leaf.path: _add(xxhash.xxh3_128(), leaf).hexdigest()
        for leaf in encoded.leaves
        if leaf.sharded is None and _owner(leaf.path) in cut
    }
    group.agree("the tensors that each rank holds whole", found)


def _replicas(
    encoded: Encoded, together: Collection[str], from_rank_0: Collection[Place]
) -> list[TensorLeaf]:
    """Return the tensors of which each rank has one, and that are stored once."""
    owners = {*together} - _cut(encoded)
    return [
        leaf
        for leaf in encoded.leaves
        if _owner(leaf.path) in owners
        and leaf.nbytes
        and (leaf.tensor.data_ptr(), leaf.nbytes) not in from_rank_0
    ]


def _cut(encoded: Encoded) -> set[str]:
    """Return the names of objects with sharded tensors."""
    return {_owner(leaf.path) for leaf in encoded.leaves if leaf.sharded is not None}


def _owner(path: str) -> str:
    return path.partition(".")[0].partition(":")[0]


def _of_all_ranks(node: Any) -> Any:
    """Return a structure without devices and modes of modules, which may differ."""
    if isinstance(node, list):
        return [_of_all_ranks(item) for item in node]
    if isinstance(node, dict):
        apart = ("device", "devices", *(["eval"] if "extra_state" in node else ()))
        return {key: _of_all_ranks(node[key]) for key in node if key not in apart}
    return node


def modes_apart(group: Group, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return which modules of this rank evaluate, where that is not the same on all ranks."""
    if group.world_size == 1:
        return {}
    modes = dict(_modes_in(tree, ""))
    ranks: Any = group.gather("the modes of modules", state_digest(modes))
    return {MODES: modes} if len({*ranks}) > 1 else {}


def _modes_in(value: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    if isinstance(value, Captured):
        yield from [(path, [*value.facts["eval"]])] if value.kind == "module" else []
    elif isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _modes_in(item, f"{path}.{key}" if path else str(key))


def with_modes(value: Any, modes: Mapping[str, list[str]], path: str = "") -> Any:
    """Return a state in which those modules evaluate that `modes` names."""
    if isinstance(value, Captured):
        return (
            replace(value, facts={**value.facts, "eval": modes[path]}) if path in modes else value
        )
    if isinstance(value, dict):
        below = {key: f"{path}.{key}" if path else str(key) for key in value}
        return {key: with_modes(item, modes, below[key]) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(with_modes(x, modes, f"{path}.{i}") for i, x in enumerate(value))
    return value


def _planned(
    group: Group, encoded: Encoded, common: Mapping[str, Any], plan: SharePlan, *, divided: bool
) -> tuple[TensorLeaf, ...]:
    """Return the leaves that this rank stores, in files of its own where ranks share one."""
    optimizers = tuple(f"{path}." for path in _optimizers_in(common, ""))
    shared = [
        leaf
        for leaf in encoded.leaves
        if leaf.sharded is not None or (divided and leaf.path.startswith(optimizers))
    ]
    names = {leaf.path for leaf in shared}
    of_rank_0 = [leaf for leaf in encoded.leaves if leaf.path not in names and group.rank == 0]
    shared.sort(key=lambda leaf: (leaf.sharded is None, -leaf.nbytes))  # whole ones fill the gaps
    mine = plan.mine(group, [*of_rank_0, *shared])
    files = {leaf.file for leaf in shared}
    return tuple(
        leaf._replace(file=file_of_rank(leaf.file, group.rank)) if leaf.file in files else leaf
        for leaf in encoded.leaves
        if leaf.path in mine and (leaf.offsets is None or leaf.nbytes)
    )


def _whole(leaf: TensorLeaf) -> torch.Tensor:
    return leaf.tensor if leaf.sharded is None else leaf.sharded


def _optimizers_in(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Captured):
        yield from [path] if value.kind == "optimizer" else []
    elif isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from _optimizers_in(item, f"{path}.{key}" if path else str(key))


def _in_file_of_rank(file_of: FileOf, rank: int) -> Callable[[str], tuple[str, str]]:
    def own(path: str) -> tuple[str, str]:
        file, name = file_of(path)
        return file_of_rank(file, rank), name

    return own


# Whether ranks draw the same random numbers: one state is saved for all of them.


def rng_digest() -> str:
    """Return a digest of the states of this process's global random generators on the CPU.

    Example:
        >>> rng_digest() == rng_digest()
        True
    """
    return state_digest({name: state for name, state in capture_rng().items() if name != "cuda"})
