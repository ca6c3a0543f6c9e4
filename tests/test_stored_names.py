"""Names that stand in checkpoints stay for good, whatever the code calls what they name.

`stored_names.json` is the list of them. It may grow; a name in it never changes and never goes: it
stands in somebody's checkpoint, or random numbers are drawn by it.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torch.utils.data import DataLoader

from small_trainers import PAIRS, bits, small_model, small_trainer
from unbroken import Callback, Checkpointer, ResumePolicy, StateMismatchError
from unbroken.checkpoint import ddp_buckets
from unbroken.checkpoint.coverage import attributes, unregistered
from unbroken.checkpoint.coverage.loop_watch import GRADIENTS
from unbroken.checkpoint.resume import per_rank
from unbroken.data import MapSource, batch_source
from unbroken.fingerprint import own_attributes, qualified_name, scheduler_facts
from unbroken.language_model.train import DataSettings
from unbroken.store import RunDirectory
from unbroken.store.format import names
from unbroken.stored_names import (
    from_stored,
    given_path,
    stored_class_name,
    stored_key,
    to_stored,
)
from unbroken.training import Trainer, TrainerConfig
from unbroken.training.config_rules import FORMER_NAMES, by_todays_names
from unbroken.training.optim import make_scheduler
from unbroken.training.run_state import Statistics, Window

SOURCE = Path(__file__).parent.parent / "src"
FROZEN = json.loads((Path(__file__).parent / "stored_names.json").read_text())


def kept(group: str, found: Any) -> None:
    """Hold names that were found to the frozen ones of a group."""
    if "WRITE_STORED_NAMES" in os.environ:  # once, of what is new; look at the difference
        FROZEN[group] = found
        path = Path(__file__).parent / "stored_names.json"
        path.write_text(json.dumps(FROZEN, indent=1, sort_keys=True) + "\n")
    frozen = FROZEN[group]
    if isinstance(found, list):
        assert not sorted({*frozen} - {*found}), "stored names that are gone: checkpoints have them"
        assert not sorted({*found} - {*frozen}), "new stored names: add them to stored_names.json"
    assert found == frozen


@cache
def nodes_in_source() -> list[ast.AST]:
    trees = [ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))]
    kinds = ast.Call | ast.ClassDef | ast.Dict
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)]


def called(name: str) -> Iterator[ast.Call]:
    calls = (node for node in nodes_in_source() if isinstance(node, ast.Call))
    return (call for call in calls if getattr(call.func, "id", "") == name)


def test_the_stored_names_of_classes_and_functions_are_frozen():
    kept("classes and functions", sorted(call.args[0].value for call in called("stored_name")))


def test_the_events_of_a_history_are_frozen():
    written = [
        getattr(value, "value", None)
        for node in nodes_in_source()
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
        if isinstance(key, ast.Constant) and key.value == "event"
    ]
    kept("events", sorted({one for one in written if isinstance(one, str)}))


def test_the_names_of_places_on_the_disk_are_frozen():
    files = {
        name: value for name, value in vars(names).items() if name.isupper() and name[0] != "_"
    }
    kept("places", sorted(str(value) for value in files.values() if isinstance(value, str)))
    of_parts = (
        per_rank.RANK_FACTS_KEY,
        ddp_buckets.BUCKETS_KEY,
        unregistered.NOT_GIVEN_KEY,
        attributes.ATTRIBUTES_KEY,
        GRADIENTS,
    )
    of_ranks = (names.own_key(1), names.own_state_file(1), names.checkpoint_name(8))
    kept("parts of a checkpoint", sorted((*of_parts, *of_ranks)))


def test_a_setting_that_is_renamed_is_known_by_its_former_name():
    fields_of_today = TrainerConfig(output_dir="x").to_dict()
    kept("settings", sorted({*fields_of_today, *FORMER_NAMES}))
    assert {*FORMER_NAMES.values()} <= fields_of_today.keys()
    kept("settings of texts", sorted(one.name for one in fields(DataSettings)))


def test_a_former_name_is_compared_as_the_setting_of_today(monkeypatch):
    monkeypatch.setitem(FORMER_NAMES, "beta_one", "adam_beta1")
    assert by_todays_names({"beta_one": 0.9, "seed": 1}) == {"adam_beta1": 0.9, "seed": 1}


@pytest.mark.parametrize("former", ["stream", "sync", "overlap"])
def test_a_former_value_is_compared_as_the_value_of_today(former, tmp_path):
    today = {"stream": "blocking", "sync": "async"}.get(former, former)
    config = TrainerConfig(output_dir=str(tmp_path), save_mode=today)
    stored = by_todays_names({"snapshot": former, "load_from": "all"})
    assert stored == {"save_mode": config.save_mode, "read_from": config.read_from}


def test_the_labels_by_which_random_numbers_are_drawn_are_frozen():
    labels = {
        part.value
        for call in called("derive_key")
        for part in call.args
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    }
    hooks = {f"hook {name}" for name in vars(Callback) if name.startswith("on_")}
    kept("labels of keys", sorted(labels | hooks))


def test_the_facts_of_the_schedules_are_frozen():
    kinds = (
        *("constant", "linear", "cosine", "cosine_with_min_lr", "cosine_with_restarts"),
        *("polynomial", "inverse_sqrt", "reduce_lr_on_plateau"),
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    facts = {}
    for kind in kinds:
        config = TrainerConfig(lr_scheduler_type=kind, warmup_steps=2, learning_rate=0.1)
        schedule = make_scheduler(optimizer, config, max_steps=8)
        facts[kind] = scheduler_facts(schedule)
        assert isinstance(schedule, LambdaLR) or kind == "reduce_lr_on_plateau"
    kept("facts of schedules", json.loads(json.dumps(facts)))


class Count(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, trainer):
        self.steps += 1

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


class Last(Callback):
    """Keeps a number as an attribute alone."""

    def __init__(self) -> None:
        self.step = 0

    def on_step_end(self, trainer):
        self.step = trainer.progress.step


def of_a_trainer(folder: Path) -> Any:
    trainer = small_trainer(
        folder,
        dataset=PAIRS,
        trainer={"eval_dataset": PAIRS[:8], "callbacks": [Count(), Last()]},
        eval_steps=2,
        early_stopping_patience=9,
        load_best_model_at_end=True,
    )
    trainer.train()
    return trainer.checkpointer.objects


def of_a_loop(folder: Path) -> Any:
    """Train by hand, twice: the history tells of a start that resumes with differences."""
    meant = ResumePolicy(allow=["rate", "optimizer.lr"])
    for rate in (0.1, 0.2):
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        schedule = StepLR(optimizer, step_size=9)  # is found
        data = batch_source(DataLoader(PAIRS, batch_size=2), seed=1, global_batch_size=2)
        objects = {"model": model, "optimizer": optimizer, "data": data}
        with Checkpointer(folder, **objects, resume=meant, settings={"rate": rate}) as checkpointer:
            report = checkpointer.resume()
            for step, micro in enumerate(data.iterate(), start=report.step + 1):
                torch.nn.functional.cross_entropy(model(micro.data[0]), micro.data[1]).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                data.used(micro)
                if step % 2 == 0:
                    checkpointer.save(step)
                    break
            data.close()
    return objects


def of_the_drop_in(folder: Path) -> Any:
    from transformers import (
        EarlyStoppingCallback,
        GPT2Config,
        GPT2LMHeadModel,
        TrainingArguments,
    )

    from unbroken.adapters.transformers import Trainer

    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    data = [{"input_ids": [i % 8] * 4, "labels": [i % 8] * 4} for i in range(8)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    patience = [EarlyStoppingCallback(5)]

    class Mine(Trainer):
        """Has no attribute of its own: none of ours may be stored as one of it."""

    trainer = Mine(model, arguments, train_dataset=data, eval_dataset=data, callbacks=patience)
    trainer.train()
    return {"callbacks": patience}


RUNS = {"trainer": of_a_trainer, "loop": of_a_loop, "drop-in": of_the_drop_in}


def keys_of(value: Any, depth: int, path: str = "") -> Iterator[str]:
    """Yield the keys of nested objects; not those that are the user's own."""
    if isinstance(value, list):
        for one in value:
            yield from keys_of(one, depth, f"{path}[]")
    if not isinstance(value, dict):
        return
    for key, part in value.items():
        yield (here := f"{path}.{key}" if path else key)
        if depth > 1 and here not in USERS_OWN:
            yield from keys_of(part, depth - 1, here)


