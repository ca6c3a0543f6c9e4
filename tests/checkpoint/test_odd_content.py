"""Content that no writer wrote, under digests that are right: our own errors, or a resume.

Each example changes a few places of a small checkpoint and spells all digests anew, so that every
byte is the one that the manifest promises; then it is resumed, and shown by each command.
"""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rewritten_checkpoints import Kept, changed
from small_trainers import bits, small_model, small_trainer
from unbroken.checkpoint import Checkpointer
from unbroken.cli.main import main
from unbroken.errors import CorruptCheckpointError, UnbrokenError
from unbroken.storage import MemoryStorage
from unbroken.training import Callback

SEEDS = st.integers(0, 2**32)
TIMES = st.sampled_from([1, 1, 1, 2, 4])
PARTS = ["state", "facts", "manifest"]


class Average:
    """An object of the user's own, with keys of several kinds in its state."""

    def __init__(self) -> None:
        self.count, self.mean = 0, torch.zeros(3)

    def state_dict(self):
        return {"count": self.count, "mean": self.mean, "seen": {1: "a", (1, 2): {3}}}

    def load_state_dict(self, state):
        self.count = int(state["count"])
        self.mean.copy_(state["mean"])


def objects() -> dict:
    """One object of each kind, after a step."""
    model = small_model(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        "scaler": torch.amp.GradScaler("cpu"),
        "numpy": np.random.default_rng(3),
        "legacy": np.random.RandomState(3),
        "python": random.Random(3),
        "torch": torch.Generator(),
        "tensor": torch.zeros(2),
        "average": Average(),
        "parts": [nn.Linear(1, 1), {"a": nn.BatchNorm1d(1)}],
    }


class Counting(Callback):
    count = 0

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def trainer(storage):
    parts = {"storage": storage, "callbacks": [Counting()]}
    return small_trainer("unused", trainer=parts, max_steps=2, save_steps=2)


def resume_loop(storage) -> None:
    with Checkpointer(storage, **objects()) as checkpointer:
        checkpointer.resume("must")


def resume_trainer(storage) -> None:
    resumed = trainer(storage)
    try:
        resumed.load_checkpoint("must")
    finally:
        resumed.checkpointer.close()


def loop() -> Kept:
    storage = MemoryStorage()
    with Checkpointer(storage, **objects()) as checkpointer:
        checkpointer.save(2, {"x": 1, "t": torch.ones(2)})
    return Kept.of(storage)


def run() -> Kept:
    storage = MemoryStorage()
    trainer(storage).train()
    return Kept.of(storage)


KINDS = {"loop": (loop, resume_loop), "trainer": (run, resume_trainer)}


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    make, resume = KINDS[request.param]
    return make(), resume


def rewritten(kept: Kept, part: str, seed: int, times: int) -> MemoryStorage:
    chance = random.Random(seed)
    change = getattr(kept, f"with_{part}")
    return change("checkpoint-2", lambda value: changed(value, chance, times))


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, times=TIMES)
def test_whatever_a_checkpoint_holds_a_resume_ends_well_or_in_an_error_of_ours(
    part, seed, times, kind
):
    kept, resume = kind
    with suppress(UnbrokenError):
        resume(rewritten(kept, part, seed, times))


def test_what_is_only_spelled_anew_is_resumed(kind):
    """The negative control: it is the content that is refused, not the rewriting."""
    kept, resume = kind
    for part in PARTS:
        resume(getattr(kept, f"with_{part}")("checkpoint-2", lambda value: value))


NAMED = {
    "no random states": lambda state: state.pop("rng"),
    "no values": lambda state: state.pop("values"),
    "a generator's state that is too short": lambda state: state["rng"]["python"].update(version=9),
    "a generator of no kind": lambda state: state["rng"]["numpy"].update(bit_generator=[]),
    "a list as a key": lambda state: state["average"]["state"].update(
        seen={"$": "dict", "items": [[[1], 2]]}
    ),
    "a position that is huge": lambda state: state["rng"]["numpy"]["state"].update(pos=2**62),
    "parameters by number": lambda state: state["optimizer"]["state"]["param_groups"][0].update(
        params=[0, 1]
    ),
    "an optimizer that is a list": lambda state: state["optimizer"].update(state=[]),
    "modules in evaluation by number": lambda state: state["model"]["facts"].update(eval=[[1]]),
    "no learning rates": lambda state: state["scheduler"]["facts"].pop("lr"),
    "a scale that is text": lambda state: state["scaler"]["state"].update(scale="big"),
    "an object that is none": lambda state: state.update(numpy=None),
    "bits of another generator": lambda state: state["numpy"]["state"]["bits"].update(
        bit_generator="MT19937"
    ),
}


def refused(state, change):
    change(state)
    return state


@pytest.mark.parametrize("change", NAMED.values(), ids=NAMED)
def test_what_is_no_state_is_damage_and_the_objects_stay_as_they_are(change):
    kept, live = loop(), objects()
    before = {name: tensor.clone() for name, tensor in live["model"].state_dict().items()}
    with torch.no_grad():
        for tensor in live["model"].parameters():
            tensor.add_(1)
    storage = kept.with_state("checkpoint-2", lambda state: refused(state, change))
    with Checkpointer(storage, **live) as checkpointer, pytest.raises(UnbrokenError):
        checkpointer.resume(2)
    assert all(
        torch.equal(before[name] + 1, tensor) for name, tensor in live["model"].state_dict().items()
    )


def test_facts_nested_without_end_are_damage_as_any_other(loop_kept):
    deep: list = []
    for _ in range(300):
        deep = [deep]
    storage = loop_kept.with_facts("checkpoint-2", lambda facts: {**facts, "more": deep})
    with (
        Checkpointer(storage, **objects()) as checkpointer,
        pytest.raises(CorruptCheckpointError, match="cannot be written as JSON"),
    ):
        checkpointer.resume(2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("place")


COMMANDS = [
    ["ls"],
    ["show", "--history"],
    ["show", "--json"],
    ["verify"],
    ["diff", "--all"],
    ["diff", "--values"],
    ["export"],
]


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, times=TIMES)
def test_every_command_ends_in_one_sentence_whatever_a_checkpoint_holds(
    part, seed, times, place, loop_kept
):
    folder = written(rewritten(loop_kept, part, seed, times), place)
    other = written(loop_kept.storage(), place)
    for command in COMMANDS:
        second = {"diff": [other], "export": [folder + "-out"]}.get(command[0], [])
        main([command[0], folder, *second, *command[1:]])


@pytest.fixture(scope="module")
def loop_kept():
    return loop()


def written(storage: MemoryStorage, place) -> str:
    """Write the files of a storage into a new folder of the disk."""
    number = len(list(place.iterdir()))
    for path, data in Kept.of(storage).files.items():
        file = place / str(number) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(place / str(number))


ODD_VALUES = {
    "no mapping": lambda state: state.update(values=3),
    "a reason that is a number": lambda state: state["values"].update(stop_reason=3),
    "a step that is text": lambda state: state["values"]["progress"].update(step="two"),
}


@pytest.mark.parametrize("change", ODD_VALUES.values(), ids=ODD_VALUES)
def test_values_that_no_trainer_has_saved_are_refused_before_anything_is_changed(change):
    storage = run().with_state("checkpoint-2", lambda state: refused(state, change))
    resumed = trainer(storage)
    before = bits(resumed.model)
    try:
        with pytest.raises(CorruptCheckpointError, match=r"values|progress"):
            resumed.load_checkpoint(2)
    finally:
        resumed.checkpointer.close()
    assert bits(resumed.model) == before
    assert not resumed.optimizer.state
