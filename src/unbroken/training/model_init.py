"""Making the model: with its first weights, or without where a checkpoint brings all of them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from unbroken.capture import capture_rng, restore_rng
from unbroken.checkpoint import ReadAhead, Selection, read_ahead
from unbroken.checkpoint.resume.selection import may_resume
from unbroken.storage import LocalStorage, Storage, storage_at
from unbroken.training.config import TrainerConfig

MakeModel = Callable[[], nn.Module]
"""Makes the model anew, with its first weights drawn from PyTorch's generators."""


class DeferredModel:
    """A model that may have been made without first weights.

    Drawing them is most of what making a large model takes, and a resume overwrites them. Where a
    checkpoint is there, the model is made on PyTorch's meta device, and gets memory that holds
    anything; a checkpoint has all parameters and all buffers. A model that has more than these,
    or that looks at its weights while it is made, is made as usual.

    Args:
        model: The model, or what makes it.
        config: Says whether the run resumes, and where it is.
        storage: Where the run directory is; None: the folder that `config` names.
        reads_ahead: Whether tensors of the checkpoint may be read while the model is made: this
            process reads all of them, and has them in the memory that they are read into.

    Attributes:
        model: The model.
        ahead: What is read of the checkpoint meanwhile, or None.
    """

    def __init__(
        self,
        model: nn.Module | MakeModel,
        config: TrainerConfig,
        storage: Storage | None,
        *,
        reads_ahead: bool,
    ) -> None:
        self._make: MakeModel | None = None
        self.ahead: ReadAhead | None = None
        if isinstance(model, nn.Module):
            self.model = model
            return
        self._rng = capture_rng()
        found = None
        if _resumes(config, storage):
            self.ahead = _begin_to_read(config, storage) if reads_ahead else None
            found = _without_weights(model)
            if self.ahead is not None and not self.ahead.has_paid():
                self._read_no_longer()
        restore_rng(self._rng)
        if found is None:
            self._read_no_longer()
            self.model = model()
        else:
            self.model, self._make = found, model

    def make_room(self, device: torch.device) -> None:
        """Give the model memory on a device, which holds anything."""
        if self._make is not None:
            _make_room(self.model, device)

    def has_weights(self) -> None:
        """Take note that a checkpoint has brought them."""
        self._read_no_longer()
        self._make = None

    def initialise(self) -> None:
        """Give the model the weights that it would have begun with, unless it has weights."""
        self._read_no_longer()
        make, self._make = self._make, None
        if make is None:
            return
        now = capture_rng()
        restore_rng(self._rng)
        first = make()
        restore_rng(now)
        with torch.no_grad():
            for live, initial in zip(_tensors(self.model), _tensors(first), strict=True):
                live.copy_(initial)
        for module, made in zip(self.model.modules(), first.modules(), strict=True):
            module.training = made.training

    def _read_no_longer(self) -> None:
        if self.ahead is not None:
            self.ahead.drop()


def _resumes(config: TrainerConfig, storage: Storage | None) -> bool:
    """Tell whether a checkpoint is likely to bring all weights; a guess that may be wrong."""
    if config.skip or config.branch is not None:
        return False
    if storage is None:
        storage = LocalStorage(config.output_dir) if os.path.isdir(config.output_dir) else None
    return may_resume(storage, Selection.parse(config.resume_from_checkpoint))


def _begin_to_read(config: TrainerConfig, storage: Storage | None) -> ReadAhead | None:
    """Begin to read what the model and its optimizer will get."""
    if storage is None:
        if not os.path.isdir(config.output_dir):
            return None
        storage = storage_at(config.output_dir)
    selection = Selection.parse(config.resume_from_checkpoint)
    return read_ahead(storage, selection, ("model", "optimizer"))


def _without_weights(make: MakeModel) -> nn.Module | None:
    """Return the model on the meta device; None if it is not one that a checkpoint completes."""
    try:
        with torch.device("meta"), _without_collection():
            model = make()
    except (RuntimeError, TypeError, ValueError):  # it looks at its weights; as usual, then
        return None
    return model if _is_complete(model) else None


@contextmanager
def _without_collection() -> Iterator[None]:
    """Do not look for garbage in what a first import makes, which stays; a third of its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_complete(model: nn.Module) -> bool:
    """Tell whether all of a model's tensors are parameters and buffers with memory of their own."""
    own = list(_tensors(model))
    memory = {tensor.untyped_storage()._cdata for tensor in own}  # noqa: SLF001 (no address on meta)
    others = (value for module in model.modules() for value in _values(vars(module)))
    plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in own)
    return plain and len(memory) == len(own) and not any(map(torch.is_tensor, others))


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield all parameters and buffers, each once."""
    yield from model.parameters()
    yield from model.buffers()


def _values(attributes: dict[str, object]) -> Iterator[object]:
    """Yield what a module holds besides parameters, buffers and modules, also in containers."""
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        todo: list[object] = [value]
        while todo:
            one = todo.pop()
            yield one
            if isinstance(one, list | tuple | set):
                todo.extend(one)
            elif isinstance(one, dict):
                todo.extend(one.values())


def _make_room(model: nn.Module, device: torch.device) -> None:
    """Exchange the memory behind tensors; they stay the same objects, so ties stay ties."""
    for tensor in list(_tensors(model)):
        if not tensor.is_meta:
            continue
        empty = torch.empty_strided(
            tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device
        )
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        vars(empty).update(vars(tensor))  # marks that libraries leave on parameters
        torch.utils.swap_tensors(tensor, empty)  # type: ignore[no-untyped-call]
