"""Samplers that count epochs, or keep what they have drawn, go on in any epoch of any loop."""

from __future__ import annotations

import copy
import itertools
import random
import signal
from collections import UserList, deque

import numpy as np
import pytest
import torch

from quiet.programs import trainer
from quiet.running import run
from unbroken.data.sources.order_state import OrderState
from unbroken.errors import DataError

SAMPLERS = """
import collections
class Order(torch.utils.data.Sampler):
    def __init__(self):
        self.epoch, self.order, self.pair = 0, list(range(20)), (0, 1)
        self.tensor, self.array = torch.arange(20), np.arange(20)
        self.torch, self.python = torch.Generator().manual_seed(7), random.Random(3)
    def __len__(self):
        return 20


class Counts(Order):
    def __iter__(self):
        self.epoch += 1
        draw = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(20, generator=draw).tolist())


class CountsAtTheEnd(Order):
    def __iter__(self):
        draw = torch.Generator().manual_seed(self.epoch)
        yield from torch.randperm(20, generator=draw).tolist()
        self.epoch += 1


class DrawsFromOneGenerator(Order):
    def __iter__(self):
        return iter(torch.randperm(20, generator=self.torch).tolist())


class DrawsOneByOne(Order):
    def __iter__(self):
        return (self.python.randrange(20) for _ in range(20))


class ShufflesItsList(Order):
    def __iter__(self):
        self.python.shuffle(self.order)
        return iter(list(self.order))


class TurnsItsTensors(Order):
    def __iter__(self):
        self.pair = (self.pair[1], sum(self.pair))
        self.tensor.copy_(self.tensor.roll(self.pair[1]))
        self.array[:] = self.array[::-1]
        return iter(self.tensor[self.array].tolist())


class Batches(Counts):
    def __len__(self):
        return 5
    def __iter__(self):
        yield from (list(part) for part in zip(*[super().__iter__()] * 4))


class Stream(torch.utils.data.IterableDataset):
    epoch = 0
    def __init__(self):
        self.epoch = 1
    def __iter__(self):
        self.epoch += 1
        draw = torch.Generator().manual_seed(self.epoch)
        return (pairs[i] for i in torch.randperm(20, generator=draw).tolist())
"""
SHUFFLED = "DataLoader(pairs[:20], batch_size=4, sampler={}(), num_workers={})"
LOADERS = {
    name: SHUFFLED.replace("{}", name, 1)
    for name in (
        *("Counts", "CountsAtTheEnd", "DrawsFromOneGenerator"),
        *("DrawsOneByOne", "ShufflesItsList", "TurnsItsTensors"),
    )
}
LOADERS["Batches"] = "DataLoader(pairs[:20], batch_sampler=Batches(), num_workers={})"
LOADERS["Stream"] = "DataLoader(Stream(), batch_size=4, num_workers={})"
STEPS = """
{before}
model = Net()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
class report: verdict, step, differences, notes = "", 0, (), ()
run = Checkpointer(FOLDER, data={data}, model=model, optimizer=optimizer, save_steps=2)
{loop}
"""
STEP = """
    F.cross_entropy(model(inputs), labels).backward()
    optimizer.step()
    optimizer.zero_grad()
    at(run.step)
"""
LOOPS = {
    "steps": STEPS.replace("{loop}", f"for inputs, labels in run.steps(until=14):{STEP}"),
    "epochs": STEPS.replace(
        "{loop}",
        "for epoch in run.epochs(3):\n  for inputs, labels in run.batches():"
        f"{STEP.replace(chr(10), chr(10) + '  ')}",
    ),
}
HIDDEN = """
class Counter:
    def __init__(self):
        self.n = 0
class Nested(Order):
    def __init__(self):
        super().__init__()
        self.counter, self.kept = Counter(), {"n": 0}
    def __iter__(self):
        self.counter.n += 1; self.kept["n"] += 2
        draw = torch.Generator().manual_seed(self.counter.n + self.kept["n"])
        return iter(torch.randperm(20, generator=draw).tolist())
number, numbers = 0, {"n": 0}
class OfAGlobal(Order):
    def __iter__(self):
        global number
        number += 1; numbers["n"] += 2
        draw = torch.Generator().manual_seed(number + numbers["n"])
        return iter(torch.randperm(20, generator=draw).tolist())
def drawn(seed):
    return iter(torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist())
class OfItsClass(Order):
    epochs, seen = 0, []
    def __iter__(self):
        OfItsClass.epochs += 1; self.seen.append(1)
        return drawn(self.epochs + 3 * len(self.seen))
class Slotted:
    __slots__ = ("n", "inner")
    def __init__(self, inner):
        self.n, self.inner = 0, inner
class Deep(Order):
    def __init__(self):
        super().__init__()
        self.outer = Slotted([Counter(), {"a": Slotted(Counter())}])
    def __iter__(self):
        first, second = self.outer.inner[0], self.outer.inner[1]["a"]
        self.outer.n += 1; first.n += 2; second.n += 3
        return drawn(self.outer.n + first.n + second.n)
helped = 0
def step_of_helper():
    global helped
    helped += 1
class ByAHelper(Order):
    def advance(self):
        step_of_helper()
    def __iter__(self):
        self.advance()
        return drawn(helped)
class ByADefault(Order):
    def __iter__(self, passes=[]):
        passes.append(1)
        return drawn(len(passes))
class InContainers(Order):
    def __init__(self):
        super().__init__()
        self.done, self.last, self.pools = set(), collections.deque(maxlen=2), {"a": [0], "b": []}
    def __iter__(self):
        self.done.add(len(self.done)); self.last.append(len(self.done))
        self.pools["b"].append([*self.last])
        return drawn(len(self.done) + sum(self.last) + 5 * len(self.pools["b"]))
class Queued(Order):
    def __init__(self):
        super().__init__()
        self.seeds = iter(range(100))
    def __iter__(self):
        return drawn(next(self.seeds))
def closure():
    passes, seen = 0, []
    def batches():
        nonlocal passes
        passes += 1; seen.append(passes)
        draw = torch.Generator().manual_seed(passes + sum(seen))
        order = torch.randperm(20, generator=draw).view(5, 4)
        return (tuple(map(torch.stack, zip(*[pairs[i] for i in row]))) for row in order)
    return batches
"""
SAMPLERS += HIDDEN
OF_HIDDEN = ("OfItsClass", "Deep", "ByAHelper", "ByADefault", "InContainers")
LOADERS |= {name: SHUFFLED.replace("{}", name, 1) for name in ("Nested", "OfAGlobal")}
CASES = [
    *((name, loop, 0) for name in LOADERS for loop in ("steps", "epochs", "trainer")),
    *((name, "epochs", 0) for name in OF_HIDDEN),
    *((name, "steps", 2) for name in ("Counts", "DrawsOneByOne", "Batches")),
]


