"""What a resume brings back, and in which order: parts that no training of ordinary runs shows."""

from __future__ import annotations

import random
from functools import cached_property

import pytest
import torch
from torch import nn

from capture.round_trip import there_and_back
from unbroken.checkpoint import Checkpointer
from unbroken.checkpoint.coverage.attributes import Attributes
from unbroken.checkpoint.coverage.loop_watch import UnfinishedGradients
from unbroken.data import batch_source
from unbroken.errors import ConfigError
from unbroken.store import KeepPolicy


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(4, 4)


class Draws:
    """Takes a random number when its state comes back, as some samplers do."""

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, state):
        random.random()


def test_random_generators_come_back_after_all_that_may_draw(tmp_path):
    with Checkpointer(tmp_path, model=model(), sampler=Draws()) as checkpointer:
        checkpointer.save(1)
        expected = random.random()
    with Checkpointer(tmp_path, model=model(), sampler=Draws()) as checkpointer:
        assert checkpointer.resume().step == 1
        assert random.random() == expected


def test_objects_that_are_made_late_are_registered(tmp_path):
    late = model()
    with Checkpointer(tmp_path, model=model()) as checkpointer:
        checkpointer.register(ema=late)
        checkpointer.save(1)
    again = nn.Linear(4, 4)
    with Checkpointer(tmp_path, model=model()) as checkpointer:
        checkpointer.register(ema=nn.Linear(4, 4))
        checkpointer.register(ema=again)  # the last of a name counts
        assert checkpointer.resume().step == 1
        with pytest.raises(ConfigError, match=r"(?s)stands for.*example own_rng="):
            checkpointer.register(rng=late)
    assert torch.equal(again.weight, late.weight)


def test_the_best_step_is_known_after_a_resume_and_stays(tmp_path):
    keep = KeepPolicy(last=1)
    with Checkpointer(tmp_path, model=model(), keep=keep) as checkpointer:
        checkpointer.best_step = 1
        for step in (1, 2):
            checkpointer.save(step)
    with Checkpointer(tmp_path, model=model(), keep=keep) as checkpointer:
        assert checkpointer.resume().step == 2
        checkpointer.save(3)
        assert [step for step, _ in checkpointer.run.catalog.folders()] == [1, 3]


def test_a_batch_that_nothing_was_trained_on_yet_may_be_handed_out_at_a_save(tmp_path):
    data = batch_source([torch.ones(4)] * 8, seed=0, global_batch_size=2)
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with Checkpointer(tmp_path, model=net, optimizer=optimizer, data=data) as checkpointer:
        checkpointer.resume()
        batches = data.iterate()
        for step in (0, 1, 2):
            batch = next(batches)
            for _ in range(2):  # a signal may ask for it once more
                checkpointer.save(step)
            net(batch.data).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            data.used(batch)


class Levels:
    """Data whose reading depends on what training sets."""

    def __init__(self) -> None:
        self.level, self.scale = 0, torch.ones(2)

    def __len__(self) -> int:
        return 8

    @cached_property
    def targets(self) -> list[int]:
        return [*range(8)]

    def __getitem__(self, index: int):
        return self.scale * index * self.level


def harder(data: Levels) -> None:
    data.level = 1


def larger(data: Levels) -> None:
    data.scale.mul_(2)


def marked(data: Levels) -> None:
    data.phase = "late"  # it has no such attribute at first


CHANGES = [(harder, "level"), (larger, "scale"), (marked, "phase")]


@pytest.mark.parametrize(("change", "name"), CHANGES)
def test_data_that_changed_while_workers_held_copies_are_not_covered(change, name):
    for is_in_time in (True, False):
        levels = Levels()
        attributes = Attributes({"data": batch_source(levels, seed=0, global_batch_size=2)})
        attributes.note()
        if not is_in_time:
            attributes.workers_begin()
        change(levels)
        if is_in_time:
            attributes.workers_begin()
        lost = attributes.state({}).get("lost", {})
        assert [*lost] == ([] if is_in_time else [f"data.{name}"])


def test_what_data_keep_once_they_were_asked_is_no_change():
    levels = Levels()
    attributes = Attributes({"data": batch_source(levels, seed=0, global_batch_size=2)})
    attributes.note()
    attributes.workers_begin()
    assert levels.targets
    state = attributes.state({})
    assert [*state["plain"]] == ["data.targets"]
    assert "lost" not in state


def window(*, lr: float = 0.1):
    net = nn.ParameterList([torch.ones(2), torch.ones(2), torch.ones(2)])
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    return net, optimizer, UnfinishedGradients({"model": net, "optimizer": optimizer})


def test_a_waiting_gradient_of_zeros_comes_back_as_zeros_and_none_as_none():
    net, _, waiting = window()
    net[0].grad, net[1].grad = torch.ones(2), torch.zeros(2)
    stored = there_and_back({"waiting": waiting.capture()})["waiting"]
    again, _, here = window()
    again[2].grad = torch.ones(2)
    here.restore(here.check(stored))
    assert [None if one.grad is None else one.grad.tolist() for one in again] == [
        [1.0, 1.0],
        [0.0, 0.0],
        None,
    ]


@pytest.mark.parametrize("cleared", [0, 1, 2])
def test_gradients_of_which_only_some_are_cleared_after_a_step_are_kept(cleared):
    net, optimizer, waiting = window()
    for _ in range(2):
        for place, one in enumerate(net):
            if one.grad is None or place == cleared:
                one.grad = torch.ones(2)
            else:
                one.grad.add_(1)
        waiting.before_step(optimizer)
        optimizer.step()
    stored = waiting.capture()
    assert stored is not None
    assert [*stored.state["parameters"]] == ["0", "1", "2"]


@pytest.mark.parametrize("first", [0, 1, 2])
def test_gradients_that_are_all_cleared_before_the_next_pass_are_not(first):
    net, optimizer, waiting = window()
    for _ in range(2):
        for one in net:
            one.grad = torch.ones(2)
        waiting.before_step(optimizer)
        optimizer.step()
    assert waiting.capture() is None
    net[first].grad.add_(1)  # a pass for the next step has begun
    assert waiting.capture() is not None


def test_gradients_of_a_group_that_came_since_the_last_step_are_kept():
    net, _, _ = window()
    optimizer = torch.optim.SGD([net[0], net[1]], lr=0.1)
    waiting = UnfinishedGradients({"model": net, "optimizer": optimizer})
    for _ in range(2):
        for one in net:
            one.grad = torch.ones(2)
        waiting.before_step(optimizer)
        optimizer.step()
    optimizer.add_param_group({"params": [net[2]]})
    assert "2" in waiting.capture().state["parameters"]
