"""Going on from a checkpoint of the host's own Trainer, exactly as that would.

Its files are read by `torch.load(weights_only=True)`, which runs no code that a file names but
for a list of constructors of tensors and arrays.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import Optimizer

from unbroken.adapters.transformers.stock_folder import (
    OPTIMIZER,
    SCALER,
    SCHEDULER,
    STATE,
    rng_files,
    weight_files,
)
from unbroken.errors import CorruptCheckpointError, StateMismatchError

_ARRAYS = [
    np._core.multiarray._reconstruct,  # type: ignore[attr-defined] # noqa: SLF001
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in (np.uint32, np.int64, np.float64)},
]
"""What an array of numbers is made by; NumPy's random state has one."""

_NOT_PLAIN: type[Exception] = torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined]


def read_stock(folder: Path, name: str) -> Any:
    """Return what a `torch.save` archive of a stock checkpoint holds.

    Raises:
        CorruptCheckpointError: It names code that it wants to run.
    """
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_ARRAYS):
            warnings.simplefilter("ignore")
            return torch.load(folder / name, map_location="cpu", weights_only=True)
    except _NOT_PLAIN as error:
        what = "holds more than numbers and plain values: reading it would run its code"
        raise CorruptCheckpointError(str(folder / name), what) from error


def load_stock(folder: Path, objects: Mapping[str, Any], *, rank: int = 0) -> None:
    """Put a stock checkpoint into live objects; the random generators last.

    Args:
        folder: It was looked through by `problem_of_stock`.
        objects: "model", "optimizer", "scheduler" and perhaps "scaler".
        rank: Whose random state to take.

    Raises:
        StateMismatchError: Weights or optimizer do not fit; some objects were changed.
    """
    _load_weights(folder, objects["model"])
    _load_optimizer(folder, objects["optimizer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loading a schedule without its optimizer
        objects["scheduler"].load_state_dict(read_stock(folder, SCHEDULER))
    if (folder / SCALER).exists() and "scaler" in objects:
        objects["scaler"].load_state_dict(read_stock(folder, SCALER))
    _load_rng(folder, rank)


def _load_weights(folder: Path, model: nn.Module) -> None:
    stored: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        one = load_file(file) if file.suffix == ".safetensors" else read_stock(folder, file.name)
        stored.update(one)
    if weight_files(folder)[0].name.startswith("adapter_"):
        _load_adapter(model, stored)
        return
    result = model.load_state_dict(stored, strict=False)
    here = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(here[name]) for name in stored if name in here}
    missing = [n for n in result.missing_keys if n not in here or id(here[n]) not in loaded]
    _refuse(folder, "has no weights for", missing)
    _refuse(folder, "has weights that the model does not know", result.unexpected_keys)


def _load_adapter(model: nn.Module, stored: dict[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, stored)


def _refuse(folder: Path, what: str, names: list[str]) -> None:
    if names:
        hint = "build the model as it was when the checkpoint was saved"
        raise StateMismatchError(str(folder), what, found=", ".join(names[:3]), hint=hint)


def _load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    state = read_stock(folder, OPTIMIZER)
    shapes = [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state["param_groups"] for n in group["params"]]
    _require(folder, "parameters", len(numbers), len(shapes))
    for number, shape in zip(numbers, shapes, strict=True):
        moments = state["state"].get(number, {})
        found = {tuple(v.shape) for v in moments.values() if isinstance(v, torch.Tensor) and v.ndim}
        if found and found != {shape}:
            _require(folder, f"moments of parameter {number}", sorted(found), [shape])
    optimizer.load_state_dict(state)


def _require(folder: Path, what: str, stored: Any, here: Any) -> None:
    if stored != here:
        where = f"{folder / OPTIMIZER}: {what}"
        raise StateMismatchError(where, "do not fit the optimizer", expected=stored, found=here)


def _load_rng(folder: Path, rank: int) -> None:
    files = rng_files(folder)
    states = read_stock(folder, files[min(rank, len(files) - 1)].name)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    cuda = states.get("cuda")
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda if isinstance(cuda, list) else [cuda])


def facts_of_stock(folder: Path) -> dict[str, Any]:
    """Return what a stock checkpoint tells of how it was trained, as far as it does.

    Returns:
        "arguments": those that its optimizer and schedule were made with; "max_steps".
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    schedule, groups = read_stock(folder, SCHEDULER), read_stock(folder, OPTIMIZER)["param_groups"]
    arguments = {"per_device_train_batch_size": state.get("train_batch_size")}
    if schedule.get("base_lrs"):
        arguments["learning_rate"] = schedule["base_lrs"][0]
    arguments["weight_decay"] = max(group.get("weight_decay", 0.0) for group in groups)
    if "betas" in groups[0]:
        arguments["adam_beta1"], arguments["adam_beta2"] = groups[0]["betas"]
        arguments["adam_epsilon"] = groups[0]["eps"]
    known = {name: value for name, value in arguments.items() if value is not None}
    return {"arguments": known, "max_steps": state["max_steps"]}
