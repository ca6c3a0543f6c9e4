"""Names of parameters: what optimizers' state is filed under, in place of positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from unbroken.capture.modules import named_parameters
from unbroken.errors import CaptureError


class ParameterNames:
    """The names of all parameters in the registered objects.

    Those of the object called "model" have their bare names; those of others begin with the
    object's name ("critic.layer.weight"); a tensor that is registered itself has its own name.

    Args:
        objects: The registered objects by name.

    Example:
        >>> objects = {"model": nn.Linear(2, 1), "temperature": nn.Parameter(torch.ones(()))}
        >>> names = ParameterNames(objects)
        >>> names.of(objects["model"].bias), names.of(objects["temperature"])
        ('bias', 'temperature')
    """

    def __init__(self, objects: Mapping[str, object]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        for path in sorted(objects, key=lambda path: path != "model"):
            for name, tensor in _named_tensors(objects[path], path):
                self._add(name, tensor)

    def of(self, tensor: torch.Tensor) -> str | None:
        """Return the first name of a parameter; None if no registered object holds it."""
        return self._names.get(id(tensor))

    def find(self, name: str) -> torch.Tensor | None:
        """Return the parameter that has this name, be it its first or another one."""
        return self._tensors.get(name)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        if self._tensors.setdefault(name, tensor) is not tensor:
            raise CaptureError(
                name, "two parameters have this name", hint="register the object under another name"
            )
        self._names.setdefault(id(tensor), name)


def _named_tensors(value: object, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, nn.Module):
        for name, parameter in named_parameters(value):
            yield (name if path == "model" else f"{path}.{name}"), parameter
    elif isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _named_tensors(item, f"{path}.{index}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named_tensors(item, f"{path}.{key}")
