"""Going on from a checkpoint of the host's own Trainer, exactly as that would.

Its files are read by `torch.load(weights_only=True)`, which runs no code that a file names but
for a list of constructors of tensors and arrays.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from unbroken.adapters.transformers.checkpoint_files import (
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    STATE_NAME,
    load_adapter,
    tensors_of_adapter,
)
from unbroken.adapters.transformers.position import (
    Batching,
    DataPosition,
    LoopCounts,
    StoredPosition,
)
from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError, StateMismatchError
from unbroken.store.format.canonical_json import digest_of

# The folder of a checkpoint that the host's own Trainer wrote: what is in it, and whether whole.
#
# It has no digests. What can be told is told: files that are missing or cut short, JSON that does
# not parse, headers that promise what is not there, and the CRC-32 that each entry of a
# `torch.save` archive has. Nothing is allocated that the files do not hold, and no code that they
# name is run.


_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SIGNS = (STATE_NAME, OPTIMIZER, SCHEDULER, "training_args.bin", *_WEIGHTS, *_INDICES)
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


def is_hf_checkpoint(folder: Path) -> bool:
    """Return whether the host's own Trainer wrote this folder, or began to.

    Example:
        >>> is_hf_checkpoint(Path("nowhere"))
        False
    """
    if not folder.is_dir() or (folder / "manifest.json").exists():
        return False
    return any((folder / name).exists() for name in _SIGNS) or bool(rng_files(folder))


def problem_of_hf_checkpoint(folder: Path) -> str | None:
    """Return why such a checkpoint cannot be continued; None: no problem was found."""
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


class HfCheckpoints:
    """The format of transformers' own Trainer, for the selection of checkpoints."""

    def is_one(self, folder: Path) -> bool:
        """Return whether the host's own Trainer wrote a folder, or began to."""
        return is_hf_checkpoint(folder)

    def problem_of(self, folder: Path) -> str | None:
        """Return why its checkpoint cannot be continued; None: no problem was found."""
        return problem_of_hf_checkpoint(folder)

    def state_of(self, folder: Path) -> str | None:
        """Return an identity of its checkpoint that does not depend on its path; None: none."""
        try:
            state = folder / STATE_NAME  # a named pipe would be waited for
            return f"stock {digest_of(state.read_bytes())}" if state.is_file() else None
        except OSError:
            return None

    def require(self, folder: Path) -> None:
        """Raise CheckpointNotFoundError if there is no folder that could be a checkpoint."""
        if not folder.is_dir():
            expected = "the folder of a checkpoint"
            hint = '"latest" finds the newest intact one in output_dir'
            raise CheckpointNotFoundError(str(folder), "is not there", expected=expected, hint=hint)


def read_state(folder: Path) -> dict[str, Any]:
    """Return trainer_state.json.

    Raises:
        CorruptCheckpointError: It is missing or damaged.
    """
    state = _read_json(folder / STATE_NAME)
    counts = [state.get("global_step"), state.get("max_steps")] if isinstance(state, dict) else []
    if not isinstance(state, dict) or type(counts[0]) is not int or counts[0] < 0:
        raise CorruptCheckpointError(str(folder / STATE_NAME), "has no global_step")
    if type(counts[1]) is not int:
        raise CorruptCheckpointError(str(folder / STATE_NAME), "has no max_steps")
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
    """Turn whatever reading one of its files raises into an error that says it is damaged.

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


def read_archive(folder: Path, name: str, device: str = "cpu") -> Any:
    """Return what a `torch.save` archive of a Hugging Face checkpoint holds.

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
    held = read_archive(file.parent, file.name, "meta")
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
    """Load the states into generators of our own, which shows whether they are valid."""
    states = read_archive(file.parent, file.name)
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


def refuse_what_does_not_fit(folder: Path, objects: Mapping[str, Any]) -> None:
    """Raise unless `load_hf_checkpoint` can load the whole checkpoint; no object is changed.

    Args:
        folder: It was looked through by `problem_of_hf_checkpoint`.
        objects: As `load_hf_checkpoint` takes them.

    Raises:
        StateMismatchError: Weights or optimizer do not fit what is here.
        CorruptCheckpointError: A file was damaged since.
    """
    _check_weights(folder, objects["model"])
    _check_optimizer(folder, objects["optimizer"])


def missing_devices_of_hf_checkpoint(folder: Path, *, rank: int = 0) -> tuple[int, int] | None:
    """Return of how many CUDA devices there are random states, and how many are here, if fewer.

    On a machine that has none at all, the host leaves them alone without a word.
    """
    found, here = len(_cuda_states(_rng_states(folder, rank))), torch.cuda.device_count()
    return (found, here) if torch.cuda.is_available() and found > here else None


