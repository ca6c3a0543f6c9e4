"""Whole weights out of a checkpoint, in files that `from_pretrained` and other programs read.

Tensors that are stored in shards are put together on the disk: the file is made at its full size,
each tensor's bytes in it are mapped, and the shards are copied there, verified on the way. So
the memory needed is a few megabytes, whatever the size of a tensor or of the model.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from unbroken.errors import CaptureError, CheckpointNotFoundError, ConfigError, SaveError
from unbroken.store.checkpoint.reader import CheckpointReader
from unbroken.store.diff import Node, state_tree
from unbroken.store.format.canonical_json import Json, from_strict
from unbroken.store.format.manifest import TensorEntry
from unbroken.store.format.safetensors_file import TORCH_DTYPES, header_of, in_file_order

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_FILE_BYTES = 50_000_000_000  # as transformers cuts models

_STATE = "state."
_NOT_THE_MODELS = {"trainer_state.json"}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        files: The names of the files, sorted.
        tensors: How many tensors they hold.
        nbytes: The bytes of all tensors together.
    """

    files: tuple[str, ...]
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class _Weight:
    """A tensor of the model, as a leaf of the file that it goes into."""

    entry: TensorEntry
    name: str
    file: str
    offsets: None = None
    global_shape: None = None
    copied: None = None

    @property
    def path(self) -> str:
        return self.entry.path

    @property
    def dtype(self) -> str:
        return self.entry.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    @property
    def nbytes(self) -> int:
        return self.entry.nbytes

    def chunks(self) -> Iterator[memoryview]:
        """Never asked: its bytes are read straight into the file."""
        return iter(())