USERS_OWN = {
    *("facts.arguments", "facts.fingerprint.model", "facts.fingerprint.loss"),
    *("facts.fingerprint.optimizer", "facts.fingerprint.scheduler", "facts.settings"),
    *("facts.covers", "facts.built", "facts.found.scheduler.facts", "facts.not_given.now"),
    *("optimizer.state.state", "model.state", "scheduler.state", "facts.config"),
}
PASSING = ("facts.environment.packages.", "facts.environment.variables.")
"""What is there or not as it is imported; and what `VARIABLES` lists."""
OF_THE_HOST = ("train_", "eval_")


def names_in(folder: Path) -> set[str]:
    """Return all keys and names of files that a run has on the disk."""
    run = RunDirectory.open_readonly(folder)
    found = {f"file {path.name}" for path in folder.iterdir() if path.is_file()}
    identity = json.loads((folder / "run.json").read_text())
    found |= {f"run.json: {key}" for key in keys_of(identity, 3)}
    for record in run.history.records():
        found |= {f"history {record['event']}: {key}" for key in keys_of(record, 4)}
    for record in run.metrics.records():
        found |= {f"metrics: {key}" for key in record if not key.startswith(OF_THE_HOST)}
    for _, name in run.catalog.folders():
        found |= {f"file checkpoint/{path.name}" for path in (folder / name).iterdir()}
        manifest = json.loads((folder / name / "manifest.json").read_text())["manifest"]
        facts = {"facts": manifest.pop("facts")}
        found |= {f"manifest: {key}" for key in keys_of(manifest, 4)}
        found |= {f"manifest: {key}" for key in keys_of(facts, 4) if not key.startswith(PASSING)}
        state = json.loads((folder / name / "state.json").read_text())
        found |= {f"state: {key}" for key in keys_of(state, 3)}
    return found


