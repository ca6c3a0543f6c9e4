"""What a hand-written loop depends on and a Checkpointer was not given, as far as it can be seen.

What steps the parameters, scales the loss, averages the weights or gives the batches shows when it
does so. It is told at the next save, and stands in the facts of the checkpoint, so that a resume
from it says before its first step what it cannot bring back.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler, dataloader

from unbroken.capture import all_objects, named_objects
from unbroken.changes.compare import Comparison
from unbroken.changes.differences import Difference
from unbroken.checkpoint.coverage.attribute_values import GENERATORS
from unbroken.checkpoint.coverage.schedules import attributes, steers, things_around
from unbroken.data import BatchSource, KeyedDataset, LoaderSource, MapSource
from unbroken.data.sources.iterable import reason_against_its_state
from unbroken.errors import DataError
from unbroken.fingerprint import is_user_module, keeps_attributes
from unbroken.introspection import variables_of
from unbroken.store import Json

# Which loaders a hand-written loop trains on: seen by what happens between their batches.
#
# A loader counts where a backward pass or an optimizer's step follows its batch: between two of its
# batches, or as the last one that gave any. One that is read without that, in evaluation mode or
# without gradients is no training data.


# ruff: noqa: SLF001 (PyTorch has no public names for what a loader's iterator holds)


Sign = tuple[object, ...]
"""What changes with each backward pass and each step of an optimizer."""


@dataclass
class _Pass:
    """One iterator of a loader."""

    sign: Sign
    given: int
    steps: int
    idle: bool = False


class LoadersSeen:
    """Notes which data sets are trained on through a loader that was not given.

    Args:
        sign: Returns what changes with each backward pass and each step.
        trains: Whether a batch that is read now could be one to train on.
        given: Returns how many batches registered sources have handed out.

    Attributes:
        on_batch: Called with each batch that may be one to train on.
    """

    def __init__(
        self, sign: Callable[[], Sign], trains: Callable[[], bool], given: Callable[[], int]
    ) -> None:
        self.trained: list[Any] = []
        self.on_batch: Callable[[Any], object] = lambda _: None
        self._sign, self._trains, self._given = sign, trains, given
        self._epochs: WeakKeyDictionary[Any, _Pass] = WeakKeyDictionary()
        self._last: tuple[Any, _Pass] | None = None
        self._steps = 0

    def gave(self, batches: Any, batch: Any) -> None:
        """Take note of a batch that an iterator gives."""
        if isinstance(batches._dataset, KeyedDataset) or not self._trains():
            return
        self.on_batch(batch)
        before, sign = self._epochs.get(batches), self._sign()
        now = _Pass(sign, self._given(), self._steps)
        if before is not None and before.sign != sign and self._is_for_steps(before, now):
            self._add(batches._dataset)
        now.idle = before is not None and before.sign == sign
        self._epochs[batches] = now
        self._last = (batches._dataset, now)

    def ended(self, batches: Any) -> None:
        """Take note that an iterator has no more batches."""
        last = self._epochs.pop(batches, None)
        if last is None:
            return
        now = _Pass(self._sign(), self._given(), self._steps)
        if last.sign == now.sign:
            last.idle = True
        elif self._is_for_steps(last, now):
            self._add(batches._dataset)

    def _is_for_steps(self, before: _Pass, now: _Pass) -> bool:
        """Return whether a batch was for what happened since, and not one of registered data.

        Beside those, one that gives a batch for each step is trained on, too.
        """
        return before.given == now.given or now.steps - before.steps <= 1

    def stepped(self) -> None:
        """Take note, before a step, that what was read last is what it is for."""
        if self._last is not None:
            dataset, one = self._last
            if not one.idle and one.given == self._given():
                self._add(dataset)
        self._last, self._steps = None, self._steps + 1

    def _add(self, dataset: Any) -> None:
        if not any(one is dataset for one in self.trained):
            self.trained.append(dataset)


_open_logs: WeakSet[LoadersSeen] = WeakSet()
_replaced: list[tuple[type, Any, Any]] = []
_inside = threading.local()


def watch(seen: LoadersSeen) -> None:
    """Let it hear of all loaders of torch's class in this process, until `unwatch`."""
    _open_logs.add(seen)
    if not _replaced:
        for kind in _iterators(dataloader._BaseDataLoaderIter):
            plain = vars(kind)["__next__"]
            heard = _heard(plain)
            kind.__next__ = heard  # type: ignore[attr-defined]
            _replaced.append((kind, plain, heard))


