"""What is read again up to a place is held against what was read before the kill."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, WeightedRandomSampler

from data.data_sets import bytes_of, read, source_of
from unbroken.data import batch_source
from unbroken.data.sources.batch_digests import BatchDigest, EpochDigests, drawn_from
from unbroken.errors import DataError

N = 20  # five batches of four


class Lines(IterableDataset):
    """A stream over a file, in the order of a generator in the object."""

    def __init__(self, path, rng) -> None:
        self.path, self.rng = path, rng

    def __iter__(self):
        lines = self.path.read_text().split()
        self.rng.shuffle(lines)
        yield from (torch.tensor([float(line)]) for line in lines)


class InOrder(Lines):
    def __init__(self, path) -> None:
        super().__init__(path, None)

    def __iter__(self):
        yield from (torch.tensor([float(line)]) for line in self.path.read_text().split())


class ShuffleBuffer(Lines):
    def __iter__(self):
        buffer = []
        for line in self.path.read_text().split():
            buffer.append(line)
            if len(buffer) > 4:
                yield torch.tensor([float(buffer.pop(self.rng.randrange(4)))])
        yield from (torch.tensor([float(line)]) for line in buffer)


class Counting(Sampler):
    """Shuffles by a count of its own passes."""

    def __init__(self) -> None:
        self.passes = 0

    def __len__(self) -> int:
        return N

    def __iter__(self):
        order = [*range(N)]
        random.Random(self.passes).shuffle(order)
        self.passes += 1
        return iter(order)


class LossWeighted(Counting):
    """Its weights are what training makes of them."""

    def __init__(self) -> None:
        self.losses = torch.ones(N)

    def __iter__(self):
        return iter(torch.multinomial(self.losses, N).tolist())


def numbered(sampler) -> DataLoader:
    return DataLoader(torch.arange(float(N)).unsqueeze(1), batch_size=4, sampler=sampler)


def closure():
    rng = random.Random(5)

    def batches():
        for number in rng.sample(range(N), 5):
            yield torch.full((4, 1), float(number))

    return batches


RNG = np.random.default_rng(6)


def by_a_global():
    for number in RNG.permutation(5):
        yield torch.full((4, 1), float(number))


def fresh_global():
    RNG.bit_generator.state = np.random.default_rng(6).bit_generator.state
    return by_a_global


OF_THEIR_OWN = {
    "random.Random": lambda path: Lines(path, random.Random(1)),
    "numpy's Generator": lambda path: Lines(path, np.random.default_rng(1)),
    "numpy's RandomState": lambda path: Lines(path, np.random.RandomState(1)),
    "in a loader": lambda path: DataLoader(Lines(path, random.Random(1)), batch_size=4),
    "a shuffle buffer": lambda path: ShuffleBuffer(path, random.Random(1)),
    "a closure": lambda path: closure(),
    "a global": lambda path: fresh_global(),
    "a sampler that counts its passes": lambda path: numbered(Counting()),
}


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text("\n".join(map(str, range(N))))
    return path


def place_after(data, used: int) -> dict:
    source = source_of(data)
    read(source, used)
    return source.state_dict()


@pytest.mark.parametrize("used", [3, 5, 8, 10])
@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_data_go_on_with_the_generator_that_they_hold_in_every_epoch(name, used, lines):
    make = OF_THEIR_OWN[name]
    whole = bytes_of(read(source_of(make(lines)), used + 6))
    state = place_after(make(lines), used)
    again = source_of(make(lines))
    again.load_state_dict(state)
    assert whole.endswith(bytes_of(read(again, 6)))


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_batches_of_it_that_were_read_ahead_are_read_again(name, lines):
    make = OF_THEIR_OWN[name]
    whole = bytes_of(read(source_of(make(lines)), 9))
    killed, again = source_of(make(lines)), source_of(make(lines))
    batches = killed.iterate()
    for _ in range(3):
        killed.used(next(batches))
    for _ in range(3):  # into the next epoch
        next(batches)
    again.load_state_dict(killed.state_dict())
    assert whole.endswith(bytes_of(read(again, 6)))


@pytest.mark.parametrize("name", OF_THEIR_OWN)
def test_data_of_their_own_generator_are_exact_in_the_first_epoch_and_refused_in_later_ones(
    name, lines
):
    """Where no states of it are stored, as by older versions."""
    make = OF_THEIR_OWN[name]
    whole = bytes_of(read(source_of(make(lines)), 9))
    state = without_states(place_after(make(lines), 3))
    again = source_of(make(lines))
    again.load_state_dict(state)
    assert whole.endswith(bytes_of(read(again, 6)))
    state = without_states(place_after(make(lines), 8))
    later = source_of(make(lines))
    later.load_state_dict(state)
    with pytest.raises(DataError, match=r"epoch 1.*expected digest \w{16}, found digest \w{16}"):
        next(later.iterate())


def without_states(state: dict) -> dict:
    return {name: value for name, value in state.items() if name not in ("generators", "order")}


def test_the_generator_that_differs_is_named(lines):
    again = source_of(OF_THEIR_OWN["in a loader"](lines))
    again.load_state_dict(without_states(place_after(OF_THEIR_OWN["in a loader"](lines), 8)))
    with pytest.raises(DataError, match=r"another state of dataset\.rng") as caught:
        next(again.iterate())
    assert "which are keyed" in caught.value.hint
    assert 'allow=["data"]' in caught.value.hint


class Noisy:
    """A collator that draws from a generator of its own, or from one that is keyed."""

    def __init__(self, own: bool) -> None:
        self.rng = random.Random(3) if own else random

    def __call__(self, samples):
        return torch.stack(samples) + self.rng.random()


@pytest.mark.parametrize("used", [3, 8])
def test_a_collator_of_a_stream_makes_the_same_batch_again_or_is_refused(used, lines):
    keyed = [source_of(InOrder(lines), collate_fn=Noisy(own=False)) for _ in range(3)]
    whole = bytes_of(read(keyed[0], used + 4))
    read(keyed[1], used)
    keyed[2].load_state_dict(keyed[1].state_dict())
    assert whole.endswith(bytes_of(read(keyed[2], 4)))
    own = [source_of(InOrder(lines), collate_fn=Noisy(own=True)) for _ in range(2)]
    read(own[0], used)
    own[1].load_state_dict(own[0].state_dict())
    with pytest.raises(DataError, match="the collator's batch of items up to"):
        next(own[1].iterate())


@pytest.mark.parametrize("change", [1e-6, 5.0], ids=["hardly", "much"])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: WeightedRandomSampler(torch.ones(N, dtype=torch.float64), N), "weights"),
    ],
)
def test_an_order_is_not_drawn_anew_from_weights_that_training_has_changed(make, name, change):
    """As a sampler whose weights are saved with the run and restored in mid-epoch."""
    sampler = make()
    weights = getattr(sampler, name)
    source = source_of(numbered(sampler))
    read(source, 2)
    weights[:10] += change
    again = source_of(numbered(make()))
    again.load_state_dict(source.state_dict())
    getattr(again._loader.loader.sampler, name).copy_(weights)
    with pytest.raises(
        DataError, match=rf"epoch 0 was drawn from another state of sampler\.{name}"
    ):
        next(again.iterate())


def trained(sampler: LossWeighted) -> tuple[dict, bytes]:
    """Change weights when an epoch is over; return that place, and what follows."""
    source = source_of(numbered(sampler))
    read(source, 5)
    sampler.losses[:10] += 5.0
    return source.state_dict(), bytes_of(read(source, 4))


def test_weights_that_are_saved_and_change_between_epochs_are_no_fault():
    sampler, again = LossWeighted(), LossWeighted()
    place, after = trained(sampler)
    again.losses.copy_(sampler.losses)
    resumed = source_of(numbered(again))
    resumed.load_state_dict(place)
    assert bytes_of(read(resumed, 4)) == after


def test_weights_of_a_sampler_of_the_users_own_are_saved_with_the_position():
    place, after = trained(LossWeighted())
    resumed = source_of(numbered(LossWeighted()))
    resumed.load_state_dict(place)
    assert bytes_of(read(resumed, 4)) == after


@pytest.mark.parametrize("used", [2, 5, 7])
def test_weights_that_training_changed_in_mid_epoch_stand_there_again(used):
    sampler = LossWeighted()
    source = source_of(numbered(sampler))
    read(source, used)
    sampler.losses[:10] += 5.0
    again = source_of(numbered(LossWeighted()))
    again.load_state_dict(source.state_dict())
    assert bytes_of(read(again, 8)) == bytes_of(read(source, 8))


def of_torch() -> WeightedRandomSampler:
    return WeightedRandomSampler(torch.ones(N, dtype=torch.float64), N)


def test_weights_of_a_sampler_of_torch_that_training_changes_and_nobody_saves_are_refused():
    sampler = of_torch()
    source = source_of(numbered(sampler))
    read(source, 5)
    sampler.weights[:10] += 5.0
    resumed = source_of(numbered(of_torch()))
    resumed.load_state_dict(source.state_dict())
    with pytest.raises(
        DataError, match=r"DataLoader\.sampler\.weights: is not what it was"
    ) as caught:
        next(resumed.iterate())
    assert "Save it with the run" in caught.value.hint


class NotingSampler(Counting):
    """Notes numbers of each of its passes, which draw nothing."""

    def __iter__(self):
        self.noted = np.random.rand(3)
        return iter(range(N))


@pytest.mark.parametrize("used", [3, 5])
@pytest.mark.parametrize("make", [NotingSampler, LossWeighted])
def test_a_save_in_an_epoch_when_the_next_one_has_begun_is_no_fault(make, used):
    """As a loop does that looks at the next batch before it breaks."""
    source = source_of(numbered(make()))
    batches = source.iterate()
    for _ in range(used):
        source.used(next(batches))
    ahead, place = next(batches).data, source.state_dict()
    again = source_of(numbered(make()))
    again.load_state_dict(place)
    assert torch.equal(next(again.iterate()).data, ahead)


def test_weights_that_nobody_saves_are_refused_when_the_next_epoch_has_begun():
    sampler = LossWeighted()
    source = source_of(numbered(sampler))
    batches = source.iterate()
    for _ in range(5):
        source.used(next(batches))
    sampler.losses[:10] += 5.0
    next(batches)
    again = source_of(numbered(LossWeighted()))
    again.load_state_dict(source.state_dict())
    with pytest.raises(DataError, match=r"LossWeighted\.losses.*something else than reading"):
        next(again.iterate())


def test_a_pass_that_is_left_off_between_two_batches_goes_on_there(caplog, lines):
    """As a loop does that asks for the batches of each epoch anew."""
    whole = bytes_of(read(source_of(Lines(lines, random.Random(1))), 9))
    source = source_of(Lines(lines, random.Random(1)))
    assert b"".join(bytes_of(read_on(source, 3)) for _ in range(3)) == whole
    assert "skipping" not in caplog.text


def read_on(source, count: int) -> list:
    batches = source.iterate()
    taken = [next(batches) for _ in range(count)]
    source.used(taken[-1])
    return taken


def test_a_pass_that_was_read_further_than_used_is_read_again(caplog):
    source = source_of(numbered(None))
    batches = source.iterate()
    used, ahead = next(batches), next(batches)
    source.used(used)
    assert torch.equal(next(source.iterate()).data, ahead.data)
    assert "skipping 1 items" in caplog.text


@pytest.mark.parametrize(("line", "items"), [(0, "0 to 3"), (7, "4 to 7"), (9, None)])
def test_a_file_that_changed_is_refused_where_it_was_read(line, items, lines):
    state = place_after(InOrder(lines), 2)
    numbers = [*map(str, range(N))]
    numbers[line] = "99"
    lines.write_text("\n".join(numbers))
    again = source_of(InOrder(lines))
    again.load_state_dict(state)
    if items is None:
        assert next(again.iterate()).data[1] == 99
        return
    with pytest.raises(DataError, match=f"items {items} of epoch 0: what is read again is not"):
        next(again.iterate())


def test_a_named_change_goes_on_with_what_the_data_give_now(lines):
    state = place_after(Lines(lines, random.Random(1)), 8)
    options = {"seed": 42, "global_batch_size": 8, "micro_batch_size": 4}
    named = batch_source(Lines(lines, random.Random(1)), may_change=["trail"], **options)
    told = batch_source(Lines(lines, random.Random(1)), **options)
    told.accept_other_data()
    for source in (named, told):
        source.load_state_dict(state)
    assert bytes_of(read(named, 2)) == bytes_of(read(told, 2))


def test_a_place_that_an_older_version_saved_is_no_difference(lines):
    state = place_after(Lines(lines, random.Random(1)), 8)
    del state["trail"]
    again = source_of(Lines(lines, random.Random(1)))
    again.load_state_dict(state)
    assert len(read(again, 2)) == 2


@dataclass
class Pair:
    x: torch.Tensor
    y: dict


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x) -> None:
        self.x = x


BATCHES = {
    "a tensor": lambda x: x,
    "a dict of lists": lambda x: {"ids": [x, x + 1], "name": "a"},
    "a dataclass": lambda x: Pair(torch.ones(2), {"y": x}),
    "an object with slots": lambda x: Slotted(x),
    "an array": lambda x: x.numpy(),
    "half precision": lambda x: x.bfloat16(),
    "no dimension": lambda x: x.sum(),
    "with a gradient": lambda x: x.clone().requires_grad_(),
    "truths": lambda x: x > 1.5,
    "dates": lambda x: x.long().numpy().astype("datetime64[s]"),
    "a view": lambda x: x.repeat(4, 1).t(),
    "sparse": lambda x: torch.diag(x).to_sparse(),
    "complex": lambda x: torch.complex(x, x).conj(),
    "a large one": lambda x: x.repeat(40_000).reshape(100, -1),
    "a large view": lambda x: x.repeat(40_000).reshape(-1, 100).t(),
    "numbers": lambda x: {"n": x.tolist(), "text": "a"},
}


def digest(batch) -> str | None:
    seen = BatchDigest()
    seen.add(batch)
    return seen.text()


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_kind_are_told_apart(kind):
    make, one = BATCHES[kind], torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert digest(make(one)) == digest(make(one.clone()))
    assert digest(make(one)) != digest(make(one + 1)) is not None


@pytest.mark.parametrize("shape", [(100, 1600), (64, 3, 40, 40), (8, 100_000)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_something_of_every_sample_of_a_large_batch_counts(dtype, shape):
    batch = torch.zeros(shape, dtype=dtype)
    before = digest(batch)
    for sample in batch:
        sample.fill_(1)
        assert digest(batch) != before
        sample.fill_(0)


def test_a_batch_with_nothing_to_compare_has_no_digest():
    assert digest(object()) is None
    assert digest([]) is None
    assert digest(torch.ones(0, 3)) != digest(torch.ones(3, 0))


def passed(seed: int, trail=None) -> EpochDigests:
    """Read two batches, between which the generator moves."""
    rng = random.Random(seed)
    found = EpochDigests("stream", {"rng": rng}, trail)
    for batch in ([1.0], [2.0]):
        found.add(batch)
        rng.random()
    return found


def test_an_order_is_held_against_what_it_was_drawn_from_when_its_first_batch_came():
    trail = passed(1).trail(2)
    assert trail["drawn_from"] == drawn_from({"rng": random.Random(1)})
    assert passed(1, trail).trail(2) == trail
    with pytest.raises(DataError, match="drawn from another state of rng"):
        passed(2, trail)


def test_an_epoch_that_ends_before_the_place_that_it_is_read_up_to_is_refused():
    first = EpochDigests("stream", {})
    for number in range(3):
        first.add([number])
    again = EpochDigests("stream", {}, first.trail(3))
    again.add([0])
    with pytest.raises(DataError, match="shorter than when it was saved: expected at least 3"):
        again.end()
    again.add([1])
    again.add([2])
    again.end()