def program(name, loop, workers) -> str:
    data = LOADERS.get(name, SHUFFLED.replace("{}", name, 1)).replace("{}", str(workers))
    if loop == "trainer":
        return trainer(before=SAMPLERS, data=data)
    return LOOPS[loop].replace("{before}", SAMPLERS).replace("{data}", data)


def killed_twice(text, folder) -> dict:
    folder.mkdir()
    for step in (7, 11, 13):  # in the second epoch, behind its end, and in the third
        assert run(text, folder, step)["status"] == -signal.SIGKILL
    return run(text, folder)


def whole(text, folder) -> dict:
    folder.mkdir()
    return run(text, folder)


@pytest.mark.parametrize(("name", "loop", "workers"), CASES)
def test_it_ends_with_the_same_bits(name, loop, workers, tmp_path):
    text = program(name, loop, workers)
    ended = killed_twice(text, tmp_path / "killed")
    assert ended.get("digest") == whole(text, tmp_path / "whole")["digest"], ended


@pytest.mark.parametrize("loop", ["steps", "epochs"])
def test_a_count_that_a_function_closes_over_is_named_and_refused(loop, tmp_path):
    text = LOOPS[loop].replace("{before}", SAMPLERS).replace("{data}", "closure()")
    (tmp_path / "killed").mkdir()
    run(text, tmp_path / "killed", 7)
    found = run(text, tmp_path / "killed")
    assert (found["error"], "passes: stored 1, now 0" in found["message"]) == (
        "DifferenceError",
        True,
    )


def test_an_iterator_that_only_its_reading_moves_is_named_and_refused(tmp_path):
    text = program("Queued", "epochs", 0)
    (tmp_path / "killed").mkdir()
    run(text, tmp_path / "killed", 11)  # after the edge of two epochs, which is saved
    found = run(text, tmp_path / "killed")
    assert found["error"] == "DataError", found
    assert "Queued.seeds: had moved when the epoch began" in found["message"]


