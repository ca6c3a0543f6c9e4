"""Facts and values of the drop-in that no writer wrote, under digests that are right.

As in tests/checkpoint/test_odd_content.py: a resume ends well, or in an error of ours.
"""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import EarlyStoppingCallback, TrainingArguments

from rewritten_checkpoints import Kept, changed
from small_trainers import bits, steps_in
from unbroken.adapters.transformers import Trainer
from unbroken.adapters.transformers.position import (
    Batching,
    DataPosition,
    LoopCounts,
    StoredPosition,
    plan_loop_start,
)
from unbroken.checkpoint import Checkpointer
from unbroken.errors import CheckpointError, StateMismatchError, UnbrokenError
from unbroken.storage import MemoryStorage, storage_at

FOLDER = "checkpoint-3"  # in the second epoch
SEEDS = st.integers(0, 2**32)
TIMES = st.sampled_from([1, 1, 1, 2, 4])
ROWS = [{"x": torch.full((2,), float(i)), "labels": torch.tensor(i % 2)} for i in range(8)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict:
        logits = self.linear(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Stream(torch.utils.data.IterableDataset):
    """Rows from a place that it brings itself to."""

    next = 0

    def __iter__(self):
        self.next %= len(ROWS)
        while self.next < len(ROWS):
            self.next += 1
            yield ROWS[self.next - 1]

    def state_dict(self) -> dict:
        return {"next": self.next}

    def load_state_dict(self, state: dict) -> None:
        self.next = int(state["next"])


class Batches:
    """The loader of a subclass, of no known kind."""

    def __iter__(self):
        for i in torch.randperm(4).tolist():
            rows = ROWS[2 * i : 2 * i + 2]
            yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def __len__(self) -> int:
        return 4


class WithLoader(Trainer):
    def get_train_dataloader(self):
        return Batches()


KINDS: dict[str, Callable[..., Trainer]] = {
    "rows": lambda **options: Trainer(train_dataset=ROWS, **options),
    "stream": lambda **options: Trainer(train_dataset=Stream(), **options),
    "loader": lambda **options: WithLoader(train_dataset=ROWS, **options),
}


def trainer(kind: str, folder: str, steps: int) -> Trainer:
    args = TrainingArguments(
        output_dir=folder, max_steps=steps, save_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, lr_scheduler_type="constant", logging_steps=2,
        eval_strategy="steps", eval_steps=1, metric_for_best_model="loss",
    )  # fmt: skip
    more = {"eval_dataset": ROWS[:2], "callbacks": [EarlyStoppingCallback(9)]}
    return KINDS[kind](model=Model(), args=args, allow=["max_steps"], **more)


def train(kind: str, folder: str, steps: int) -> Trainer:
    made = trainer(kind, folder, steps)
    made.train()
    return made


@cache
def run_of(kind: str) -> Kept:
    """Return a run that was killed; no fixture, for hypothesis would print all its bytes."""
    with tempfile.TemporaryDirectory() as folder:
        train(kind, folder, 3)
        return Kept.of(storage_at(folder))


def resume(kind: str, storage: MemoryStorage) -> Trainer:
    """Resume, in mid-epoch, what lies in a storage, and train two more steps."""
    with tempfile.TemporaryDirectory() as place:
        write(storage, place)
        return train(kind, place, 5)


def write(storage: MemoryStorage, place: str) -> None:
    for path, data in Kept.of(storage).files.items():
        file = Path(place, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)


OF_FACTS = ("cut", "max_steps", "place", "shift", "stopped", "arguments", "fingerprint")


def some(value: Any, names: tuple[str, ...], chance: random.Random, times: int) -> Any:
    """Change something in one of these parts."""
    name = chance.choice([one for one in names if one in value])
    part = changed({name: value[name]}, chance, times)
    rest = {other: one for other, one in value.items() if other != name}
    return {**rest, **(part if isinstance(part, dict) else {})}


def rewritten(kept: Kept, part: str, seed: int, times: int) -> MemoryStorage:
    chance = random.Random(seed)
    if part == "facts":
        return kept.with_facts(FOLDER, lambda facts: some(facts, OF_FACTS, chance, times))
    if part == "values":
        parts = ("values", "values", "callbacks")
        return kept.with_state(FOLDER, lambda state: some(state, parts, chance, times))
    name = "trainer_state.json"
    return kept.with_file(FOLDER, name, lambda state: changed(state, chance, times))


PARTS = ["facts", "values", "trainer_state"]


@pytest.mark.parametrize("part", PARTS)
@settings(max_examples=int(os.environ.get("ODD_EXAMPLES", 2)), deadline=None)
@given(seed=SEEDS, times=TIMES, kind=st.sampled_from([*KINDS]))
def test_whatever_a_checkpoint_says_of_its_place_a_resume_ends_well_or_in_an_error_of_ours(
    part, seed, times, kind
):
    with suppress(UnbrokenError):
        storage = rewritten(run_of(kind), part, seed, times)
        assert resume(kind, storage).state.global_step <= 5


CUT, NUMBERS = Batching(2, 2, 1, 8), LoopCounts(3, 2, 8, 24, 4, 4, 6)
WRITTEN = {
    "place": asdict(DataPosition(1, 2, 4)),
    "cut": asdict(CUT),
    "shift": 0,
    "stopped": [False] * 2,
}


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, times=TIMES, by_epochs=st.booleans(), length=st.sampled_from([8, 9, None]))
def test_whatever_is_said_of_a_place_it_is_reached_or_refused(seed, times, by_epochs, length):
    facts = changed(WRITTEN, random.Random(seed), times)
    with suppress(UnbrokenError):
        stored = StoredPosition.of(3, facts if isinstance(facts, dict) else {})
        now, left = replace(CUT, length=length), 2 if length else None
        found, numbers = plan_loop_start(stored, now, NUMBERS, left, by_epochs=by_epochs)
        assert 0 <= found.epoch <= max(numbers.num_train_epochs, 4)


def test_what_is_only_spelled_anew_is_resumed_and_goes_on():
    kept = run_of("stream")
    for change in (kept.with_facts, kept.with_state):
        resumed = resume("stream", change(FOLDER, lambda value: value))
        assert (resumed.resume_report.step, resumed.state.global_step) == (3, 5)


ODD_STATES = {
    "an unknown field": lambda state: {**state, "x": 1},
    "no callback": lambda state: {**state, "stateful_callbacks": [[]]},
}


@pytest.mark.parametrize("change", ODD_STATES.values(), ids=ODD_STATES)
def test_a_state_that_the_host_cannot_read_is_damage(change):
    storage = run_of("rows").with_file(FOLDER, "trainer_state.json", change)
    with pytest.raises(CheckpointError, match="no state that this version of transformers reads"):
        resume("rows", storage)


def test_a_run_of_another_kind_in_its_place_is_refused_by_name(tmp_path):
    with Checkpointer(tmp_path, model=Model()) as checkpointer:
        checkpointer.save(3)
    with pytest.raises(StateMismatchError, match="checkpoint-3: was not saved by this Trainer"):
        train("rows", str(tmp_path), 5)


@pytest.mark.parametrize("name", ["loss", "order", "trail", "seconds"])
def test_values_that_no_run_has_saved_are_refused_before_anything_is_changed(name, tmp_path):
    def odd(state):
        assert name in state["values"]
        return {**state, "values": {**state["values"], name: "x"}}

    write(run_of("rows").with_state(FOLDER, odd), str(tmp_path))
    made = trainer("rows", str(tmp_path), 5)
    before, names = bits(made.model), steps_in(tmp_path)
    with pytest.raises(CheckpointError, match=rf"values\.{name}"):
        made.train()
    assert (bits(made.model), steps_in(tmp_path)) == (before, names)
    assert not made.optimizer.state
