"""Random generators: their whole state, not their seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from unbroken.capture.state_tree import Captured, Mismatch, State, is_named
from unbroken.capture.stored_tensor import is_stored_tensor, load_tensors
from unbroken.errors import CaptureError, CorruptCheckpointError, StateMismatchError


def capture_torch(generator: torch.Generator, _path: str, _names: object) -> State:
    """Return the state of a torch generator on any device."""
    state = {"device": generator.device.type, "state": generator.get_state()}
    return state, {}


def check_torch(
    generator: torch.Generator, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Yield a mismatch if the generator is of another kind of device."""
    was, is_now = stored.state["device"], generator.device.type
    if was != is_now:
        yield Mismatch(path, "is a generator for another kind of device", was, is_now)
    elif is_now == "cpu":
        with _states_of(path):
            restore_torch(torch.Generator(), stored)


def is_torch_state(state: Any, _facts: Mapping[str, Any]) -> bool:
    """Return whether a decoded state is what `capture_torch` gives."""
    is_of_a_device = is_named(state) and isinstance(state.get("device"), str)
    return is_of_a_device and is_stored_tensor(state.get("state"))


def restore_torch(generator: torch.Generator, stored: Captured, *_: object) -> None:
    """Set the state of a torch generator."""
    generator.set_state(load_tensors(stored.state["state"], "cpu"))


def bit_generator_name(generator: np.random.Generator) -> str:
    """Return the name of the class of its bit generator."""
    return type(generator.bit_generator).__name__


def capture_numpy(generator: np.random.Generator, _path: str, _names: object) -> State:
    """Return the state of a NumPy generator, its count of spawned children included."""
    bits = generator.bit_generator
    state = {"bits": bits.state, "seed_sequence": _seed_sequence(bits)}
    return state, {}


def _seed_sequence(bits: np.random.BitGenerator) -> Any:
    sequence = bits.seed_seq
    return sequence.state if type(sequence) is np.random.SeedSequence else None


def is_numpy_state(state: Any, _facts: Mapping[str, Any]) -> bool:
    """Return whether a decoded state is what `capture_numpy` gives."""
    sequence = state.get("seed_sequence") if isinstance(state, dict) else ...
    return is_named(state) and is_named(state.get("bits")) and is_named(sequence or {})


def restore_numpy(generator: np.random.Generator, stored: Captured, *_: object) -> None:
    """Set the state of a NumPy generator."""
    bits: Any = generator.bit_generator
    state, sequence = stored.state["bits"], stored.state["seed_sequence"]
    if sequence is None or sequence == _seed_sequence(bits):
        bits.state = state
    else:
        bits.__setstate__((state, np.random.SeedSequence(**sequence)))


def check_numpy(
    generator: np.random.Generator, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Check the state by setting another generator of the same kind with it."""
    bits: Any = type(generator.bit_generator)
    if bits.__module__.startswith("numpy."):
        with _states_of(path):
            restore_numpy(np.random.Generator(bits(0)), stored)
    return iter(())


@contextmanager
def _states_of(path: str) -> Iterator[None]:
    """Turn what generators say of a state that is none into the error that names it."""
    try:
        yield
    except NO_STATE as error:
        what = "is not the state of a random generator"
        raise CorruptCheckpointError(path, what, found=str(error)) from error


NO_STATE = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError)
"""What the generators say of a state that is none; torch's has no class of its own."""


def legacy_name(generator: np.random.RandomState) -> str:
    """Return the name of the class of its bit generator."""
    return str(generator.get_state(legacy=False)["bit_generator"])


def capture_legacy(generator: np.random.RandomState, _path: str, _names: object) -> State:
    """Return the state of a legacy NumPy generator, its cached Gaussian included."""
    return generator.get_state(legacy=False), {}


def restore_legacy(generator: np.random.RandomState, stored: Captured, *_: object) -> None:
    """Set the state of a legacy NumPy generator."""
    generator.set_state(stored.state)


def check_legacy(
    generator: np.random.RandomState, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """As `check_numpy`."""
    bits: Any = getattr(np.random, legacy_name(generator), None)
    if bits is not None:
        with _states_of(path):
            restore_legacy(np.random.RandomState(bits(0)), stored)
    return iter(())


def capture_python(generator: random.Random, path: str, _names: object) -> State:
    """Return the state of a Python generator, its cached Gaussian included."""
    if isinstance(generator, random.SystemRandom):
        raise CaptureError(path, "draws from the operating system: it has no state to store")
    if type(generator) is not random.Random:
        return generator.getstate(), {}
    return python_state(generator.getstate()), {}


def check_python(
    generator: random.Random, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """As `check_numpy`; what a class of the user's own takes is its own matter."""
    if type(generator) is random.Random:
        with _states_of(path):
            restore_python(random.Random(0), stored)  # noqa: S311 (draws nothing)
    return iter(())


def restore_python(generator: random.Random, stored: Captured, *_: object) -> None:
    """Set the state of a Python generator."""
    if type(generator) is not random.Random:
        generator.setstate(load_tensors(stored.state))
    else:
        generator.setstate(python_getstate(stored.state))


def python_state(state: tuple[Any, ...]) -> dict[str, Any]:
    """Return what `random.getstate` gives, its 625 words as an array."""
    version, words, gauss_next = state
    return {"version": version, "words": np.array(words, np.uint32), "gauss_next": gauss_next}


def python_getstate(state: dict[str, Any]) -> tuple[Any, ...]:
    """Return what `random.setstate` takes."""
    return state["version"], tuple(state["words"].tolist()), state["gauss_next"]


# The ambient random state of the process: Python, NumPy, torch on every device.


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
