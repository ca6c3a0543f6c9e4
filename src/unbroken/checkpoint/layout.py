"""How the folder of a checkpoint looks: what stands where, and which files it has besides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from unbroken.capture import FileOf, files_for, pretrained_files
from unbroken.checkpoint.frozen import FROZEN, INDEX, frozen_apart


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
