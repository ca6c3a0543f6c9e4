"""Going on from a checkpoint of the host's own Trainer, exactly as that would.

Its files are read by `torch.load(weights_only=True)`, which runs no code that a file names but
for a list of constructors of tensors and arrays.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from unbroken.adapters.transformers.adapters_of_peft import load_adapter, tensors_of_adapter
from unbroken.adapters.transformers.stock_folder import (
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    read_state,
    read_stock,
    reading,
    rng_files,
    shapes_in,
    weight_files,
)
from unbroken.errors import StateMismatchError


def refuse_what_does_not_fit(folder: Path, objects: Mapping[str, Any]) -> None:
    """Raise unless `load_stock` can put the whole checkpoint into the objects; none is changed.

    Args:
        folder: It was looked through by `problem_of_stock`.
        objects: As `load_stock` takes them.

    Raises:
        StateMismatchError: Weights or optimizer do not fit what is here.
        CorruptCheckpointError: A file was damaged since.
    """
    _check_weights(folder, objects["model"])
    _check_optimizer(folder, objects["optimizer"])


def missing_devices_of_stock(folder: Path, *, rank: int = 0) -> tuple[int, int] | None:
    """Return of how many CUDA devices there are random states, and how many are here, if fewer.

    On a machine that has none at all, the host leaves them alone without a word.
    """
    found, here = len(_cuda_states(_rng_states(folder, rank))), torch.cuda.device_count()
    return (found, here) if torch.cuda.is_available() and found > here else None


def load_stock(folder: Path, objects: Mapping[str, Any], *, rank: int = 0) -> None:
    """Put a stock checkpoint into live objects; the random generators last.

    Args:
        folder: `refuse_what_does_not_fit` has refused nothing of it.
        objects: "model", "optimizer", "scheduler" and perhaps "scaler".
        rank: Whose random state to take.

    Raises:
        CorruptCheckpointError: A file was damaged since; some objects were changed.
    """
    schedule = read_stock(folder, SCHEDULER)
    scaler = read_stock(folder, SCALER) if (folder / SCALER).exists() else None
    states = _rng_states(folder, rank)
    _load_weights(folder, objects["model"])
    with reading(folder / OPTIMIZER):
        objects["optimizer"].load_state_dict(read_stock(folder, OPTIMIZER))
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
            stored.update(load_file(file) if is_plain else read_stock(file.parent, file.name))
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
    """Return which names belong to modules without a way of their own to take their state."""
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
    state = read_stock(folder, OPTIMIZER, "meta")
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
    states: Mapping[str, Any] = read_stock(folder, files[min(rank, len(files) - 1)].name)
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


def facts_of_stock(folder: Path) -> dict[str, Any]:
    """Return what a stock checkpoint tells of how it was trained, as far as it does.

    Returns:
        "arguments": those that its optimizer and schedule were made with; "max_steps".
    """
    state, schedule = read_state(folder), read_stock(folder, SCHEDULER)
    groups = read_stock(folder, OPTIMIZER, "meta")["param_groups"]
    arguments = {"per_device_train_batch_size": state.get("train_batch_size")}
    if schedule.get("base_lrs"):
        arguments["learning_rate"] = schedule["base_lrs"][0]
    arguments["weight_decay"] = max(group.get("weight_decay", 0.0) for group in groups)
    if "betas" in groups[0]:
        arguments["adam_beta1"], arguments["adam_beta2"] = groups[0]["betas"]
        arguments["adam_epsilon"] = groups[0]["eps"]
    known = {name: value for name, value in arguments.items() if value is not None}
    return {"arguments": known, "max_steps": state["max_steps"]}
