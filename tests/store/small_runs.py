"""Small checkpoints with known content, for the tests of the store. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from unbroken.storage import Storage
from unbroken.store import Catalog, CheckpointReader, CheckpointWriter, Manifest, RunDirectory
from unbroken.store.format.safetensors_file import Copied

RUN_ID = "0123456789abcdef" * 2


@dataclass(frozen=True)
class PlainLeaf:
    """A leaf whose bytes are at hand, given out in small chunks."""

    path: str
    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes
    chunk_bytes: int = 64
    offsets: tuple[int, ...] | None = None
    global_shape: tuple[int, ...] | None = None
    copied: Copied | None = None

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[memoryview]:
        for start in range(0, len(self.data), self.chunk_bytes):
            yield memoryview(self.data)[start : start + self.chunk_bytes]


def noise(text: str, nbytes: int) -> bytes:
    return hashlib.shake_128(text.encode()).digest(nbytes)


def leaves_of(content: str) -> list[PlainLeaf]:
    """Leaves of several widths, a scalar and an empty one, with bytes that `content` decides."""
    shapes = [
        ("model.embed.weight", "F32", (5, 7), 140),
        ("model.bias", "BF16", (3,), 6),
        ("model.mask", "BOOL", (9,), 9),
        ("model.empty", "F32", (0, 4), 0),
        ("optimizer.step", "I64", (), 8),
        ("optimizer.embed.weight.exp_avg", "F32", (5, 7), 140),
    ]
    return [
        PlainLeaf(path, f"{file}.safetensors", name, dtype, shape, noise(content + path, nbytes))
        for path, dtype, shape, nbytes in shapes
        for file, _, name in [path.partition(".")]
    ]


def files_of(content: str) -> dict[str, bytes]:
    return {"state.json": b'{"of":"%s"}' % content.encode(), "empty.txt": b""}


def state_of(content: str) -> dict[str, bytes]:
    """Everything that a checkpoint of `content` must give back."""
    return {leaf.path: leaf.data for leaf in leaves_of(content)} | files_of(content)


def save(
    storage: Storage, step: int, content: str = "", run_id: str = RUN_ID, **more: object
) -> Manifest:
    content = content or f"state at {step}"
    with CheckpointWriter(storage, step=step, run_id=run_id, clock=lambda: 0.0) as writer:
        writer.write_leaves(leaves_of(content))
        for name, data in files_of(content).items():
            writer.write_file(name, data)
        return writer.commit({"content": content, **more})


def read_leaf(reader: CheckpointReader, path: str) -> bytes:
    buffer = bytearray(reader.manifest.tensors[path].nbytes)
    reader.read_leaf_into(path, memoryview(buffer))
    return bytes(buffer)


def read_state(reader: CheckpointReader) -> dict[str, bytes]:
    plain = [file.name for file in reader.manifest.files if not file.has_tensors]
    tensors = {path: read_leaf(reader, path) for path in reader.manifest.tensors}
    return tensors | {name: reader.read_file(name) for name in plain}


def open_run(storage: Storage) -> RunDirectory:
    return RunDirectory.open(storage, clock=lambda: 0.0, owner="test", new_id=lambda: RUN_ID)


def newest_state(storage: Storage) -> dict[str, bytes] | None:
    """The state of the newest intact checkpoint, read without a lock; None if there is none."""
    reader, _ = Catalog(storage).newest_intact()
    return None if reader is None else read_state(reader)