@pytest.mark.parametrize("kind", RUNS)
def test_what_a_run_has_on_the_disk_is_named_as_ever(kind, tmp_path):
    objects = RUNS[kind](tmp_path)
    kept(f"on the disk: {kind}", sorted(names_in(tmp_path)))
    ours = [type(one) for one in objects.values() if type(one).__module__[:8] == "unbroken"]
    assert [kind for kind in ours if given_path(kind) is None] == []


KINDS = (MapSource, Statistics, Window)


@pytest.fixture
def rename():
    """Return what calls classes with a state otherwise, and moves them, as if somebody had."""
    known = [(kind, kind.__name__, kind.__module__) for kind in KINDS]

    def call_all(names: list[tuple[type, str, str]]) -> None:
        for kind, name, module in names:
            kind.__name__, kind.__qualname__, kind.__module__ = name, name, module

    yield lambda: call_all([(kind, f"Other{name}", "unbroken.other") for kind, name, _ in known])
    call_all(known)


def test_a_run_goes_on_exactly_after_the_classes_in_it_were_renamed(tmp_path, rename):
    settings = {"lr_scheduler_type": "constant"}
    whole = small_trainer(tmp_path / "whole", **settings)
    whole.train()
    small_trainer(tmp_path / "cut", max_steps=4, **settings).train()
    rename()
    again = small_trainer(tmp_path / "cut", **settings)
    again.train()
    history = RunDirectory.open_readonly(tmp_path / "cut").history.records()
    assert [one["verdict"] for one in history if one["event"] == "started"] == [None, "exact"]
    assert bits(again.model) == bits(whole.model)


def test_a_renamed_class_without_a_stored_name_is_another_one(tmp_path, rename, monkeypatch):
    small_trainer(tmp_path, max_steps=4).train()
    rename()
    monkeypatch.delattr(Window, "__stored_name__")
    with pytest.raises(StateMismatchError, match="expected Window, found OtherWindow"):
        small_trainer(tmp_path).load_checkpoint()


def test_no_attribute_of_our_trainer_counts_as_one_of_a_users_subclass(tmp_path):
    class Mine(Trainer):
        def evaluate(self, *args):
            self.judged = True
            return super().evaluate(*args)

    mine = Mine(small_model(), TrainerConfig(output_dir=str(tmp_path), max_steps=2), PAIRS)
    mine.judged = False
    assert own_attributes(mine) == {"judged": False}  # all others would be stored by their names


def test_a_class_of_the_users_does_not_inherit_a_stored_name():
    class Mine(MapSource): ...

    assert (stored_class_name(Mine), stored_class_name(MapSource)) == ("Mine", "MapSource")
    assert qualified_name(MapSource) == "unbroken.data.map_source.MapSource"
    assert qualified_name(Mine).endswith("<locals>.Mine")


def test_every_class_of_ours_with_a_state_has_a_stored_name():
    kinds = [node for node in nodes_in_source() if isinstance(node, ast.ClassDef)]
    bases = {ast.unparse(base) for kind in kinds for base in kind.bases}
    without = {
        kind.name
        for kind in kinds
        if any(getattr(part, "name", "") == "load_state_dict" for part in kind.body)
        and not any("stored_name" in ast.unparse(one) for one in kind.decorator_list)
        and "Protocol" not in {ast.unparse(base) for base in kind.bases}
    }
    assert without - bases == set()  # of a base, each class that is made of it has one


def test_a_field_that_is_renamed_keeps_its_stored_key():
    @dataclass
    class Place:
        seen: int = field(default=0, metadata=stored_key("samples"))
        epoch: int = 0

    assert to_stored(Place(3, 1)) == {"samples": 3, "epoch": 1}
    assert from_stored(Place, {"samples": 3}) == Place(3, 0)
