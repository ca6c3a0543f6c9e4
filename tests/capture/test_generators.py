"""Random generators go on with the same numbers, cached ones included."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from capture.round_trip import carry, loaded, stored
from unbroken.capture import capture, capture_rng, restore_rng
from unbroken.errors import CaptureError, StateMismatchError

BIT_GENERATORS = [
    np.random.MT19937,
    np.random.PCG64,
    np.random.PCG64DXSM,
    np.random.Philox,
    np.random.SFC64,
]


def from_python(generator):
    return [generator.random(), generator.gauss(), generator.getrandbits(70)]


def from_numpy(generator):
    return [*generator.standard_normal(3), *generator.integers(2**31, size=3, dtype=np.uint32)]


def from_legacy(generator):
    return [generator.randint(1000), generator.randn(), generator.rand()]


def from_torch(generator):
    return [*torch.randn(3, generator=generator).tolist(), torch.rand((), generator=generator)]


GENERATORS = {
    "random.Random": (random.Random, from_python),
    "torch.Generator": (lambda seed: torch.Generator().manual_seed(seed), from_torch),
    **{
        kind.__name__: (lambda seed, kind=kind: np.random.Generator(kind(seed)), from_numpy)
        for kind in BIT_GENERATORS
    },
    **{
        f"RandomState of {kind.__name__}": (
            lambda seed, kind=kind: np.random.RandomState(kind(seed)),
            from_legacy,
        )
        for kind in BIT_GENERATORS
    },
}


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=GENERATORS)
def test_it_goes_on_with_the_same_numbers(make, draw):
    source, target = make(1), make(2)
    draw(source)
    carry({"generator": source}, {"generator": target})
    assert draw(target) == draw(source)


@pytest.mark.parametrize(("make", "draw"), GENERATORS.values(), ids=GENERATORS)
def test_its_seed_alone_would_not_do(make, draw):
    source = make(1)
    draw(source)
    assert draw(source) != draw(make(1))


def test_a_numpy_generator_spawns_the_same_children():
    source, target = np.random.default_rng(1), np.random.default_rng()
    source.spawn(3)
    carry({"generator": source}, {"generator": target})
    assert target.spawn(1)[0].random() == source.spawn(1)[0].random()


def test_another_bit_generator_is_refused():
    source, target = (np.random.Generator(kind(1)) for kind in BIT_GENERATORS[:2])
    with pytest.raises(StateMismatchError, match="expected MT19937, found PCG64"):
        carry({"generator": source}, {"generator": target})


def test_a_generator_of_the_system_is_refused():
    with pytest.raises(CaptureError, match="it has no state"):
        capture({"generator": random.SystemRandom()})


def users_generators():
    """Draw from every generator of the process."""
    return [*from_python(random), *from_legacy(np.random), *from_torch(None)]


@pytest.fixture(autouse=True)
def _untouched():
    state = capture_rng()
    yield
    restore_rng(state)


def test_the_ambient_generators_go_on_with_the_same_numbers():
    users_generators()
    state = loaded(stored(capture_rng()))
    first = users_generators()
    assert users_generators() != first
    restore_rng(state)
    assert users_generators() == first


def test_capturing_moves_no_generator():
    state = capture_rng()
    capture_rng()
    first = users_generators()
    restore_rng(state)
    assert users_generators() == first


def test_the_state_in_memory_does_not_move_with_the_generators():
    state = capture_rng()
    first = users_generators()
    restore_rng(state)
    restore_rng(state)
    assert users_generators() == first


def test_the_kind_of_the_ambient_numpy_generator_comes_back():
    previous = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    state = loaded(stored(capture_rng()))
    first = users_generators()
    np.random.set_bit_generator(previous)
    restore_rng(state)
    assert users_generators() == first
    np.random.set_bit_generator(previous)


def test_cuda_is_not_started_for_its_state():
    assert capture_rng()["cuda"] is None
    assert not torch.cuda.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_states_of_devices_that_are_not_here_are_refused_unless_told():
    state = {**capture_rng(), "cuda": [torch.zeros(16, dtype=torch.uint8)] * 2}
    first = users_generators()
    with pytest.raises(StateMismatchError, match=r"rng\.cuda: .* expected 2, found 0"):
        restore_rng(state)
    restore_rng(state, allow_missing_devices=True)
    assert users_generators() == first


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_state_of_every_cuda_device_comes_back():
    torch.cuda.init()
    state = loaded(stored(capture_rng()))
    first = torch.rand(5, device="cuda").tolist()
    restore_rng(state)
    assert torch.rand(5, device="cuda").tolist() == first
    assert [len(s) for s in state["cuda"]] == [16] * torch.cuda.device_count()
