"""The folder of a checkpoint that the host's own Trainer wrote: what is in it, and whether whole.

It has no digests. What can be told is told: files that are missing or cut short, JSON that does
not parse, and the CRC-32 that each entry of a `torch.save` archive has.
"""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.pt"
SCHEDULER = "scheduler.pt"
SCALER = "scaler.pt"
_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SIGNS = (STATE, OPTIMIZER, SCHEDULER, "training_args.bin", *_WEIGHTS, *_INDICES)


_SIGNS_OF_DAMAGE = (
    *(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, struct.error),
    *(NotImplementedError, RuntimeError),  # of zipfile: damage looks like encryption, say
)


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
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state.get("global_step"), int):
            return f"{STATE} has no global_step"
        engine = _written_by(folder)
        if engine is not None:
            return f"{engine} wrote the optimizer in a way of its own, which is not read here"
        for file in (*weight_files(folder), folder / OPTIMIZER, folder / SCHEDULER):
            _check(file)
        if not rng_files(folder):
            return "rng_state.pth is missing"
        for file in rng_files(folder):
            _check(file)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except _SIGNS_OF_DAMAGE as error:
        return str(error)
    return None


def _written_by(folder: Path) -> str | None:
    """Return which engine keeps its own files in a checkpoint; None: none does."""
    if any(folder.glob("pytorch_model_fsdp*")) or (folder / "optimizer_0").is_dir():
        return "FSDP under transformers' own Trainer"
    return "DeepSpeed" if (folder / "latest").is_file() else None


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights: one, or those that an index lists.

    Raises:
        FileNotFoundError: There are none.
        ValueError: The index is damaged.
    """
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
    for name in _INDICES:
        if (folder / name).exists():
            index: Any = json.loads((folder / name).read_text(encoding="utf-8"))
            return [folder / part for part in sorted(set(index["weight_map"].values()))]
    raise FileNotFoundError(2, "no weights", str(folder / _WEIGHTS[0]))


def rng_files(folder: Path) -> list[Path]:
    """Return the files with random states: one, or one for each rank, by rank."""
    if (folder / "rng_state.pth").exists():
        return [folder / "rng_state.pth"]
    found = folder.glob("rng_state_*.pth") if folder.is_dir() else ()
    return sorted(found, key=lambda path: (len(path.name), path.name))


def _check(file: Path) -> None:
    if file.suffix == ".safetensors":
        _check_safetensors(file)
        return
    with zipfile.ZipFile(file) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{file.name} is damaged: {damaged} has another CRC-32")


def _check_safetensors(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            raise ValueError(f"{file.name} ends too early")
        header: Any = json.loads(opened.read(struct.unpack("<Q", start)[0]))
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        expected = opened.tell() + max(ends, default=0)
    if file.stat().st_size != expected:
        raise ValueError(f"{file.name} ends too early")