def unwatch(seen: LoadersSeen) -> None:
    """Let it hear of nothing more."""
    _open_logs.discard(seen)
    if _open_logs:
        return
    for kind, plain, heard in _replaced:
        if vars(kind).get("__next__") is heard:
            kind.__next__ = plain  # type: ignore[attr-defined]
    _replaced.clear()


def _iterators(kind: type) -> Iterator[type]:
    """Yield the classes of iterators that have a `__next__` of their own."""
    if "__next__" in vars(kind):
        yield kind
    kinds: list[type] = kind.__subclasses__()
    for one in kinds:
        yield from _iterators(one)


def _heard(plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def __next__(self: Any) -> Any:  # noqa: N807 (takes the place of it)
        if getattr(_inside, "one", None) is self or torch.compiler.is_compiling():
            return plain(self)  # of a class whose own calls this one
        outer, _inside.one = getattr(_inside, "one", None), self
        try:
            batch = plain(self)
        except StopIteration:
            for seen in list(_open_logs):
                seen.ended(self)
            raise
        finally:
            _inside.one = outer
        for seen in list(_open_logs):
            seen.gave(self, batch)
        return batch

    return __next__


class UncoveredNotices:
    """What is not covered by the checkpoints of a start, as far as the user was told of it.

    Args:
        comparison: What this start is compared by.
        more: Returns what else is not covered.
        where: Returns where the run is.
        tell: Called with each line.
    """

    def __init__(
        self,
        comparison: Comparison,
        more: Callable[[], tuple[Difference, ...]],
        *,
        where: Callable[[], str],
        tell: Callable[[str], None],
    ) -> None:
        self._comparison, self._more = comparison, more
        self._where, self._tell = where, tell
        self._reported: set[str] = set()

    def begin(self, differences: Iterable[Difference]) -> None:
        """Begin with what a resume has told."""
        self._reported = {one.path for one in differences}

    def tell(self, more: tuple[Difference, ...] = ()) -> None:
        """Tell of all that is not covered, and of more; raise where that is not accepted."""
        self.tell_of((*self._comparison.uncovered, *self._more(), *more))

    def tell_of(self, found: tuple[Difference, ...]) -> None:
        """Tell of these alone.

        Raises:
            DifferenceError: Only an exact resume is accepted.
        """
        new = tuple(one for one in found if one.path not in self._reported)
        if not new:
            return
        self._comparison.refuse(self._where(), new)
        self._reported |= {one.path for one in new}
        for one in new:
            self._tell(str(one))

    def report(self, difference: Difference) -> None:
        """Tell of a difference that was accepted, or is refused elsewhere."""
        self._reported.add(difference.path)
        self._tell(str(difference))


NOT_GIVEN_KEY = "not_given"
"""Where the facts of a checkpoint hold what its training had and it has not."""

_FRAMES, _STEPS = 8, 3  # a scaler is looked for around the first steps
_SAMPLE = 8


class NotGiven:
    """Notes what training depends on beside the registered objects."""

    def __init__(self, objects: Mapping[str, object], covers: Callable[[object], bool]) -> None:
        self.steps = 0
        self._covers = covers
        self._objects = objects
        self._seen: dict[int, tuple[Any, str]] = {}  # what it does, by identity
        self._loaders = LoadersSeen(self._sign, self._trains, self._handed_out)
        self._steps_of_sources: dict[str, tuple[Any, int]] = {}
        self._marks: list[torch.Tensor] = []
        self._copies: list[_Copy] = []
        self._steering: list[tuple[Any, dict[str, Any]]] = []
        self._moving: list[tuple[Any, Any]] = []
        self._is_in_evaluation = False  # at the last step
        self._stepping: dict[int, Optimizer | None] = {}  # None: one that is not registered
        self._trained: list[nn.Module] = []

    def begin(self, on_batch: Callable[[Any], object]) -> None:
        """Look from now on, until `end`.

        Args:
            on_batch: Called with each batch of a loader that may be one to train on, where no
                registered source gives any.
        """
        self._loaders.on_batch = lambda batch: None if self._has_sources() else on_batch(batch)
        _open_searches.add(self)
        _hear_of_averages()
        watch(self._loaders)
        self._trained = self._modules()
        self._marks = [tensor for one in self._trained for tensor in _some_parameters(one)]

    def end(self) -> None:
        """Look no longer."""
        self._copies, self._steering, self._moving, self._stepping = [], [], [], {}
        _open_searches.discard(self)
        _hear_of_averages()
        unwatch(self._loaders)

    def before_step(self, optimizer: Optimizer) -> None:
        """Take note of who steps, and what is around a step."""
        if self._stepping.get(id(optimizer)) is not optimizer:
            self._stepping[id(optimizer)] = optimizer if self.holds(optimizer) else None
        if self._stepping[id(optimizer)] is None:
            if id(optimizer) in self._seen:
                return
            if not any(one.holds(optimizer) for one in list(_open_searches)):
                self._see(optimizer, f"steps {_count(optimizer)} and keeps a state of its own")
            return
        if self.steps < _STEPS:
            self._look_for_a_scaler()
        if self.steps == 0:
            around = [value for _, value in things_around()]
            self._copies = list(self._copies_among(around))
            self._steering = [(one, _numbers_of(one)) for one in around if steers(one)]
            self._moving = [(one, _moved_by(one)) for one in self._not_of_data(around)]
        for copy in self._copies if self.steps < _SAMPLE else ():
            self._compare(copy)
        self._loaders.stepped()
        self._is_in_evaluation = not any(one.training for one in self._trained)
        self.steps += 1

    def averaged(self, average: AveragedModel) -> None:
        """Take note of an average that is updated."""
        if not any(one.holds(average) for one in list(_open_searches)):
            self._see(average, "averages the weights")

    def _see(self, thing: Any, does: str) -> None:
        self._seen.setdefault(id(thing), (thing, does))

    # What is found is held by name.

    def found(self, values: Any) -> tuple[Difference, ...]:
        """Return what is not covered, by the names that the user's own code has for it.

        Args:
            values: What is saved beside the objects: a state in it is the caller's own care.
        """
        for copy in self._copies:
            self._compare(copy)
        for one, numbers in self._steering:
            if numbers != _numbers_of(one):
                self._see(one, "steers the optimizer by numbers of its own")
        for one, before in self._moving:
            if before != _moved_by(one):
                is_module = isinstance(one, nn.Module)
                self._see(
                    one, "has buffers that training changes" if is_module else "was drawn from"
                )
        inexact = tuple(self._inexact_loaders())
        if not self._seen and not self._loaders.trained:
            return inexact
        names, kept = {id(value): name for name, value in things_around()}, list(_states_in(values))
        found = [
            _difference(_name(names.get(one), thing), thing, does)
            for one, (thing, does) in self._seen.items()
            if not self.holds(thing) and not _is_kept(thing, kept)
        ]
        given = {id(one) for one in self._datasets()}
        trained = [one for one in self._loaders.trained if self._is_read_beside(one, given)]
        loaders = [value for _, value in things_around() if isinstance(value, DataLoader)]
        for dataset in trained:
            loader = next((one for one in loaders if one.dataset is dataset), None)
            name = _name(names.get(id(loader)), loader) if loader is not None else "DataLoader"
            found.append(Difference(name, None, None, _OF_LOADER.format(name), "not covered"))
        unique = {one.path: one for one in (*found, *inexact)}
        return tuple(unique.values())

    def _inexact_loaders(self) -> Iterator[Difference]:
        """Yield registered loaders that do not come back exactly through their own state."""
        for name, one in named_objects(self._objects):
            reason = reason_against_its_state(one) if isinstance(one, DataLoader) else None
            if reason is not None:
                effect = f"{reason}; give it as batch_source({name}, ...), which reads it again"
                yield Difference(name, None, None, effect, "not covered")

    def _is_read_beside(self, dataset: Any, given: set[int]) -> bool:
        return id(dataset) not in given or (self._handed_out() == 0 and self._has_sources())

    def require_used(self) -> None:
        """Raise where batches of a registered source were trained on, and not marked as used.

        Raises:
            DataError: It would begin again at the same batch.
        """
        for name, source in _sources(self._objects):
            count = _handed_out_by(source)
            position, steps = self._steps_of_sources.get(name, (None, 0))
            if position is source.position and count and self.steps > steps:
                raise DataError(
                    name,
                    "batches were handed out and trained on, and none was marked as used",
                    found=f"{count} handed out since iterate(), the position did not move",
                    hint=f"call {name}.used(batch) after each batch: a resume goes on after the "
                    "last batch that was marked",
                )
            self._steps_of_sources[name] = (source.position, self.steps)

    # What is around.

    def holds(self, thing: object) -> bool:
        """Return whether a thing is registered, or a part of what is."""
        for one in all_objects(self._objects):
            if one is thing or any(part is thing for part in _parts(one)):
                return True
            if isinstance(one, Optimizer) and _wraps(thing, one):
                return True
        return self._covers(thing)

    def _modules(self) -> list[nn.Module]:
        return [one for one in all_objects(self._objects) if isinstance(one, nn.Module)]

    def _trains(self) -> bool:
        if not torch.is_grad_enabled() or self._is_read_by_a_source():
            return False
        return self._is_in_evaluation or any(one.training for one in self._trained)

    def _is_read_by_a_source(self) -> bool:
        """Return whether a registered source reads now: its loader may be made of others."""
        return any(attributes(one).get("is_reading") for _, one in _sources(self._objects))

    def _sign(self) -> tuple[object, ...]:
        grads = (tensor.grad for tensor in self._marks)
        return (self.steps, *(None if g is None else (id(g), g._version) for g in grads))

    def _handed_out(self) -> int:
        return sum(_handed_out_by(source) for _, source in _sources(self._objects))

    def _has_sources(self) -> bool:
        return next(_sources(self._objects), None) is not None

    def _datasets(self) -> Iterator[Any]:
        for one in all_objects(self._objects):
            loader = one._loader.loader if isinstance(one, LoaderSource) else one
            held = attributes(loader).values()  # a thread may read what a loader wraps
            for each in (loader, *(part for part in held if isinstance(part, DataLoader))):
                yield getattr(each, "dataset", None) if isinstance(each, DataLoader) else each

    def _look_for_a_scaler(self) -> None:
        frame = sys._getframe(1)
        for _ in range(_FRAMES):
            if frame.f_back is None:
                return
            frame = frame.f_back
            if frame.f_code.co_name != "step":
                continue
            one = variables_of(frame).get("self")
            if isinstance(one, GradScaler) and one.is_enabled():
                self._see(one, "scales the loss by what it has seen")

    def _not_of_data(self, around: Iterable[object]) -> Iterator[object]:
        """Yield generators and modules of the user's own that no data and no loader draw from."""
        around = [*around]
        readers = (one for one in around if isinstance(one, Dataset | Sampler | DataLoader))
        of_data = {id(part) for one in (*readers, *self._datasets()) for part in _held_by(one)}
        for one in around:
            is_own = isinstance(one, nn.Module) and keeps_attributes(one)
            draws = isinstance(one, GENERATORS) and id(one) not in _SAVED_ANYWAY
            if (is_own or draws) and id(one) not in of_data and not self.holds(one):
                yield one

    def _copies_among(self, around: Iterable[object]) -> Iterator[_Copy]:
        """Yield modules, and tensors held by objects of the user's own, that are like a model's."""
        own = [part for one in all_objects(self._objects) for part in _tensors_in(one)]
        shapes = {_shapes(one.parameters()): one for one in self._modules()}
        known = {id(tensor) for tensor in own}
        for value in around:
            for name, tensors in _places_of_tensors(value):
                model = shapes.get(_shapes(tensors))
                if model is None or any(id(tensor) in known for tensor in tensors):
                    continue
                # Few things come this far; to ask whether one is held takes longer.
                if not isinstance(value, AveragedModel) and not self.holds(value):
                    known.update(map(id, tensors))  # what holds it comes before it
                    yield _Copy(value, name, model)

    def _compare(self, copy: _Copy) -> None:
        """See whether a copy of a model is changed by training, other than to a copy again."""
        if copy.has_moved() and not self.holds(copy.owner):
            self._see(copy.owner, "holds a copy of the model's weights that training changes")


class _Copy:
    """Tensors of the shapes of a model's: a module, or what an attribute holds."""

    def __init__(self, owner: Any, name: str | None, model: nn.Module) -> None:
        self.owner, self._name, self._model = owner, name, model
        self._last = _sample(_tensors_of(owner, name))

    def has_moved(self) -> bool:
        """Return whether it changed, and is not just the model as it is now."""
        before, self._last = self._last, _sample(_tensors_of(self.owner, self._name))
        is_module = isinstance(self.owner, nn.Module)  # a teacher is copied, too, and used
        return before != self._last and (
            is_module or self._last != _sample(list(self._model.parameters()))
        )


_SAVED_ANYWAY = frozenset(map(id, (torch.default_generator, random._inst, np.random.mtrand._rand)))


def _moved_by(thing: Any) -> Any:
    """Return what is another for a generator that was drawn from, or a module with new buffers."""
    if isinstance(thing, nn.Module):
        return [_sample([one]) for one in thing.buffers()]
    if isinstance(thing, torch.Generator):
        return thing.get_state().tolist()
    if isinstance(thing, np.random.Generator):
        return repr(thing.bit_generator.state)
    return thing.getstate() if isinstance(thing, random.Random) else repr(thing.get_state())


def _held_by(thing: object, depth: int = 3) -> Iterator[object]:
    """Yield what an object holds, and what that holds."""
    held = attributes(thing).values()
    for one in (*held, *(item for part in held if type(part) in (list, tuple) for item in part)):
        yield one
        if depth and not isinstance(one, torch.Tensor | nn.Module):
            yield from _held_by(one, depth - 1)


def _numbers_of(thing: object) -> dict[str, Any]:
    held = attributes(thing)
    return {name: one for name, one in held.items() if isinstance(one, bool | int | float)}


def _places_of_tensors(thing: object) -> Iterator[tuple[str | None, list[torch.Tensor]]]:
    """Yield where a thing may hold a copy of a model: in itself, or in attributes; and what."""
    if isinstance(thing, ModuleType) and not is_user_module(thing):
        return  # thousands of names: what trains keeps nothing in those of a library
    is_itself = isinstance(thing, nn.Module) or type(thing) in (dict, list, tuple)
    held = {None: thing} if is_itself else attributes(thing)
    for name, value in held.items():
        if tensors := _tensors_in(value):
            yield name, tensors


def _tensors_of(thing: object, name: str | None) -> list[torch.Tensor]:
    return _tensors_in(thing if name is None else attributes(thing).get(name))


_OF_LOADER = (
    "its batches are trained on, and no checkpoint holds its place; give it: "
    "data = batch_source({}, seed=..., global_batch_size=...), Checkpointer(..., data=data), and "
    "train on the batches of data.iterate()"
)


def missing_facts(missing: Iterable[Difference]) -> dict[str, Json]:
    """Return what a checkpoint says of all that it does not hold; see `of_checkpoint`."""
    found: list[Json] = [{"path": one.path, "effect": one.effect} for one in missing]
    return {NOT_GIVEN_KEY: found} if found else {}


def of_checkpoint(facts: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return what a checkpoint with these facts does not hold, though its training had it.

    Example:
        >>> of_checkpoint({"not_given": [{"path": "scaler", "effect": "scales the loss"}]})[0].path
        'scaler'
    """
    stored = facts.get(NOT_GIVEN_KEY)
    found = [one for one in stored if isinstance(one, dict)] if isinstance(stored, list) else []
    return tuple(
        Difference(str(one.get("path")), None, None, str(one.get("effect")), "not covered")
        for one in found
    )


def _difference(name: str, thing: object, does: str) -> Difference:
    effect = (
        f"this {type(thing).__name__} {does}, and no checkpoint holds it; "
        f"give it: Checkpointer(..., {name}={name})"
    )
    return Difference(name, None, None, effect, "not covered")


def _states_in(values: Any) -> Iterator[frozenset[Any]]:
    """Yield the names in each mapping among plain values."""
    if isinstance(values, Mapping):
        yield frozenset(values)
    held = values.values() if isinstance(values, Mapping) else values
    for one in held if isinstance(values, Mapping | list | tuple) else ():
        yield from _states_in(one)


def _is_kept(thing: Any, kept: Iterable[frozenset[Any]]) -> bool:
    """Return whether the state of a thing is among what the caller saves himself."""
    if not callable(getattr(type(thing), "state_dict", None)):
        return False
    try:
        state = thing.state_dict()
    except Exception:
        return False
    return isinstance(state, Mapping) and bool(state) and frozenset(state) in set(kept)


def _name(found: str | None, thing: object) -> str:
    """Return the last name on the way to a thing: "scaler" of "self.scaler"; or of its class."""
    name = (found or "").rpartition(".")[2]
    return name if name.isidentifier() else type(thing).__name__.lower()


def _count(optimizer: Optimizer) -> str:
    count = sum(len(group["params"]) for group in optimizer.param_groups)
    return "one parameter" if count == 1 else f"{count} parameters"


def _wraps(thing: object, optimizer: Optimizer) -> bool:
    """Return whether a thing is only a face of an optimizer: it has no state but that one's."""
    if not isinstance(thing, Optimizer) or not any(
        value is optimizer for value in attributes(thing).values()
    ):
        return False
    state = attributes(thing).get("state")
    return not state or state is attributes(optimizer).get("state")


def _is_module(thing: object) -> TypeGuard[nn.Module]:
    return issubclass(
        type(thing), nn.Module
    )  # some things warn when they are asked for their class


def _parts(thing: object) -> Iterator[object]:
    """Yield what is saved with a registered object: its modules, and what it holds."""
    if _is_module(thing):
        yield from thing.modules()
    for value in attributes(thing).values():
        yield value
        if type(value) in (list, tuple):
            yield from value


def _tensors_in(thing: object) -> list[torch.Tensor]:
    if _is_module(thing):
        return list(thing.parameters())
    values: list[Any] = []
    if type(thing) is dict:
        values = list(thing.values())
    elif type(thing) in (list, tuple):
        values = list(thing)  # type: ignore[call-overload]
    return values if all(isinstance(one, torch.Tensor) for one in values) else []


def _shapes(tensors: Iterable[torch.Tensor]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in tensors)


def _sample(tensors: list[torch.Tensor]) -> list[list[Any]]:
    """Return some numbers of the first tensors and of the last."""
    chosen = [*tensors[:2], *tensors[-1:]]
    return [one.detach().reshape(-1)[:_SAMPLE].tolist() for one in chosen]


def _some_parameters(module: nn.Module) -> list[torch.Tensor]:
    trained = [one for one in module.parameters() if one.requires_grad]
    return [trained[at] for at in sorted({0, len(trained) // 2, len(trained) - 1}) if trained]


def _sources(objects: Mapping[str, object]) -> Iterator[tuple[str, BatchSource]]:
    for name, value in named_objects(objects):
        if hasattr(type(value), "iterate") and isinstance(value, BatchSource):
            yield name, value


def _handed_out_by(source: object) -> int:
    return source.running.handed_out if isinstance(source, LoaderSource | MapSource) else 0


_open_searches: WeakSet[NotGiven] = WeakSet()
_plain_update = AveragedModel.update_parameters


@wraps(_plain_update)
def _update_parameters(self: AveragedModel, model: nn.Module) -> None:
    for one in list(_open_searches):
        one.averaged(self)
    _plain_update(self, model)


def _hear_of_averages() -> None:
    """Hear of averages as long as somebody looks."""
    is_heard = AveragedModel.update_parameters is _update_parameters
    if _open_searches and AveragedModel.update_parameters is _plain_update:
        AveragedModel.update_parameters = _update_parameters  # type: ignore[method-assign]
    elif not _open_searches and is_heard:
        AveragedModel.update_parameters = _plain_update  # type: ignore[method-assign]
