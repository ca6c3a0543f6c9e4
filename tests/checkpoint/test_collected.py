"""A Checkpointer that nobody holds is collected anywhere, in a step too, and disturbs nothing."""

from __future__ import annotations

import gc
import threading
from weakref import ref

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from unbroken.checkpoint import Checkpointer, SavePolicy
from unbroken.storage import LocalStorage, MemoryStorage

MODES = ["blocking", "async", "overlap"]


class Loop:
    """A hand-written loop over a Checkpointer, which stands in cycles with its parts."""

    def __init__(self, where, mode) -> None:
        torch.manual_seed(1)
        self.model = nn.Linear(4, 4)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        objects = {"model": self.model, "optimizer": self.optimizer}
        self.checkpointer = Checkpointer(where, save=SavePolicy(mode=mode), tell=None, **objects)
        self.start = self.checkpointer.resume()

    def step(self) -> None:
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def steps_and_saves(self, steps) -> None:
        for step in range(1, steps + 1):
            self.step()
            self.checkpointer.save(step)


class SlowStorage(MemoryStorage):
    """A disk that makes no file until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()

    def create(self, path, nbytes=0):
        assert self.go.wait(60)
        return super().create(path, nbytes)


@pytest.fixture
def no_collection_of_its_own():
    """Nothing is collected but where a test says so."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("mode", MODES)
def test_a_step_in_which_one_is_collected_goes_on(mode, tmp_path, no_collection_of_its_own):
    other = Loop(tmp_path / "other", mode)
    other.step()
    dropped = Loop(tmp_path / "dropped", mode)
    dropped.steps_and_saves(2)
    of_torch, gone = len(_global_optimizer_pre_hooks), ref(dropped.checkpointer)
    del dropped
    hook = other.optimizer.register_step_pre_hook(lambda *_: bool(gc.collect()) and None)
    other.step()
    hook.remove()
    other.step()
    assert gone() is None
    assert len(_global_optimizer_pre_hooks) <= of_torch
    assert Loop(tmp_path / "dropped", mode).start.step == 2


@pytest.mark.parametrize("mode", ["async", "overlap"])
def test_collecting_waits_for_no_disk_and_the_next_owner_does(mode, no_collection_of_its_own):
    storage = SlowStorage()
    loop = Loop(storage, mode)
    loop.step()
    storage.go.clear()
    loop.checkpointer.save(1)
    gone = ref(loop.checkpointer)
    del loop
    gc.collect()
    assert gone() is None
    assert storage.stat("checkpoint-1") is None
    threading.Timer(0.1, storage.go.set).start()
    assert Loop(storage, mode).start.step == 1


def test_one_that_is_collected_gives_the_run_back_at_once(tmp_path, no_collection_of_its_own):
    loop = Loop(tmp_path, "blocking")
    loop.steps_and_saves(1)
    del loop
    gc.collect()
    LocalStorage(tmp_path).lock("run.lock", "another").release()


def test_those_that_are_collected_leave_no_hooks(tmp_path):
    def hooks_after(starts) -> tuple[int, int]:
        for one in range(starts):
            loop = Loop(tmp_path / str(one), "overlap")
            loop.steps_and_saves(1)
            loop.checkpointer.wait()
            del loop
            gc.collect()
        return len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)

    assert hooks_after(6) == hooks_after(2)