WITHOUT = "from unbroken.data.sources.order_state import OrderState\nOrderState.put = print\n"


@pytest.mark.parametrize("loop", ["steps", "epochs", "trainer"])
def test_where_the_order_is_not_put_back_the_resume_is_refused(loop, tmp_path):
    text = WITHOUT + program("Counts", loop, 0)
    (tmp_path / "killed").mkdir()
    run(text, tmp_path / "killed", 13)
    found = run(text, tmp_path / "killed")
    assert found["error"] == "DataError", found
    assert "what is read again is not what the run was trained on" in found["message"]


class Sampler:
    def __init__(self, scale):
        self.scale, self.epoch = scale, 0


def test_a_value_that_this_start_was_given_anew_stays():
    before = Sampler(scale=1)
    order = OrderState({"sampler": before})
    before.epoch, before.scale = 3, 2
    stored = order.moved(0, None)
    now = Sampler(scale=5)
    OrderState({"sampler": now}).put(stored)
    assert (now.epoch, now.scale) == (3, 5)


MOVED_BY_THE_LOOP = (
    SAMPLERS
    + """
class Weighted(Order):
    def __iter__(self):
        return iter(sorted(range(20), key=lambda i: (self.order[i], i)))
sampler = Weighted()
"""
)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("loop", ["steps", "epochs"])
def test_what_the_loop_itself_moves_in_a_sampler_is_put_back_or_refused(loop, workers, tmp_path):
    data = f"DataLoader(pairs[:20], batch_size=4, sampler=sampler, num_workers={workers})"
    text = LOOPS[loop].replace("{before}", MOVED_BY_THE_LOOP).replace("{data}", data)
    text = text.replace("at(run.step)", "sampler.order[run.step % 7] += run.step; at(run.step)")
    if workers:
        (tmp_path / "killed").mkdir()
        run(text, tmp_path / "killed", 7)
        ended = run(text, tmp_path / "killed")
        assert "moved by something else than reading" in ended["message"], ended
    else:
        ended = killed_twice(text, tmp_path / "killed")
        assert ended.get("digest") == whole(text, tmp_path / "whole")["digest"], ended


WRONG_LENGTHS = """
class Long:
    def __init__(self, said):
        self.said = said
    def __len__(self):
        return self.said


class Samples(Long, torch.utils.data.Sampler):
    def __iter__(self):
        return iter(torch.randperm(20).tolist())


class Lists(Long, torch.utils.data.Sampler):
    def __iter__(self):
        return iter(torch.randperm(20).view(5, 4).tolist())


class Rows(Long, torch.utils.data.IterableDataset):
    def __iter__(self):
        return (pairs[i] for i in torch.randperm(20).tolist())


import warnings; warnings.simplefilter("ignore")  # torch warns of the last
"""
OF_A_WRONG_LENGTH = {
    "samples": "DataLoader(pairs[:20], batch_size=4, sampler=Samples({}))",
    "whole batches": "DataLoader(pairs[:20], batch_size=4, sampler=Samples({}), drop_last=True)",
    "lists": "DataLoader(pairs[:20], batch_sampler=Lists({} // 4))",
    "rows": "DataLoader(Rows({}), batch_size=4)",
}


@pytest.mark.parametrize("said", [12, 17, 28])
@pytest.mark.parametrize("name", OF_A_WRONG_LENGTH)
def test_a_length_that_is_not_what_is_given_changes_no_epoch(name, said, tmp_path):
    data = OF_A_WRONG_LENGTH[name].format(said)
    text = LOOPS["epochs"].replace("{before}", WRONG_LENGTHS).replace("{data}", data)
    ended = killed_twice(text, tmp_path / "killed")
    assert ended.get("digest") == whole(text, tmp_path / "whole")["digest"], ended


class Holds:
    """Holds a value under the name that a sampler has for it."""

    def __init__(self, value) -> None:
        self.value = value