def load_hf_checkpoint(folder: Path, objects: Mapping[str, Any], *, rank: int = 0) -> None:
    """Load a Hugging Face checkpoint into live objects; the random generators last.

    Args:
        folder: `refuse_what_does_not_fit` has refused nothing of it.
        objects: "model", "optimizer", "scheduler" and perhaps "scaler".
        rank: Whose random state to take.

    Raises:
        CorruptCheckpointError: A file was damaged since; some objects were changed.
    """
    schedule = read_archive(folder, SCHEDULER)
    scaler = read_archive(folder, SCALER) if (folder / SCALER).exists() else None
    states = _rng_states(folder, rank)
    _load_weights(folder, objects["model"])
    with reading(folder / OPTIMIZER):
        objects["optimizer"].load_state_dict(read_archive(folder, OPTIMIZER))
    with reading(folder / SCHEDULER), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loading a schedule without its optimizer
        objects["scheduler"].load_state_dict(schedule)
    if scaler is not None and "scaler" in objects:
        objects["scaler"].load_state_dict(scaler)
    _set_rng(states)


def _load_weights(folder: Path, model: nn.Module) -> None:
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        with reading(file):
            is_plain = file.suffix == ".safetensors"
            stored.update(load_file(file) if is_plain else read_archive(file.parent, file.name))
    if _is_adapter(folder):
        load_adapter(model, stored)
    else:
        model.load_state_dict(stored, strict=False)


def _is_adapter(folder: Path) -> bool:
    return weight_files(folder)[0].name.startswith("adapter_")


def _check_weights(folder: Path, model: nn.Module) -> None:
    stored: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        stored.update(shapes_in(file))
    if _is_adapter(folder):
        adapter = tensors_of_adapter(model)
        _refuse(folder, "has no weights for", [name for name in adapter if name not in stored])
        unknown = [name for name in stored if name not in adapter]
        _refuse(folder, "has weights that the adapter does not know", unknown)
        _check_shapes(folder, stored, adapter)
        return
    live = model.state_dict(keep_vars=True)
    loaded = {id(live[name]) for name in stored if name in live}
    missing = [name for name in live if name not in stored and id(live[name]) not in loaded]
    judged = _names_that_torch_loads(model)
    _refuse(folder, "has no weights for", [name for name in missing if judged(name)])
    unknown = [name for name in stored if name not in live and judged(name)]
    _refuse(folder, "has weights that the model does not know", unknown)
    common = {name: value for name, value in live.items() if judged(name)}
    _check_shapes(folder, stored, common)


def _names_that_torch_loads(model: nn.Module) -> Callable[[str], bool]:
    """Return a test for names whose modules load their state as PyTorch does."""
    own = [
        f"{prefix}." if prefix else ""
        for prefix, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
        and (
            type(module)._load_from_state_dict is not nn.Module._load_from_state_dict  # noqa: SLF001
            or module._load_state_dict_pre_hooks  # noqa: SLF001 (torch has no public name)
        )
    ]
    return lambda name: not any(name.startswith(prefix) for prefix in own)


def _check_shapes(
    folder: Path, stored: Mapping[str, tuple[int, ...]], live: Mapping[str, Any]
) -> None:
    for name, value in live.items():
        if name in stored and isinstance(value, torch.Tensor) and value.shape != stored[name]:
            where, shape = f"{folder}: {name}", list(stored[name])
            what, hint = "has another shape", "build the model as it was"
            raise StateMismatchError(
                where, what, expected=shape, found=list(value.shape), hint=hint
            )


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        hint = "build the model as it was when the checkpoint was saved"
        raise StateMismatchError(str(folder), what, found=", ".join(names[:3]), hint=hint)


def _check_optimizer(folder: Path, optimizer: Optimizer) -> None:
    state = read_archive(folder, OPTIMIZER, "meta")
    here = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    there = [list(group["params"]) for group in state["param_groups"]]
    _require(folder, "parameters", sum(map(len, there)), sum(map(len, here)))
    _require(folder, "parameters by group", [*map(len, there)], [*map(len, here)])
    for number, shape in zip(chain(*there), chain(*here), strict=True):
        moments = state["state"].get(number, {})
        found = {tuple(v.shape) for v in moments.values() if isinstance(v, torch.Tensor) and v.ndim}
        if found and found != {shape}:
            _require(folder, f"moments of parameter {number}", sorted(found), [shape])


