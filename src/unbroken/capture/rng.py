"""The ambient random state of the process: Python, NumPy, torch on every device."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from unbroken.capture.generators import NO_STATE, python_getstate, python_state
from unbroken.capture.stored import load_tensors
from unbroken.errors import CorruptCheckpointError, StateMismatchError

_BIT_GENERATORS: Mapping[str, Callable[[], np.random.BitGenerator]] = {
    "MT19937": np.random.MT19937,
    "PCG64": np.random.PCG64,
    "PCG64DXSM": np.random.PCG64DXSM,
    "Philox": np.random.Philox,
    "SFC64": np.random.SFC64,
}


def capture_rng() -> dict[str, Any]:
    """Return the whole state of every ambient random generator; none of them is moved.

    CUDA is not initialized for this: a process that has not used it has no state there yet.

    Returns:
        A state tree: "python", "numpy", "torch" (uint8 tensor of 5,056 bytes), "cuda" (one uint8
        tensor of 16 bytes a device, or None) and "mps" (or None).

    Example:
        >>> state = capture_rng()
        >>> first = random.random()
        >>> restore_rng(state)
        >>> random.random() == first
        True
    """
    return {
        "python": python_state(random.getstate()),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": _cuda_states(),
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def _cuda_states() -> list[torch.Tensor] | None:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return None
    return [generator.get_state() for generator in torch.cuda.default_generators]


def restore_rng(tree: Mapping[str, Any], *, allow_missing_devices: bool = False) -> None:
    """Set every ambient random generator to the state captured.

    Args:
        tree: What `capture_rng` returned; its tensors may be stored ones.
        allow_missing_devices: Leave out states of devices that this machine lacks.

    Raises:
        StateMismatchError: This machine lacks a device of the checkpoint, or its NumPy the kind of
            generator; nothing was changed.
    """
    state = load_tensors(tree, "cpu")
    check_rng(state, allow_missing_devices=allow_missing_devices)
    cuda, mps = state["cuda"] or [], state["mps"]
    _set_numpy(state["numpy"])
    random.setstate(python_getstate(state["python"]))
    torch.set_rng_state(state["torch"])
    for index, device_state in enumerate(cuda[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(device_state, index)
    if mps is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(mps)


def check_rng(tree: Mapping[str, Any], *, allow_missing_devices: bool = False) -> None:
    """Raise unless `restore_rng` can set all generators; none of them is moved.

    Args:
        tree: What `capture_rng` returned, its tensors loaded.
        allow_missing_devices: As `restore_rng` takes it.

    Raises:
        CorruptCheckpointError: Something in it is no state of a generator.
        StateMismatchError: As `restore_rng`.
    """
    try:
        cuda, kind = tree["cuda"] or [], tree["numpy"]["bit_generator"]
        is_known = kind in _BIT_GENERATORS
        if is_known:
            np.random.RandomState(_BIT_GENERATORS[kind]()).set_state(dict(tree["numpy"]))
        random.Random().setstate(python_getstate(tree["python"]))  # noqa: S311 (draws nothing)
        torch.Generator().set_state(tree["torch"])
        is_listed = all(isinstance(one, torch.Tensor) for one in cuda) and "mps" in tree
    except NO_STATE as error:
        what = "is not the state of the random generators"
        raise CorruptCheckpointError("rng", what, found=str(error)) from error
    if not is_listed:
        raise CorruptCheckpointError("rng", "is not the state of the random generators")
    if not is_known and kind != np.random.get_state(legacy=False)["bit_generator"]:
        what = "is of a kind of generator that is unknown here"
        raise StateMismatchError("rng.numpy", what, expected=kind)
    if not allow_missing_devices:
        _check_devices(tree)


def missing_devices(tree: Mapping[str, Any]) -> tuple[str, int, int] | None:
    """Return of which devices there are states, how many, and how many are here; None: enough."""
    cuda, here = len(tree["cuda"] or []), torch.cuda.device_count()
    if cuda > here:
        return "rng.cuda", cuda, here
    if tree["mps"] is not None and not torch.backends.mps.is_available():
        return "rng.mps", 1, 0
    return None


def of_devices_here(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return random states without those of devices that this machine lacks."""
    cuda = (tree["cuda"] or [])[: torch.cuda.device_count()]
    mps = tree["mps"] if torch.backends.mps.is_available() else None
    return {**tree, "cuda": cuda, "mps": mps}


def _check_devices(tree: Mapping[str, Any]) -> None:
    missing = missing_devices(tree)
    if missing is not None:
        where, expected, found = missing
        what = "has random states of more devices than are here"
        hint = "restore_rng(..., allow_missing_devices=True) goes on without; random numbers differ"
        raise StateMismatchError(where, what, expected=expected, found=found, hint=hint)


def _set_numpy(state: Mapping[str, Any]) -> None:
    """Set NumPy's legacy generator, of whatever kind it was."""
    kind = state["bit_generator"]
    if kind != np.random.get_state(legacy=False)["bit_generator"]:
        np.random.set_bit_generator(_BIT_GENERATORS[kind]())  # type: ignore[attr-defined]
    np.random.set_state(dict(state))
