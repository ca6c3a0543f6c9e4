"""How the folder of a checkpoint looks: what stands where, and which files it has besides."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from unbroken.capture import (
    FileOf,
    files_for,
    is_sharded,
    named_buffers,
    named_parameters,
    pretrained_files,
    unwrapped,
)

# Weights that are not trained in a file of their own, which later checkpoints link.


_USUAL = "model.safetensors"
FROZEN, TRAINED = "model-frozen.safetensors", "model-trained.safetensors"
INDEX = "model.safetensors.index.json"
_WORTH_A_FILE = 1 << 20  # bytes


def frozen_apart(model: nn.Module, usual: FileOf) -> tuple[FileOf, bytes] | None:
    """Return the rule that keeps a model's frozen parameters apart, and the index of its files.

    The index is what `from_pretrained` looks for where a model is in several files.

    Args:
        model: The module; wrappers are looked through.
        usual: The rule for all else.

    Returns:
        None where little is frozen, or all, or where several ranks hold the model together.
    """
    model = unwrapped(model)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    if all(trained) or any(map(is_sharded, model.parameters())):
        return None
    stored = dict(_stored(model))
    frozen = {
        name
        for name, tensor in stored.items()
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad
    }
    nbytes = sum(stored[name].nbytes for name in frozen)
    if nbytes < _WORTH_A_FILE or not any(trained):
        return None

    def file_of(path: str) -> tuple[str, str]:
        file, name = usual(path)
        if file != _USUAL:
            return file, name
        return (FROZEN if name in frozen else TRAINED), name

    return file_of, _index(stored, {name: file_of(f"model.{name}")[0] for name in stored})


def _stored(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of the model's file, those that share memory under the first name."""
    seen: set[tuple[int, int]] = set()
    for name, tensor in (*named_parameters(model), *named_buffers(model, persistent=True)):
        memory = (tensor.data_ptr() or id(tensor), tensor.nbytes)
        if memory not in seen:
            seen.add(memory)
            yield name, tensor


def _index(stored: Mapping[str, torch.Tensor], files: Mapping[str, str]) -> bytes:
    total = sum(tensor.nbytes for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    return json.dumps(index, indent=2, sort_keys=True).encode()


@dataclass(frozen=True)
class Layout:
    """How the folder of a checkpoint looks.

    Attributes:
        file_of: Gives each leaf its file and its name there.
        constant: Files of tensors that seldom change: one that is the same as in the checkpoint
            before is linked, not written again.
        files: More files, by name, for other programs; no resume reads them.
    """

    file_of: FileOf
    constant: frozenset[str] = frozenset()
    files: Callable[[], Mapping[str, bytes]] = dict

    @classmethod
    def of(cls, objects: Mapping[str, object]) -> Layout:
        """Return the usual layout: a file for each object, and what `from_pretrained` needs.

        What a model does not train has a file of its own, once it is worth one: it is written
        once, and linked in each later checkpoint as long as it is the same.
        """
        model, usual = objects.get("model"), files_for(objects)
        if not isinstance(model, nn.Module):
            return cls(usual)
        apart = frozen_apart(model, usual)
        if apart is None:
            return cls(usual, files=lambda: pretrained_files(model))
        place, index = apart
        files = {INDEX: index}
        return cls(place, frozenset({FROZEN}), lambda: {**pretrained_files(model), **files})

    def with_files(self, more: Callable[[], Mapping[str, bytes]]) -> Layout:
        """Return the same layout with more files for other programs."""
        return replace(self, files=lambda: {**self.files(), **more()})
