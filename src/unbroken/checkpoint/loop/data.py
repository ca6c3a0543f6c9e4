"""The data of a loop: whatever was given as `data` becomes a source of batches with a position."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import DataLoader

from unbroken.capture import named_objects
from unbroken.data import BatchSource, loop_source
from unbroken.distributed import Group
from unbroken.errors import ConfigError
from unbroken.introspection import has

DATA = "data"
"""The name by which a Checkpointer is given the data of its loop."""

_AS_SOURCE = "or make it yourself: data=batch_source(...), and read it with run.steps()"


def data_apart(objects: Mapping[str, object]) -> dict[str, object]:
    """Return what is given as data and cannot be saved as an object."""
    one = objects.get(DATA)
    if one is None or _is_source(one) or isinstance(one, torch.Tensor):
        return {}
    if isinstance(one, DataLoader):
        has_state = has(one, "state_dict") and has(one, "load_state_dict")
        return {} if has_state else {DATA: one}
    items = one[:1] if isinstance(one, list | tuple | range) else ()
    is_plain = any(isinstance(item, int | float | str) for item in items)
    is_reader = callable(one) and not isinstance(one, type)
    return {DATA: one} if is_plain or (is_reader and not has(one, "state_dict")) else {}


class LoopData:
    """The source of the batches of a loop, and how many of them make a step.

    Args:
        given: The data that were given and are no object to save.
        objects: The registered objects; the source is added to them.
        bare: Objects that are saved by their attributes; data among them are taken away.
        group: The ranks.

    Attributes:
        source: Gives the batches; None: the loop has no data.
        accumulate: Micro-batches of one step; None: one, which is given without a list.
    """

    def __init__(
        self,
        given: Mapping[str, object],
        objects: MutableMapping[str, object],
        bare: MutableMapping[str, object],
        group: Group,
    ) -> None:
        self.source: BatchSource | None = None
        self.accumulate: int | None = None
        self._given, self._objects, self._bare, self._group = given, objects, bare, group
        self._chosen: tuple[int | None, bool] | None = None

    def choose(
        self, batch_size: int | None, accumulate: int | None, *, whole_epochs: bool, is_begun: bool
    ) -> None:
        """Make the source, unless that was done; before the run is resumed.

        Raises:
            ConfigError: Sizes have no meaning for these data, or are missing.
        """
        for name, value in (("batch_size", batch_size), ("accumulate", accumulate)):
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(name, expected="a whole number, at least 1", found=repr(value))
        if self._chosen is None:
            self.source = self._found(batch_size) or self._made(
                batch_size, whole_epochs=whole_epochs, is_begun=is_begun
            )
            self._chosen = (batch_size, whole_epochs)
        elif batch_size not in (None, self._chosen[0]):
            what = "cannot become another within a run"
            raise ConfigError("batch_size", what, expected=self._chosen[0], found=batch_size)
        self._set_accumulation(accumulate)

    def _set_accumulation(self, accumulate: int | None) -> None:
        own = 1 if self.source is None else self.source.shape.accumulation
        if accumulate is not None and self.source is None:
            what = "has no meaning for a loop without data"
            raise ConfigError(
                "accumulate", what, hint="give data, or accumulate in the loop itself"
            )
        if own > 1 and accumulate not in (None, own):
            what = "is given twice"
            found = f"accumulate={accumulate}, and {own} by the sizes of batch_source"
            raise ConfigError("accumulate", what, found=found)
        self.accumulate = own if own > 1 else accumulate

    @property
    def gives_lists(self) -> bool:
        """Whether a step is given a list of micro-batches."""
        return self.accumulate is not None

    def next_count(self) -> int:
        """Return how many micro-batches the next step takes."""
        if self.source is not None and self.source.shape.accumulation > 1:
            return self.source.micro_batches_left()
        return self.accumulate or 1

    def require_position(self) -> None:
        """Raise where data were given that have no position before `choose`.

        Raises:
            ConfigError: The run cannot be resumed without it.
        """
        if self._given and self.source is None:
            kind = type(self._given[DATA]).__name__
            raise ConfigError(
                "resume()",
                f"a {kind} does not know its place: steps() and epochs() give it one",
                hint=f"leave resume() out: run.steps(...) resumes; {_AS_SOURCE}",
            )

    def _found(self, batch_size: int | None) -> BatchSource | None:
        """Return the source that was given."""
        found = {name: one for name, one in named_objects(self._objects) if _is_source(one)}
        if len(found) > 1:
            what = "a loop reads one source of batches"
            raise ConfigError("steps()", what, found=", ".join(sorted(found)))
        source = next(iter(found.values()), None)
        if source is not None and batch_size is not None:
            what = "is that of the batch_source"
            raise ConfigError("batch_size", what, hint="leave it out")
        return source if isinstance(source, BatchSource) else None

    def _made(
        self, batch_size: int | None, *, whole_epochs: bool, is_begun: bool
    ) -> BatchSource | None:
        """Return a source made of the data."""
        where = next((one for one in (self._given, self._objects, self._bare) if DATA in one), None)
        if where is None:
            if batch_size is not None:
                hint = "Checkpointer(..., data=...)"
                raise ConfigError("batch_size", "has no meaning without data", hint=hint)
            return None
        data: Any = where[DATA]
        if is_begun:
            what = "resume() was called before the data had a position"
            hint = f"leave resume() out: steps() and epochs() resume; {_AS_SOURCE}"
            raise ConfigError("steps()", what, hint=hint)
        group = self._group
        source = loop_source(
            data,
            seed=int(str(group.broadcast("the seed of the data", _seed_of(data)))),
            batch_size=batch_size,
            whole_epochs=whole_epochs,
            rank=group.rank,
            world_size=group.world_size,
        )
        self._bare.pop(DATA, None)
        self._objects[DATA] = source
        return source


def _is_source(one: object) -> bool:
    return hasattr(type(one), "iterate") and isinstance(one, BatchSource)


_SEEDS: WeakKeyDictionary[torch.Generator, int] = WeakKeyDictionary()  # that generators had


def _seed_of(data: Any) -> int:
    """Return the seed of the order: that of the loader's generator, else that of the process."""
    sampler = getattr(data, "sampler", None) if isinstance(data, DataLoader) else None
    for holder in (data if sampler is not None else None, sampler):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            # A source seeds it anew in each epoch; a second one in this process must not see that.
            return _SEEDS.setdefault(generator, generator.initial_seed()) % (1 << 63)
    return torch.initial_seed() % (1 << 63)
