"""A checkpoint of ours written as the host's own Trainer writes one, so that it goes on from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unbroken.adapters.transformers.hf_checkpoint import OPTIMIZER, SCALER, SCHEDULER
from unbroken.capture import decode, load_tensors, structure_from_bytes
from unbroken.capture.kinds.random_state import python_getstate
from unbroken.errors import ConfigError
from unbroken.store import CheckpointReader, export_weights
from unbroken.store.format.names import own_key, own_state_file

_OURS = ("state.", "optimizer.", "buffers.")


def export_hf_checkpoint(reader: CheckpointReader, target: Path) -> None:
    """Write a checkpoint in the layout of the host's own Trainer: `resume_from_checkpoint=target`.

    Weights, configuration, tokenizer and trainer_state.json are copied; optimizer.pt,
    scheduler.pt and rng_state.pth are archives of `torch.save` with plain values and tensors;
    of several ranks, each has its rng_state_<rank>.pth. Sharded weights are put together.
    Every byte of the checkpoint is checked first. training_args.bin, which the host does not
    read back, is left out.

    Args:
        reader: A checkpoint that our Trainer wrote.
        target: A folder that is not there; the host wants it to be called "checkpoint-<step>".

    Raises:
        ConfigError: The folder is there, or the checkpoint is not one of the host's Trainer.
        CorruptCheckpointError: The checkpoint is damaged.
    """
    if target.exists():
        raise ConfigError(str(target), "is there already", hint="name a folder that is not")
    if reader.manifest.facts.get("host") != "transformers":
        hint = "only what `unbroken.adapters.transformers.Trainer` saved has the host's state"
        where = reader.storage.describe(reader.folder)
        raise ConfigError(where, "has no state of the Hugging Face Trainer", hint=hint)
    reader.check_rest()
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    names = [file.name for file in reader.manifest.files if not file.name.startswith(_OURS)]
    if any(name.startswith("adapter_model.rank") for name in names):
        hint = "resume on one process, and export what it saves"
        raise ConfigError(reader.folder, "holds an adapter in shards", hint=hint)
    if any(name.startswith("model.rank") for name in names):
        export_weights(reader, partial)
    for name in names:
        if not name.startswith("model.rank"):
            shutil.copyfile(reader.storage.describe(f"{reader.folder}/{name}"), partial / name)
    _write_archives(reader, partial)
    os.rename(partial, target)


def _write_archives(reader: CheckpointReader, folder: Path) -> None:
    structure = structure_from_bytes(reader.read_file("state.json"), "state.json")
    tree = decode(structure, reader, lazy=True)
    plain_optimizer = _by_position(load_tensors(tree["optimizer"].state))
    torch.save(plain_optimizer, folder / OPTIMIZER)
    plain_schedule = load_tensors(tree["scheduler"].state)
    torch.save(plain_schedule, folder / SCHEDULER)
    if "scaler" in tree:
        plain_scaler = load_tensors(tree["scaler"].state)
        torch.save(plain_scaler, folder / SCALER)
    cut: Any = reader.manifest.facts.get("cut")
    ranks = cut["world_size"]
    for rank in range(ranks):
        own = _own_tree(reader, rank)
        plain_states = _random_states(load_tensors(own.get("rng", tree["rng"])))
        name = "rng_state.pth" if ranks == 1 else f"rng_state_{rank}.pth"
        torch.save(plain_states, folder / name)


def _own_tree(reader: CheckpointReader, rank: int) -> Mapping[str, Any]:
    """Return what a rank had of its own; nothing where it had the same as rank 0."""
    name = own_state_file(rank)
    if rank == 0 or name not in {file.name for file in reader.manifest.files}:
        return {}
    structure = structure_from_bytes(reader.read_file(name), name)
    tree: Mapping[str, Any] = decode(structure, reader, lazy=True)[own_key(rank)]
    return tree


def _by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as PyTorch files it: by the places of parameters in groups."""
    numbers: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            numbers.setdefault(name, len(numbers))
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {numbers[name]: moments for name, moments in state["state"].items()},
        "param_groups": groups,
    }


def _random_states(rng: Mapping[str, Any]) -> dict[str, Any]:
    legacy = rng["numpy"]
    states = {
        "python": python_getstate(rng["python"]),
        "numpy": (
            legacy["bit_generator"],
            legacy["state"]["key"],
            legacy["state"]["pos"],
            legacy["has_gauss"],
            legacy["gauss"],
        ),
        "cpu": rng["torch"],
    }
    if rng["cuda"]:
        states["cuda"] = rng["cuda"][0] if len(rng["cuda"]) == 1 else rng["cuda"]
    return states
