"""A checkpoint of ours written as the host's own Trainer writes one, so that it goes on from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from unbroken.adapters.transformers.stock_folder import OPTIMIZER, SCALER, SCHEDULER
from unbroken.capture import decode, load_tensors, structure_from_bytes
from unbroken.capture.generators import python_getstate
from unbroken.errors import ConfigError
from unbroken.store import CheckpointReader

_OURS = ("state.", "optimizer.", "buffers.")


def export_stock(reader: CheckpointReader, target: Path) -> None:
    """Write a checkpoint in the layout of the host's own Trainer: `resume_from_checkpoint=target`.

    Weights, configuration, tokenizer and trainer_state.json are copied; optimizer.pt,
    scheduler.pt and rng_state.pth are archives of `torch.save` with plain values and tensors.
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
    for file in reader.manifest.files:
        if not file.name.startswith(_OURS):
            source = reader.storage.describe(f"{reader.folder}/{file.name}")
            shutil.copyfile(source, partial / file.name)
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
    plain_states = _random_states(load_tensors(tree["rng"]))
    torch.save(plain_states, folder / "rng_state.pth")


def _by_position(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state as PyTorch files it: by the places of parameters in groups."""
    places: dict[str, int] = {}
    for group in state["param_groups"]:
        for name in group["params"]:
            places.setdefault(name, len(places))
    groups = [
        {**group, "params": [places[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {places[name]: moments for name, moments in state["state"].items()},
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
