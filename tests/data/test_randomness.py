from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from data.data_sets import NoisyDataset, draws
from unbroken.data import KeyedDataset, KeyedRandom, SampleKey, derive_key, keyed_random
from unbroken.errors import ConfigError

KEYS = [SampleKey(3, 0, 0), SampleKey(1, 0, 1), SampleKey(3, 1, 2)]


def users_generators() -> tuple[object, ...]:
    numpy = np.random.get_state(legacy=False)
    numpy["state"] = (numpy["state"]["key"].tobytes(), numpy["state"]["pos"])
    return random.getstate(), numpy, torch.get_rng_state().numpy().tobytes()


def shuffled_generators() -> None:
    """Bring the ambient generators to an odd place, with half a Gaussian pair kept back."""
    draws()
    random.gauss()
    np.random.randn()


def test_the_same_key_gives_the_same_draws():
    with keyed_random(5):
        first = draws()
    shuffled_generators()
    with keyed_random(5):
        assert draws() == first


def test_each_key_gives_draws_of_its_own():
    with KeyedRandom() as rng:
        seen = []
        for key in (0, 1, 2**32 + 2, 2**64 - 1):
            rng.seed(key)
            seen.append(draws())
    assert len({draw for drawn in seen for draw in drawn}) == 4 * 5


def test_the_draws_are_the_same_for_ever():
    with keyed_random(5):
        assert (random.random(), np.random.rand()) == (0.6229016948897019, 0.06968224910176679)


def test_python_and_numpy_do_not_draw_the_same_numbers():
    """Both seed a Mersenne Twister alike: with one key for both, they would."""
    with keyed_random(2**63 + 12345):
        assert random.random() != np.random.rand()


def test_a_seed_does_not_depend_on_what_was_drawn_before_it():
    with KeyedRandom() as rng:
        rng.seed(1)
        random.gauss(), np.random.randn(), torch.randn(3)
        rng.seed(2)
        after_draws = draws()
        rng.seed(2)
        assert draws() == after_draws


def test_the_ambient_generators_are_left_exactly_as_they_were():
    shuffled_generators()
    before = users_generators()
    with keyed_random(5):
        draws()
        assert users_generators() != before
    assert users_generators() == before


def test_the_ambient_generators_are_left_alone_when_the_body_raises():
    before = users_generators()
    with pytest.raises(ZeroDivisionError), keyed_random(5):
        draws()[0] / 0
    assert users_generators() == before


def test_one_scope_serves_again_and_again():
    rng = KeyedRandom()
    before = users_generators()
    for _ in range(2):
        with rng:
            rng.seed(3)
    assert users_generators() == before


def test_a_scope_inside_itself_is_refused():
    with KeyedRandom() as rng, pytest.raises(ConfigError, match="already open"):
        rng.__enter__()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_cuda_generator_is_keyed_and_left_as_it_was():
    before = torch.cuda.get_rng_state().numpy().tobytes()
    with keyed_random(5, cuda=True) as rng:
        first = torch.rand(3, device="cuda").tolist()
        rng.seed(5)
        assert torch.rand(3, device="cuda").tolist() == first
    assert torch.cuda.get_rng_state().numpy().tobytes() == before


def test_noise_belongs_to_seed_epoch_and_index():
    sample = KeyedDataset(NoisyDataset(5), seed=7).__getitems__([SampleKey(3, 2, 13)])[0]
    with keyed_random(derive_key(7, "sample", 2, 3)):
        assert sample.tolist() == [3, *draws()]


def test_a_sample_is_the_same_in_any_batch():
    data = KeyedDataset(NoisyDataset(5), seed=0)
    together = data.__getitems__(KEYS)
    alone = torch.cat([data.__getitems__([key]) for key in KEYS])
    assert together.numpy().tobytes() == alone.numpy().tobytes()


def test_a_sample_is_another_in_another_epoch():
    batch = KeyedDataset(NoisyDataset(5), seed=0).__getitems__(KEYS)
    assert batch[0, 0] == batch[2, 0]
    assert (batch[0, 1:] != batch[2, 1:]).all()


def test_reading_a_batch_leaves_the_ambient_generators_as_they_were():
    before = users_generators()
    KeyedDataset(NoisyDataset(5), 0, collate_fn=lambda samples: draws()).__getitems__(KEYS)
    assert users_generators() == before


def test_the_collator_is_keyed_by_the_place_of_its_batch():
    data = KeyedDataset([0, 1, 2, 3], seed=0, collate_fn=lambda samples: draws())
    assert data.__getitems__(KEYS) == data.__getitems__(KEYS[:1])
    assert data.__getitems__(KEYS) != data.__getitems__(KEYS[1:])


class Declared(NoisyDataset):
    deterministic = True

    def __getitems__(self, indices):
        return [torch.tensor([index, *draws()]) for index in indices]


def test_a_data_set_that_declares_itself_deterministic_is_not_seeded():
    """The negative control: unkeyed, the same sample is another each time."""
    data = KeyedDataset(Declared(5), seed=0)
    assert not torch.equal(data.__getitems__(KEYS), data.__getitems__(KEYS))


class Batched(Declared):
    deterministic = False


def test_getitems_of_a_random_data_set_is_not_used():
    data = KeyedDataset(Batched(5), seed=0)
    first = data.__getitems__(KEYS)
    assert torch.equal(first[:1], data.__getitems__(KEYS[:1]))
