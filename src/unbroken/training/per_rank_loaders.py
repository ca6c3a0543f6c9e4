"""Loaders that give each rank its own batches: their states, stored and given back by rank."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from unbroken.capture import decode, encode, types_in
from unbroken.data import BatchSource, LoaderSource, MicroBatch
from unbroken.distributed import Group
from unbroken.errors import CheckpointNotFoundError, DataError
from unbroken.training.data_parallel import DataParallelLayout
from unbroken.training.run_state import batch_digest


def gives_own_batches(source: BatchSource | None, group: Group) -> bool:
    """Return whether each rank reads a loader of its own, whose place the others do not know."""
    return group.world_size > 1 and isinstance(source, LoaderSource) and not source.gives_samples


def exchange_loader_states(source: BatchSource | None, group: Group) -> None:
    """Let a loader's state hold the places of all ranks; every rank calls it before each save.

    Ranks that share a part of the data (tensor parallelism) stand at the same place.
    """
    if not gives_own_batches(source, group):
        return
    loader = cast("LoaderSource", source)
    own = loader.rank_state()
    states: Any = group.gather("the places of the loaders", [loader.shape.rank, _as_text(own)])
    places = dict(reversed(states))  # the lowest rank speaks for its part
    types = types_in(own)
    loader.places = [_from_text(places[part], types) for part in sorted(places)]


class _Leaves:
    """Leaves that came from another rank, for `decode`."""

    def __init__(self, leaves: Mapping[str, Mapping[str, Any]]) -> None:
        self._data = {path: base64.b64decode(leaf["data"]) for path, leaf in leaves.items()}
        tensors = {
            path: SimpleNamespace(
                nbytes=len(self._data[path]), dtype=leaf["dtype"], shape=tuple(leaf["shape"])
            )
            for path, leaf in leaves.items()
        }
        self.manifest: Any = SimpleNamespace(tensors=tensors)

    def read_leaf_into(self, path: str, buffer: memoryview, /) -> None:
        if buffer.nbytes:
            buffer.cast("B")[:] = self._data[path]

    def read_box_into(self, path: str, *_: Any) -> None:
        raise CheckpointNotFoundError(path, "the state of a loader is never sharded")


def _as_text(state: Any) -> Any:
    encoded = encode(state)
    leaves = {
        leaf.path: {
            "data": base64.b64encode(b"".join(leaf.chunks())).decode(),
            "dtype": leaf.dtype,
            "shape": list(leaf.shape),
        }
        for leaf in encoded.leaves
    }
    return {"structure": encoded.structure, "leaves": leaves}


def _from_text(text: Any, types: Iterable[type]) -> Any:
    return decode(text["structure"], _Leaves(text["leaves"]), types=types)


def check_first_step_dealing(
    windows: Iterable[list[MicroBatch]], source: BatchSource | None, division: DataParallelLayout
) -> Iterator[list[MicroBatch]]:
    """Yield the windows; raise before the first step if a loader does not deal as it must.

    Raises:
        DataError: All ranks were given the same batches; or samples that should be the same on
            all ranks are not.
    """
    group, batches = division.group, iter(windows)
    if group.world_size > 1 and isinstance(source, LoaderSource):
        window = group.run_on_all("read the first batches", lambda: next(batches, None))
        if window is None:
            return
        _refuse_wrong_dealing(division, source, window)
        yield window
    yield from batches


def _refuse_wrong_dealing(
    division: DataParallelLayout, source: LoaderSource, window: list[MicroBatch]
) -> None:
    seen = source.first_items if source.gives_samples else [micro.data for micro in window]
    digests = division.group.gather("the first batches", _digest(seen))
    of_parts = set(zip(division.takes, map(str, digests), strict=True))
    if len(of_parts) > division.parts and not source.gives_samples:
        raise DataError(
            "train_dataset",
            "gives ranks that hold one model together different batches",
            expected=f"the same batches on ranks of one part of the data: {division.takes}",
            hint="give the data set itself, which is dealt here",
        )
    are_same = len({str(digest) for digest in digests}) == 1
    if are_same and division.parts > 1 and not source.gives_samples:
        raise DataError(
            "train_dataset",
            "gives all ranks the same batches",
            expected="each rank's own",
            hint="give the data set itself, which is dealt here; or let the loader deal it: a "
            "DistributedSampler, or an iterable that looks at its rank",
        )
    if not are_same and source.gives_samples:
        raise DataError(
            "train_dataset",
            "gives each rank other samples, of which each would take but a part",
            expected="the same samples on all ranks: they are dealt here",
            hint="a data set that deals itself goes into a DataLoader, which gives whole batches",
        )


def _digest(items: Any) -> str:
    return batch_digest(items) + repr(list(_plain(items)))


def _plain(items: Any) -> Iterator[Any]:
    """Yield the numbers and texts in nested items; tensors are digested elsewhere."""
    if isinstance(items, int | float | str | bytes):
        yield items
    elif isinstance(items, Mapping):
        for key in sorted(items, key=str):
            yield from _plain(items[key])
    elif isinstance(items, list | tuple):
        for item in items:
            yield from _plain(item)
