"""Seeing every optimizer step of a process, and what led to it."""

from __future__ import annotations

import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.data import Subset, get_worker_info
from torch.utils.data.dataloader import _BaseDataLoaderIter

from .digests import (
    HASH_NAME,
    TensorDigester,
    batch_digest,
    counts_digest,
    digest_of,
    generator_digests,
    gradients_of,
    has_moments,
    learning_rates_of,
    moments_digest,
    parameters_of,
    settings_of,
)
from .live_objects import LiveObjects
from .protocol import RecordingFile, RecordPlan, kill_now, state_keys, stop_now

SAMPLED_FROM = 1 << 30  # bytes of parameters from which "auto" reads samples only
_LOOK_AROUND = {2, *(8**power for power in range(1, 8))}  # steps; what is new is found then
_MAX_PENDING = 4096  # batches that wait for a step: more come only where no step does
_MAX_SAMPLES = 4096  # of one batch: of larger ones the indices are not written down


class Recorder:
    """The recorder of one process.

    It replaces three functions by ones that look and then call them (`DataLoader`'s next batch, a
    module's call, `backward`), and hooks every optimizer's step. An error of its own is written
    down and ends the watching, never the script.
    """

    def __init__(self, plan: RecordPlan) -> None:
        self._plan = plan
        self._journal = RecordingFile(plan.folder)
        self._digester: TensorDigester | None = None
        self._optimizers: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        self._stepping: list[weakref.ref[Optimizer]] = []
        self._live: LiveObjects | None = None
        self._inside = threading.local()
        self._loaders = LoaderLog()
        self._step = 0  # steps of this process
        self._behind = 0  # steps of the run before this process
        self._before: dict[str, Any] = {}
        self._left: dict[int, str] = {}  # the parameters' digest after each optimizer's last step
        self._is_blind = False
        self._is_idle = False  # the step in hand moves nothing
        self._spent = 0.0
        self._forget()

    def _forget(self) -> None:
        self._inputs: list[Any] = []
        self._fetched: list[Any] = []
        self._losses: list[Tensor] = []

    def attach(self) -> None:
        """Begin to look."""
        register_optimizer_step_pre_hook(self._on_step_begin)
        register_optimizer_step_post_hook(self._on_step_end)
        self._wrap_module_call()
        self._wrap_next()
        self._wrap_backward()

    # What leads to a step

    def _wrap_module_call(self) -> None:
        original = nn.Module.__call__

        @wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            if getattr(self._inside, "a_module", False) or not torch.is_grad_enabled():
                return original(module, *args, **kwargs)
            self._inside.a_module = True
            try:
                self._look(self._note_inputs, args, kwargs)
                return original(module, *args, **kwargs)
            finally:
                self._inside.a_module = False

        nn.Module.__call__ = call  # type: ignore[method-assign]

    def _wrap_next(self) -> None:
        original = _BaseDataLoaderIter.__next__
        original_index: Callable[..., Any] = _BaseDataLoaderIter._next_index  # noqa: SLF001

        @wraps(original)
        def next_batch(iterator: _BaseDataLoaderIter) -> Any:
            index = iterator._num_yielded  # noqa: SLF001
            batch = original(iterator)
            self._look(self._note_fetched, iterator, index, batch)
            return batch

        @wraps(original_index)
        def next_index(iterator: _BaseDataLoaderIter) -> Any:
            index = original_index(iterator)
            self._look(self._loaders.note_index, iterator, index)
            return index

        _BaseDataLoaderIter._next_index = next_index  # type: ignore[method-assign]  # noqa: SLF001
        _BaseDataLoaderIter.__next__ = next_batch  # type: ignore[method-assign,assignment]

    def _wrap_backward(self) -> None:
        original = torch.autograd.backward

        @wraps(original)
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
            self._look(self._note_losses, tensors)
            was_inside = getattr(self._inside, "a_module", False)
            self._inside.a_module = True  # a recomputed forward pass is no new one
            try:
                original(tensors, *args, **kwargs)
            finally:
                self._inside.a_module = was_inside

        torch.autograd.backward = backward

    def _note_inputs(self, args: Any, kwargs: Any) -> None:
        if get_worker_info() is None and len(self._inputs) < _MAX_PENDING:
            found = batch_digest((args, kwargs), self._batch_digester())
            if found is not None:
                self._inputs.append(found)

    def _note_fetched(self, iterator: Any, index: int, batch: Any) -> None:
        place = self._loaders.place_of(iterator, index)
        if len(self._fetched) < _MAX_PENDING:
            found = batch_digest(batch, self._batch_digester()) or ["", []]
            self._fetched.append([*place, *found])

    def _note_losses(self, tensors: Any) -> None:
        roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        if len(self._losses) < _MAX_PENDING:
            self._losses += [root.detach() for root in roots if root.numel() == 1]

    # The step

    def _on_step_begin(self, optimizer: Optimizer, *_: Any) -> None:
        if self._stepping and self._stepping[0]() in (None, optimizer):
            self._stepping.clear()  # an earlier step was left by an exception
        self._stepping.append(weakref.ref(optimizer))
        if len(self._stepping) == 1:
            self._look(self._note_state_before, optimizer)

    def _on_step_end(self, optimizer: Optimizer, *_: Any) -> None:
        if self._stepping:
            self._stepping.pop()
        if self._stepping:
            return  # a step inside another optimizer's step
        self._is_idle = False
        self._look(self._note_whether_idle, optimizer)
        if self._is_idle:
            return
        self._step += 1
        self._look(self._note_step, optimizer)
        self._forget()
        step = self._behind + self._step
        if step == self._plan.kill_after:
            kill_now(self._plan.parent)
        if step == self._plan.stop_after:
            stop_now()

    def _note_whether_idle(self, optimizer: Optimizer) -> None:
        """A first step without a loss and at rate 0 only makes the state, as DCP's loading does."""
        is_first = "before" in self._before
        if is_first and not self._losses and not any(learning_rates_of(optimizer)):
            self._is_idle = True
            self._before = {}
            self._optimizers.pop(optimizer)

    def _note_state_before(self, optimizer: Optimizer) -> None:
        digester = self._digester_for(optimizer)
        parameters = digester.of_all(parameters_of(optimizer))
        if optimizer in self._optimizers:
            if parameters.whole != self._left.get(self._optimizers[optimizer]):
                modified = {"params": parameters.whole, "params_each": parameters.each}
                self._before = {"edited": modified}
            return
        self._optimizers[optimizer] = len(self._optimizers)
        moments = moments_digest(optimizer, digester).whole
        counts = counts_digest(optimizer)
        if self._step == 0:
            keys = state_keys(parameters.whole, moments, counts)
            self._behind = next((self._plan.states[k] for k in keys if k in self._plan.states), 0)
        self._before = {
            "before": {
                "params": parameters.whole,
                "params_each": parameters.each,
                "moments": moments,
                "counts": counts,
                "has_moments": has_moments(optimizer),
                "settings": settings_of(optimizer),
            }
        }

    def _note_step(self, optimizer: Optimizer) -> None:
        generators = generator_digests()
        if self._live is None or self._step in _LOOK_AROUND:
            self._look_around(optimizer)
        live, digester = self._live, self._digester_for(optimizer)
        if live is None:
            return
        parameters = digester.of_all(parameters_of(optimizer))
        buffers = live.buffers(digester)
        self._journal.write(
            {
                "kind": "step",
                "step": self._step,
                "optimizer": self._optimizers[optimizer],
                **self._before,
                "inputs": self._inputs,
                "fetched": self._fetched,
                "losses": [digest_of(_loss_bytes(loss)) for loss in self._losses],
                "loss_values": [loss.item() for loss in self._losses],
                "learning_rates": learning_rates_of(optimizer),
                "settings": digest_of(repr(settings_of(optimizer)).encode()),
                "schedulers": live.schedulers(),
                "scalers": live.scalers(),
                "gradients": digester.of_all(gradients_of(optimizer)).whole,
                "params": parameters.whole,
                "params_each": parameters.each,
                "moments": moments_digest(optimizer, digester).whole,
                "counts": counts_digest(optimizer),
                "buffers": buffers.whole,
                "buffers_each": buffers.each,
                "others": live.others(digester),
                "modes": live.modes(),
                "generators": generators,
                "spent": self._spent,
                "at": time.perf_counter(),
            }
        )
        self._before = {}
        self._left[self._optimizers[optimizer]] = parameters.whole

    def _look_around(self, optimizer: Optimizer) -> None:
        self._live = LiveObjects()
        self._journal.write(
            {
                "kind": "scene",
                "optimizer": self._optimizers[optimizer],
                "class": type(optimizer).__name__,
                "names": self._live.names(optimizer),
                "buffer_names": self._live.buffer_names(),
                "param_bytes": _nbytes(optimizer),
                "hash": HASH_NAME,
                "sampled": self._digester_for(optimizer).sampled,
            }
        )

    def _digester_for(self, optimizer: Optimizer) -> TensorDigester:
        if self._digester is None:
            is_large = _nbytes(optimizer) >= SAMPLED_FROM
            by_size = self._plan.digests == "auto" and is_large
            self._digester = TensorDigester(sampled=by_size or self._plan.digests == "sampled")
        return self._digester

    def _batch_digester(self) -> TensorDigester:
        return TensorDigester(sampled=self._plan.digests == "sampled")

    def _look(self, note: Callable[..., None], *args: Any) -> None:
        """Call one of our own functions: timed, without gradients; it cannot fail the script."""
        if self._is_blind:
            return
        begin = time.perf_counter()
        try:
            with torch.no_grad():
                note(*args)
        except Exception:
            self._is_blind = True
            self._journal.write({"kind": "error", "traceback": traceback.format_exc()})
        self._spent += time.perf_counter() - begin


