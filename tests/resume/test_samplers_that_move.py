"""Samplers that count epochs, or keep what they have drawn, go on in any epoch of any loop."""

from __future__ import annotations

import copy
import random
import signal

import numpy as np
import pytest
import torch

from quiet.programs import trainer
from quiet.running import run
from unbroken.data.sources.own_generators import OrderState
from unbroken.errors import DataError

SAMPLERS = """
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
LOADERS |= {name: SHUFFLED.replace("{}", name, 1) for name in ("Nested", "OfAGlobal")}
CASES = [
    *((name, loop, 0) for name in LOADERS for loop in ("steps", "epochs", "trainer")),
    *((name, "steps", 2) for name in ("Counts", "DrawsOneByOne", "Batches")),
]


def program(name, loop, workers) -> str:
    data = LOADERS[name].replace("{}", str(workers))
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


WITHOUT = "from unbroken.data.sources.own_generators import OrderState\nOrderState.put = print\n"


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
    assert again.moved(0, None) == stored
    assert type(now.value) is type(moved)


def test_what_is_too_large_or_unknown_is_left_alone():
    large = torch.zeros(1 << 18)
    assert OrderState({"one": Holds(large)}).moved(0, None) == {}
    assert OrderState({"one": Holds(torch.zeros(3, dtype=torch.bfloat16))}).moved(0, None) == {}


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
        OrderState.check(wrong)
