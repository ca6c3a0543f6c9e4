"""The folder of a checkpoint that the host's own Trainer wrote: what is in it, and whether whole.

It has no digests. What can be told is told: files that are missing or cut short, JSON that does
not parse, headers that promise what is not there, and the CRC-32 that each entry of a `torch.save`
archive has. Nothing is allocated that the files do not hold, and no code that they name is run.
"""

from __future__ import annotations

import errno
import json
import pickletools
import random
import stat as modes
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from unbroken.errors import CorruptCheckpointError

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SIGNS = (STATE, OPTIMIZER, SCHEDULER, "training_args.bin", *_WEIGHTS, *_INDICES)
_MAX_JSON_BYTES = 1 << 30  # a log of a million steps has some 100 MB
_MAX_HEADER_BYTES = 100_000_000  # what the safetensors library accepts

# Not damage but a process in need, which may read the same bytes well a moment later.
_NOT_THE_FILES_FAULT = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}

_reconstruct: Any = np.empty(0).__reduce__()[0]
_ARRAYS: list[Any] = [
    # NumPy 2 has moved it; a file that NumPy 1 wrote names its old place, and the other way round.
    *((_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.uint32, np.int64, np.float64)},
]
"""What an array of numbers is made by; NumPy's random state has one."""

_NOT_PLAIN: type[Exception] = torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined]
_ALLOCATES = {"builtins bytearray", "__builtin__ bytearray"}  # as long as a number in the file says


def is_stock(folder: Path) -> bool:
    """Return whether the host's own Trainer wrote this folder, or began to.

    Example:
        >>> is_stock(Path("nowhere"))
        False
    """
    if not folder.is_dir() or (folder / "manifest.json").exists():
        return False
    return any((folder / name).exists() for name in _SIGNS) or bool(rng_files(folder))


def problem_of_stock(folder: Path) -> str | None:
    """Return why such a checkpoint cannot be continued, or None if nothing is wrong to see."""
    try:
        read_state(folder)
        engine = _written_by(folder)
        if engine is not None:
            return f"{engine} wrote the optimizer in a way of its own, which is not read here"
        for file in weight_files(folder):
            shapes_in(file)
        _look_into(folder / OPTIMIZER, _is_of_optimizer)
        _look_into(folder / SCHEDULER, _is_schedule)
        if (folder / SCALER).exists():
            _look_into(folder / SCALER, lambda state: isinstance(state, dict))
        if not rng_files(folder):
            return "rng_state.pth is missing"
        for file in rng_files(folder):
            _look_into(file, lambda state: isinstance(state, dict))
            _check_generators(file)
    except CorruptCheckpointError as error:
        found = "" if error.found is None else f" ({error.found})"
        return f"{Path(error.where).name} {error.what}{found}"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """Return trainer_state.json.

    Raises:
        CorruptCheckpointError: It is missing or damaged.
    """
    state = _read_json(folder / STATE)
    counts = [state.get("global_step"), state.get("max_steps")] if isinstance(state, dict) else []
    if not isinstance(state, dict) or type(counts[0]) is not int or counts[0] < 0:
        raise CorruptCheckpointError(str(folder / STATE), "has no global_step")
    if type(counts[1]) is not int:
        raise CorruptCheckpointError(str(folder / STATE), "has no max_steps")
    return state


def _written_by(folder: Path) -> str | None:
    """Return which engine keeps its own files in a checkpoint; None: none does."""
    if any(folder.glob("pytorch_model_fsdp*")) or (folder / "optimizer_0").is_dir():
        return "FSDP under transformers' own Trainer"
    return "DeepSpeed" if (folder / "latest").is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights: one, or those that an index lists.

    Raises:
        CorruptCheckpointError: There are none, or the index is damaged or names files elsewhere.
    """
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
    for name in _INDICES:
        if (folder / name).exists():
            return _files_of_index(folder / name)
    raise CorruptCheckpointError(str(folder / _WEIGHTS[0]), "is missing")


def _files_of_index(index: Path) -> list[Path]:
    folder, found = index.parent, _read_json(index)
    names = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(names, dict) or not names:
        raise CorruptCheckpointError(str(index), "has no weight_map")
    files = []
    for name in sorted({str(name) for name in names.values()}):
        file = folder / name
        with reading(index):
            is_inside = file.resolve().is_relative_to(folder.resolve())
        if not is_inside or file.suffix not in (".safetensors", ".bin"):
            what = "names a file that is none of the weights in this folder"
            raise CorruptCheckpointError(str(index), what, found=repr(name))
        files.append(file)
    return files


def rng_files(folder: Path) -> list[Path]:
    """Return the files with random states: one, or one for each rank, by rank."""
    if (folder / "rng_state.pth").exists():
        return [folder / "rng_state.pth"]
    found = folder.glob("rng_state_*.pth") if folder.is_dir() else ()
    return sorted(found, key=lambda path: (len(path.name), path.name))


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Let whatever reading a file of a stock checkpoint raises mean that the file is damaged.

    Raises:
        CorruptCheckpointError: It is missing, no regular file, unreadable or damaged.
    """
    try:
        yield
    except CorruptCheckpointError:
        raise
    except FileNotFoundError as error:
        raise CorruptCheckpointError(str(file), "is missing") from error
    except OSError as error:
        if error.errno in _NOT_THE_FILES_FAULT:
            raise
        raise CorruptCheckpointError(str(file), "cannot be read", found=str(error)) from error
    except _NOT_PLAIN as error:
        what = "holds more than numbers and plain values: reading it would run its code"
        raise CorruptCheckpointError(str(file), what) from error
    # Of damaged bytes, zipfile, json, torch and safetensors raise anything: errors of struct and
    # zlib, MemoryError for a length of exabytes, KeyError for a name with a flipped bit.
    except Exception as error:
        found = f"{type(error).__name__}: {str(error)[:200]}"
        raise CorruptCheckpointError(str(file), "is damaged", found=found) from error