def export_weights(
    reader: CheckpointReader,
    folder: str | os.PathLike[str],
    *,
    model: str = "model",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> Exported:
    """Write the whole weights of a model, and what its own save needs, into a new folder.

    The folder is there, complete and durable, or not at all. Tied weights are written once, as
    Hugging Face does. Needs neither torch nor a process group.

    Args:
        reader: The checkpoint; every byte that is read of it is verified.
        folder: Where to; must not exist, or be empty.
        model: The name of the model among the objects that were saved.
        max_file_bytes: Above this, the weights go into several files and an index names them.

    Returns:
        What was written.

    Raises:
        CaptureError: A tensor is one that no safetensors file of weights can hold.
        CheckpointNotFoundError: The checkpoint has no such model.
        ConfigError: The folder is not empty.
        CorruptCheckpointError: The bytes are not those of the manifest.
        SaveError: The disk failed or is full.

    Example:
        >>> import tempfile
        >>> from unbroken.storage import MemoryStorage
        >>> from unbroken.store import CheckpointReader, CheckpointWriter
        >>> storage = MemoryStorage()
        >>> writer = CheckpointWriter(storage, step=5, run_id="a" * 32)
        >>> node = '{"model":{"$":"object","kind":"module","class":"M","facts":{},"state":{}}}'
        >>> writer.write_file("state.json", node.encode())
        >>> manifest = writer.commit({})
        >>> export_weights(CheckpointReader(storage, "checkpoint-5"), tempfile.mkdtemp()).files
        ('model.safetensors',)
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(str(folder), "is there already", hint="name a folder that is not there")
    weights = _cut_into_files(_weights_of(reader, model), max_file_bytes)
    staging = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        _write_all(reader, staging, weights)
        _sync_folder(staging)
        os.replace(staging, target)
        _sync_folder(target.parent)
    except OSError as error:
        where = str(error.filename or target)
        raise SaveError(where, "cannot be written", found=error.strerror) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    names = tuple(sorted(path.name for path in target.iterdir()))
    return Exported(names, len(weights), sum(weight.nbytes for weight in weights))


def _weights_of(reader: CheckpointReader, model: str) -> list[_Weight]:
    """Return the tensors of a model by their names in it; tied ones under their first name."""
    structure = from_strict(reader.read_file("state.json"))
    found = state_tree(structure).parts.get(model)
    if found is None or found.kind != "object" or "state" not in found.parts:
        where = reader.storage.describe(reader.folder)
        raise CheckpointNotFoundError(where, "holds no model of this name", found=repr(model))
    nodes = found.parts["state"].parts.items()
    return [
        _Weight(_entry_of(reader, node), name, WEIGHTS)
        for name, node in nodes
        if _tag_of(node) != "same"
    ]


def _tag_of(node: Node) -> Json:
    return node.raw.get("$") if isinstance(node.raw, dict) else None


def _entry_of(reader: CheckpointReader, node: Node) -> TensorEntry:
    """Return a tensor that stands in the checkpoint by itself, in the order of its elements."""
    raw = node.raw if isinstance(node.raw, dict) else {}
    entry = reader.manifest.tensors.get(node.leaf or "")
    if entry is None or _tag_of(node) != "tensor":
        raise CaptureError(f"model{node.end}", "is no tensor that can be exported")
    is_view = "base" in raw or "offset" in raw or raw.get("conj") or raw.get("neg")
    dtype: Json = raw.get("dtype")
    if is_view or TORCH_DTYPES.get(str(dtype)) != entry.dtype:
        what = "is a view of other memory" if is_view else "has a type of its own"
        hint = "load the checkpoint and save the model with save_pretrained()"
        raise CaptureError(entry.path, f"cannot be exported: {what}", found=dtype, hint=hint)
    return entry


def _cut_into_files(weights: Sequence[_Weight], most: int) -> list[_Weight]:
    """Give each tensor its file, in the order of the model, as few as hold `most` bytes each."""
    numbers, number, filled = [], 1, 0
    for weight in weights:
        if filled and filled + weight.nbytes > most:
            number, filled = number + 1, 0
        filled += weight.nbytes
        numbers.append(number)
    if number == 1:
        return list(weights)
    return [
        _Weight(weight.entry, weight.name, f"model-{at:05d}-of-{number:05d}.safetensors")
        for weight, at in zip(weights, numbers, strict=True)
    ]


def _write_all(reader: CheckpointReader, folder: Path, weights: Sequence[_Weight]) -> None:
    by_file: dict[str, list[_Weight]] = {}
    for weight in weights:
        by_file.setdefault(weight.file, []).append(weight)
    for name, held in (by_file or {WEIGHTS: []}).items():
        _write_weights(reader, folder / name, held)
    if len(by_file) > 1:
        total = sum(weight.nbytes for weight in weights)
        names = {weight.name: weight.file for weight in weights}
        index = {"metadata": {"total_size": total}, "weight_map": names}
        _write_plain(folder / INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
    for name in _files_of_the_model(reader):
        _write_plain(folder / name, reader.read_file(name))


def _write_weights(reader: CheckpointReader, path: Path, held: Iterable[_Weight]) -> None:
    """Make a safetensors file at its full size, and fill in one tensor after the other."""
    ordered = [weight for weight in in_file_order(list(held)) if isinstance(weight, _Weight)]
    header = header_of(ordered)
    size = len(header) + sum(weight.nbytes for weight in ordered)
    with open(path, "x+b") as file:
        file.write(header)
        file.flush()
        _reserve(file.fileno(), size)
        offset = len(header)
        for weight in ordered:
            _fill_in(reader, file.fileno(), offset, weight)
            offset += weight.nbytes
        os.fsync(file.fileno())


def _reserve(file: int, nbytes: int) -> None:
    """Give the file its size and its room: a full disk fails here, not in the middle."""
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, nbytes)


def _fill_in(reader: CheckpointReader, file: int, offset: int, weight: _Weight) -> None:
    """Read a tensor straight into the mapped file, at `offset`."""
    if weight.nbytes == 0:
        return
    before = offset % mmap.ALLOCATIONGRANULARITY
    mapped = mmap.mmap(file, before + weight.nbytes, offset=offset - before)
    reader.read_leaf_into(weight.path, memoryview(mapped)[before:])
    mapped.flush()  # it is unmapped when the last view of it is gone, here or with an error


def _files_of_the_model(reader: CheckpointReader) -> list[str]:
    """Return the files without tensors that are not the training's: config.json, ..."""
    names = [file.name for file in reader.manifest.files if not file.has_tensors]
    return [n for n in names if not n.startswith(_STATE) and n not in _NOT_THE_MODELS]


def _write_plain(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