def _require(folder: Path, what: str, stored: Any, here: Any) -> None:
    if stored != here:
        where = f"{folder / OPTIMIZER}: {what}"
        raise StateMismatchError(where, "do not fit the optimizer", expected=stored, found=here)


def _rng_states(folder: Path, rank: int) -> Mapping[str, Any]:
    files = rng_files(folder)
    states: Mapping[str, Any] = read_archive(folder, files[min(rank, len(files) - 1)].name)
    return states


def _cuda_states(states: Mapping[str, Any]) -> list[torch.Tensor]:
    cuda = states.get("cuda")
    return [] if cuda is None else cuda if isinstance(cuda, list) else [cuda]


def _set_rng(states: Mapping[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if torch.cuda.is_available():
        here = torch.cuda.device_count()
        torch.cuda.set_rng_state_all(_cuda_states(states)[:here])


def facts_of_hf_checkpoint(folder: Path) -> dict[str, Any]:
    """Return what a Hugging Face checkpoint tells of how it was trained, as far as it does.

    Returns:
        "arguments": those that its optimizer and schedule were made with; "max_steps".
    """
    state, schedule = read_state(folder), read_archive(folder, SCHEDULER)
    groups = read_archive(folder, OPTIMIZER, "meta")["param_groups"]
    arguments = {"per_device_train_batch_size": state.get("train_batch_size")}
    if schedule.get("base_lrs"):
        arguments["learning_rate"] = schedule["base_lrs"][0]
    arguments["weight_decay"] = max(group.get("weight_decay", 0.0) for group in groups)
    if "betas" in groups[0]:
        arguments["adam_beta1"], arguments["adam_beta2"] = groups[0]["betas"]
        arguments["adam_epsilon"] = groups[0]["eps"]
    known = {name: value for name, value in arguments.items() if value is not None}
    return {"arguments": known, "max_steps": state["max_steps"]}


# Where in the data a checkpoint of the host's own Trainer is, from the little that it tells.


def position_of_hf_checkpoint(
    folder: Path, state: Mapping[str, Any], now: Batching, counts: LoopCounts, *, drop_last: bool
) -> StoredPosition:
    """Return the position of a Hugging Face checkpoint.

    Where epochs are batched as they were, that is what the host derives from the number of steps.
    Where they are batched otherwise, which the host does not notice, it follows from the fraction
    of the epoch, the batch size and the number of ranks, all of which such a checkpoint tells.

    Args:
        folder: The checkpoint.
        state: Its trainer_state.json.
        now: How epochs are batched from now on.
        counts: What the host has counted.
        drop_last: Whether a last batch that is smaller is left out.
    """
    step = state["global_step"]
    was = _batching_of(folder, state, now, drop_last=drop_last)
    if was is None or was == now:
        epoch, updates = divmod(step, counts.steps_per_epoch)
        batches = updates * now.accumulation
        return StoredPosition(
            step, DataPosition(epoch, batches, batches * now.batch * now.world_size), was
        )
    done, whole = _batches_done(was, state, drop_last=drop_last)
    epoch, batches = divmod(done, whole)
    return StoredPosition(
        step, DataPosition(epoch, batches, batches * was.batch * was.world_size), was
    )


def _batching_of(
    folder: Path, state: Mapping[str, Any], now: Batching, *, drop_last: bool
) -> Batching | None:
    """Return how epochs were batched; None: nothing in the checkpoint tells."""
    batch, epoch = state.get("train_batch_size"), state.get("epoch")
    if not isinstance(batch, int) or not isinstance(epoch, int | float) or now.length is None:
        return None
    was = replace(now, batch=batch, world_size=len(rng_files(folder)))
    done, whole = _batches_done(was, state, drop_last=drop_last)
    for accumulation in (now.accumulation, *range(1, whole + 1)):
        steps = done // whole * -(-whole // accumulation) + -(-(done % whole) // accumulation)
        if steps == state["global_step"] and done % whole % accumulation == 0:
            return replace(was, accumulation=accumulation)
    return None


def _batches_done(
    batching: Batching, state: Mapping[str, Any], *, drop_last: bool
) -> tuple[int, int]:
    """Return how many batches each rank has done, and how many an epoch has."""
    batches = divided(batching.length or 0, batching.batch, down=drop_last)
    whole = max(1, divided(batches, batching.world_size, down=drop_last))
    return round(state["epoch"] * whole), whole


def divided(number: int, by: int, *, down: bool) -> int:
    """Return a quotient, rounded down or up.

    Example:
        >>> divided(7, 2, down=True), divided(7, 2, down=False)
        (3, 4)
    """
    return number // by if down else -(-number // by)