def read_stock(folder: Path, name: str, device: str = "cpu") -> Any:
    """Return what a `torch.save` archive of a stock checkpoint holds.

    Args:
        folder: The checkpoint.
        name: The file.
        device: Where to put tensors; "meta": nowhere, all but their elements is returned.

    Raises:
        CorruptCheckpointError: It is damaged, or names code that it wants to run.
    """
    file = folder / name
    with reading(file), warnings.catch_warnings(), torch.serialization.safe_globals(_ARRAYS):
        warnings.simplefilter("ignore")
        return torch.load(file, map_location=device, weights_only=True)


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a file of weights by name, with their shapes; it is checked.

    Raises:
        CorruptCheckpointError: It is missing or damaged.
    """
    if file.suffix != ".safetensors":
        state = _look_into(file, lambda state: isinstance(state, dict))
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with reading(file):
        _check_regular(file)
        _check_header(file)
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _read_json(file: Path) -> Any:
    with reading(file):
        _check_regular(file)
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise CorruptCheckpointError(str(file), "is too large", found=file.stat().st_size)
        return json.loads(file.read_text(encoding="utf-8"))


def _check_regular(file: Path) -> None:
    """Refuse a named pipe or a device, which would be read for ever."""
    if not modes.S_ISREG(file.stat().st_mode):
        raise CorruptCheckpointError(str(file), "is not a regular file")


def _check_header(file: Path) -> None:
    """Refuse a length of the header that the file does not have; the library checks all else."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if length > min(size - 8, _MAX_HEADER_BYTES):
        raise CorruptCheckpointError(str(file), "ends too early")


def _look_into(file: Path, is_right: Callable[[Any], bool]) -> Any:
    """Check an archive of `torch.save`; return what it holds, without the elements of tensors."""
    with reading(file):
        _check_regular(file)
        _check_archive(file)
    held = read_stock(file.parent, file.name, "meta")
    with reading(file):
        _check_tensors(file, held)
        if not is_right(held):
            raise CorruptCheckpointError(str(file), "is not of the form that transformers writes")
    return held


def _check_archive(file: Path) -> None:
    """Check an archive as a whole: nothing in it unfolds to more than the file holds."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CorruptCheckpointError(str(file), "is compressed, as torch.save never does")
        nbytes, size = sum(entry.file_size for entry in entries), file.stat().st_size
        if nbytes > size or len({entry.filename for entry in entries}) < len(entries):
            raise CorruptCheckpointError(str(file), "lists more than it holds")
        damaged = archive.testzip()
        if damaged is not None:
            what = f"is damaged: {damaged} has another CRC-32"
            raise CorruptCheckpointError(str(file), what)
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                _check_names(file, archive.read(entry))


def _check_names(file: Path, pickled: bytes) -> None:
    for operation, argument, _ in pickletools.genops(pickled):
        if operation.name == "GLOBAL" and argument in _ALLOCATES:
            what = "asks for memory of any size, as torch.save never does"
            raise CorruptCheckpointError(str(file), what, found=argument)


def _check_tensors(file: Path, held: Any) -> None:
    """Refuse tensors that claim more elements than the file holds: a copy would be of any size."""
    size, todo, seen = file.stat().st_size, [held], set[int]()
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.numel() * value.element_size() > size:
                raise CorruptCheckpointError(str(file), "has a tensor larger than itself")
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            todo += value


def _check_generators(file: Path) -> None:
    """Let generators that nobody else uses take the states, which shows whether they are some."""
    states = read_stock(file.parent, file.name)
    with reading(file):
        random.Random().setstate(states["python"])  # noqa: S311 (draws nothing)
        np.random.RandomState().set_state(states["numpy"])
        torch.Generator().set_state(states["cpu"])


def _is_of_optimizer(state: Any) -> bool:
    if not isinstance(state, dict):
        return False
    moments, groups = state.get("state"), state.get("param_groups")
    return (
        isinstance(moments, dict)
        and isinstance(groups, list)
        and bool(groups)
        and all(isinstance(one, dict) for one in (*moments.values(), *groups))
        and all(map(_is_group, groups))
        and all(_is_number(one.get("step", 0)) for one in moments.values())
    )


def _is_group(group: dict[str, Any]) -> bool:
    numbers = [group.get(name, 0.0) for name in ("lr", "weight_decay", "eps")]
    betas = group.get("betas", (0.0, 0.0))
    is_pair = isinstance(betas, list | tuple) and len(betas) == 2
    return (
        isinstance(params := group.get("params"), list)
        and all(type(one) is int for one in params)
        and is_pair
        and all(map(_is_number, (*numbers, *betas)))
        and ("betas" not in group or "eps" in group)
    )


def _is_schedule(state: Any) -> bool:
    rates = state.get("base_lrs", []) if isinstance(state, dict) else None
    return (
        isinstance(rates, list)
        and all(map(_is_number, rates))
        and type(state.get("last_epoch", 0)) is int
        and isinstance(state.get("lr_lambdas", []), list)
    )


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float)
