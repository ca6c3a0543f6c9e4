"""Random generators: their whole state, not their seed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from unbroken.capture.mismatch import Mismatch
from unbroken.capture.stored import load_tensors
from unbroken.capture.tree import Captured, State
from unbroken.errors import CaptureError, CorruptCheckpointError


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
    """Set another generator of its kind: that tells whether it is a state at all."""
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