HELD = {
    "another length": ([1, 2], [3, 4, 5]),
    "a list in place of none": (None, [1, 2]),
    "a tensor in place of none": (None, torch.arange(3)),
    "a tensor of another shape": (torch.zeros(0), torch.ones(3, 2)),
    "a tensor of the same shape": (torch.zeros(3), torch.ones(3)),
    "an array of another type": (np.zeros(2), np.ones(2, dtype=np.int32)),
    "a generator in place of none": (None, random.Random(3)),
    "a tuple": ((1, 2), (2, 1)),
    "lists in a dict": ({"a": [1], (2, "b"): [3]}, {"a": [1, 4], (2, "b"): []}),
    "pairs of what is drawn": ([(0, [1.0])], [(1, [float("nan")]), (2, [None, b"x"])]),
    "a queue": (deque([1, 2], maxlen=3), deque([3, 1], maxlen=3)),
    "a queue of another length": (deque([1]), deque([3], maxlen=3)),
    "sets": ([{1, 2}, frozenset({"a"})], [{3}, frozenset({"b"})]),
    "a number of NumPy": (np.int64(3), np.float32(0.5)),
    "many numbers": ([*range(5000)], [*range(5000, 0, -1)]),
    "many fractions": ([], [n / 7 for n in range(5000)]),
    "many numbers in a dict": ({"a": [*range(50_000)]}, {"a": [*range(50_000, 0, -1)]}),
    "a tensor in a list": ([torch.zeros(2)], [torch.ones(2, 2)]),
    "none in place of a number": (3, None),
}


@pytest.mark.parametrize("name", HELD)
def test_whatever_a_sampler_puts_in_a_place_stands_there_again(name):
    built, moved = HELD[name]
    before, now = Holds(copy.deepcopy(built)), Holds(copy.deepcopy(built))
    order, again = OrderState({"one": before}), OrderState({"one": now})
    before.value = copy.deepcopy(moved)
    stored = order.moved(0, None)
    again.check(stored)
    again.put(stored)
    assert repr(again.moved(0, None)) == repr(stored) != "{}"
    assert type(now.value) is type(moved)


def read(iterator):
    """Return an iterator that something was read of."""
    next(iterator)
    return iterator


def emptied(large):
    """Return a set with two items, in another order than a new one has them."""
    large.difference_update(set(large) - {1, 8})
    assert [*large] != [*{1, 8}]
    return large


UNKNOWN = {  # as it was built, and how it moves
    "a tensor of a type that is not stored": (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)),
    "too many texts": (["a"] * (1 << 18), ["b"] * (1 << 18)),
    "too many numbers in lists": ([[0] * (1 << 18)], [[1] * (1 << 18)]),
    "an iterator": (iter([1, 2, 3]), None),
    "an iterator over two": (zip([1, 2], [3, 4], strict=True), None),
    "a generator": ((one for one in range(3)), None),
    "a count": (itertools.count(), None),
    "a cycle": (itertools.cycle([1, 2, 3]), None),
    "a list of its own kind": (UserList([1]), UserList([2])),
    "a set in the order of its history": (set(), emptied(set(range(1000)))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_has_moved_and_cannot_be_stored_is_named_and_refused(name):
    built, moved = UNKNOWN[name]
    one = Holds(built)
    order = OrderState({"sampler": one})
    assert (order.moved(0, None), order.lost(0, None)) == ({}, [])
    one.value = read(built) if moved is None else moved
    assert (order.moved(0, None), order.lost(0, None)) == ({}, ["sampler.value"])
    with pytest.raises(DataError, match=r"data: sampler\.value: had moved when"):
        order.check({"moved": {}, "lost": order.lost(0, None)})


def test_what_moves_within_an_epoch_and_is_made_anew_in_each_is_not_lost():
    """It comes to be what it was when the epoch is read again."""
    one = Holds(None)
    order = OrderState({"sampler": one})
    order.note(3)
    one.value = iter([1, 2])
    assert (order.moved(3, 3), order.lost(3, 3)) == ({}, [])


@pytest.mark.parametrize(
    "wrong",
    [
        *(3, {"a": 3}, {"a": {"built": ["plain", 1]}}),
        *({"a": {key: ["array", "no type", [1]] for key in ("built", "began", "now")}},),
        *({"a": {key: ["tensor", "<f4", [[1], [2, 3]]] for key in ("built", "began", "now")}},),
        *({"a": {key: ["generator", ["torch", b"short"]] for key in ("built", "began", "now")}},),
    ],
)
def test_what_no_sampler_keeps_is_refused_before_anything_changes(wrong):
    with pytest.raises(DataError, match="is not what samplers keep"):
        OrderState.check({"moved": wrong})
