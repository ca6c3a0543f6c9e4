"""A tree through a real checkpoint: JSON text and safetensors bytes in a storage, and back."""

from __future__ import annotations

from unbroken.capture import (
    capture,
    decode,
    encode,
    file_of,
    files_for,
    restore,
    structure_from_bytes,
    structure_to_bytes,
)
from unbroken.storage import MemoryStorage
from unbroken.store import CheckpointReader, CheckpointWriter


def stored(tree, file_of=file_of, storage=None):
    """Write `tree` as a checkpoint and return its reader."""
    storage = MemoryStorage() if storage is None else storage
    encoded = encode(tree, file_of=file_of)
    with CheckpointWriter(storage, step=1, run_id="a" * 32) as writer:
        writer.write_leaves(encoded.leaves)
        writer.write_file("state.json", structure_to_bytes(encoded.structure))
        writer.commit({})
    return CheckpointReader(storage, "checkpoint-1")


def loaded(reader, **options):
    """Return the tree of a checkpoint."""
    structure = structure_from_bytes(reader.read_file("state.json"), "state.json")
    return decode(structure, reader, **options)


def there_and_back(tree, types=()):
    """Return what a checkpoint of `tree` gives back."""
    return loaded(stored(tree), types=types)


def saved(objects):
    """Return the lazy tree of a checkpoint of live objects."""
    return loaded(stored(capture(objects), files_for(objects)), lazy=True)


def carry(source, target):
    """Bring `target` into the state of `source` through a checkpoint; return `target`."""
    restore(target, saved(source))
    return target