def _nbytes(optimizer: Optimizer) -> int:
    return sum(one.numel() * one.element_size() for one in parameters_of(optimizer))


def _loss_bytes(loss: Tensor) -> bytes:
    return bytes(loss.cpu().reshape(1).view(torch.uint8).numpy().data)


# Which samples a `DataLoader` takes, whatever their contents become on the way.


@dataclass
class _EpochIterator:
    """One iterator of a loader: the batches on their way, and how many have come."""

    waiting: deque[list[Any]] = field(default_factory=deque)
    given: int = 0


class LoaderLog:
    """Follows every data loader of a process: dataset, epoch, batch and the samples in it.

    The sampler is ahead of the batches where workers read ahead; batches come in its order.
    """

    def __init__(self) -> None:
        self._iterators: weakref.WeakKeyDictionary[Any, _EpochIterator] = (
            weakref.WeakKeyDictionary()
        )
        self._datasets: dict[int, int] = {}
        self._epochs: dict[int, int] = {}

    def note_index(self, iterator: Any, index: Any) -> None:
        """Note what the sampler gave for one batch."""
        known = self._iterators.setdefault(iterator, _EpochIterator())
        if iterator._num_yielded < known.given:  # noqa: SLF001  (the iterator was begun anew)
            known.waiting.clear()
            known.given = 0
        _, index = _in_the_whole(iterator._dataset, index)  # noqa: SLF001
        known.waiting.append(_names(index))

    def place_of(self, iterator: Any, index: int) -> list[Any]:
        """Return dataset, epoch, number in the epoch and samples of the batch that came."""
        whole, _ = _in_the_whole(iterator._dataset, None)  # noqa: SLF001
        dataset = self._datasets.setdefault(id(whole), len(self._datasets))
        if index == 0:
            self._epochs[dataset] = self._epochs.get(dataset, 0) + 1
        known = self._iterators.setdefault(iterator, _EpochIterator())
        known.given = index + 1
        samples = known.waiting.popleft() if known.waiting else []
        return [dataset, self._epochs.get(dataset, 0), index, samples]


def _in_the_whole(dataset: Any, index: Any) -> tuple[Any, Any]:
    """Return the data set that a `Subset` is of, and an index, or a batch of them, in that."""
    while type(dataset) is Subset:
        if isinstance(index, list | tuple):
            index = [dataset.indices[one] for one in index]
        elif index is not None:
            index = dataset.indices[index]
        dataset = dataset.dataset
    return dataset, index


def _names(index: Any) -> list[Any]:
    """Return an index for each sample; none for an iterable dataset, which has none."""
    indices = index if isinstance(index, (list, tuple)) else [index]
    if len(indices) > _MAX_SAMPLES or any(one is None for one in indices):
        return []
    return [one if isinstance(one, int) else digest_of(repr(one).encode())[:8] for one in indices]
