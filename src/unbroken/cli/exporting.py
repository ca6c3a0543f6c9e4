"""`unbroken export`: a checkpoint in the layout of another trainer."""

from __future__ import annotations

import sys
from pathlib import Path

from unbroken.cli.places import open_place
from unbroken.errors import CheckpointNotFoundError


def export(path: str, target: str) -> int:
    """Write the checkpoint at a path as transformers' own Trainer would; return the exit status.

    Raises:
        CheckpointError: There is no checkpoint, or it is damaged.
        ConfigError: The target is there, or the checkpoint is not of the Hugging Face Trainer.
    """
    from unbroken.adapters.transformers.export import export_stock

    place = open_place(path)
    reader = place.newest() if place.folder is None else place.open(place.folder)
    if reader is None:
        raise CheckpointNotFoundError(path, "holds no checkpoint that can be opened")
    export_stock(reader, Path(target))
    sys.stdout.write(f"{reader.storage.describe(reader.folder)} -> {target}\n")
    return 0
