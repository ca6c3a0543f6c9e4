"""A Checkpointer tells what it does, and its errors name what exists where the user is."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from small_trainers import small_trainer
from unbroken import Checkpointer, KeepPolicy, RankPolicy, ResumePolicy, RunFacts, SavePolicy
from unbroken.checkpoint import Clock
from unbroken.cli.main import main
from unbroken.errors import ConfigError, DifferenceError, UnbrokenError
from unbroken.training import Callback


def of(folder, dropout: float = 0.1, **more) -> Checkpointer:
    return Checkpointer(folder, model=nn.Sequential(nn.Dropout(dropout), nn.Linear(2, 1)), **more)


def told(error: pytest.ExceptionInfo[UnbrokenError]) -> str:
    return "\n".join([str(error.value), *getattr(error.value, "__notes__", [])])


MISTAKES = {
    "save_step": (5, "did you mean save_steps?"),
    "save_mode": ("async", "save=SavePolicy(mode='async')"),
    "save": (500, "save=SavePolicy(steps=500)"),
    "keep": (3, "keep=KeepPolicy(last=3)"),
    "policy": ("require", "resume=ResumePolicy(...)"),
    "allow": (["seed"], "resume=ResumePolicy(allow=['seed'])"),
    "skip": (["head.*"], "resume=ResumePolicy(skip=['head.*'])"),
    "exact_resume": ("require", "resume=ResumePolicy(exact_resume='require')"),
    "resume": (False, "resume(False)"),
    "seed": (7, "settings={...}"),
    "batch_size": (4, "run.steps(batch_size=4)"),
    "betas": ((0.9, 0.99), "settings={...}"),
    "scheduler": (None, "leave it out"),
    "Module": (nn.Linear, "settings={...}"),
    "train_loader": (DataLoader(range(4)), "batch_source(it, seed=0, global_batch_size=...)"),
    "loaders": ([DataLoader(range(4))], "data.used(batch)"),
    "group": ([0, 1], "ranks=RankPolicy(group=[0, 1])"),
    "types": ("Phase", "types=[Name]"),
    "settings": ([("seed", 1)], 'settings={"data"'),
    "per_rank": (["rng"], "ranks=RankPolicy(per_rank=['rng'])"),
    "told": (["model"], "settings=RunFacts(made_by_settings=['model'])"),
    "fingerprint": ({}, "settings=RunFacts(more={})"),
    "tell": ("quiet", "expected a function"),
    "clock": (0.0, "expected a Clock"),
    "branch": (3, "expected a name"),
    "save_minutes": (5, "save=SavePolicy(minutes=5)"),
    "mtbf_hours": ([3], "save=SavePolicy(mtbf_hours=[3])"),
}


IN_POLICIES = {
    "the ranks": (lambda: RankPolicy([0, 1]), "group: expected the ranks", "group=join()"),
    "each rank's": (lambda: RankPolicy(per_rank="rng"), "per_rank", 'per_rank=["rng", "values"]'),
    "who reads": (lambda: RankPolicy(read_from="1"), "read_from: expected one of: all, rank0", ""),
    "what is covered": (lambda: RunFacts(made_by_settings="model"), "found str 'model'", ""),
    "more facts": (lambda: RunFacts(more={}), "expected a function, found dict {}", ""),
    "a clock": (lambda: Clock(0.0), "clock: expected a function", ""),
}


@pytest.mark.parametrize("name", IN_POLICIES)
def test_a_mistake_in_a_policy_is_named(name):
    make, says, meant = IN_POLICIES[name]
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        make()
    assert meant in told(caught)


OF_A_SAVE = {
    "save_minutes": ({"minutes": "5"}, "expected a number, found str '5'"),
    "mtbf_hours": ({"mtbf_hours": [3]}, "expected a number"),
    "save_mode": ({"mode": "sync"}, "expected one of: blocking, async, overlap, found 'sync'"),
    "save_steps": ({"steps": 3}, "is given twice"),
}


@pytest.mark.parametrize("name", OF_A_SAVE)
def test_a_mistake_in_the_policy_of_saves_is_named(name, tmp_path):
    fields, says = OF_A_SAVE[name]
    steps = 5 if name == "save_steps" else None
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        of(tmp_path, save=SavePolicy(**fields), save_steps=steps)
    assert name in str(caught.value)


def test_a_policy_of_resumes_is_no_word(tmp_path):
    with pytest.raises(ConfigError) as caught:
        of(tmp_path, resume="require")
    assert 'resume=ResumePolicy(exact_resume="require")' in told(caught)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_keyword_is_named_with_what_was_meant(name, tmp_path):
    value, meant = MISTAKES[name]
    with pytest.raises(ConfigError) as caught:
        of(tmp_path, **{name: value})
    assert name in str(caught.value)
    assert meant in told(caught)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_path_is_named():
    with pytest.raises(ConfigError, match="directory: expected a path, found int 5"):
        of(5)


IN_A_TRAINER = {
    "group": ([0], "group=join()"),
    "callbacks": (Callback, "callbacks=[MyCallback()]"),
    "settings": (3, 'settings={"data"'),
    "state": ({"keep": nn.Linear(1, 1)}, "state['keep']: this name stands for"),
    "state of numbers": ({"count": 5}, "state['count']: is no object to save"),
    "state of loaders": ({"more": DataLoader(range(4))}, "as train_dataset"),
}


@pytest.mark.parametrize("name", IN_A_TRAINER)
def test_a_mistake_in_an_argument_of_a_trainer_is_named_as_a_trainer_takes_it(name, tmp_path):
    value, meant = IN_A_TRAINER[name]
    with pytest.raises(ConfigError) as caught:
        small_trainer(tmp_path, trainer={name.partition(" ")[0]: value})
    assert meant in told(caught)
    assert "Checkpointer" not in told(caught)


def test_what_is_no_mistake_is_taken(tmp_path):
    more = {"scalers": [], "heads": {"a": nn.Linear(1, 1)}, "keep": KeepPolicy(last=1)}
    with of(tmp_path, resume=ResumePolicy(), temperature=torch.ones(()), **more) as checkpointer:
        checkpointer.save(1)


def test_hints_of_a_checkpointer_name_its_policy_and_its_resume(tmp_path):
    with of(tmp_path, tell=None) as checkpointer:
        checkpointer.save(1)
    with of(tmp_path, 0.2) as other, pytest.raises(DifferenceError) as caught:
        other.resume()
    assert "go on with the new value: resume=ResumePolicy(allow=['model.layer.0'])" in told(caught)
    assert "--allow" not in told(caught)
    (tmp_path / "checkpoint-1" / "manifest.json").write_text("{}")
    with of(tmp_path) as again, pytest.raises(UnbrokenError) as caught:
        again.resume()
    assert 'resume("never") starts anew' in told(caught)
    assert "resume_from_checkpoint" not in told(caught)


def test_hints_of_a_trainer_name_its_settings(tmp_path):
    small_trainer(tmp_path, max_steps=2).train()
    with pytest.raises(DifferenceError) as caught:
        small_trainer(tmp_path, max_steps=2, learning_rate=0.02).train()
    assert "go on with the new value: allow=['learning_rate'];" in told(caught)
    assert not {"--allow", "ResumePolicy"} & set(told(caught).replace("(", " ").split())


def test_hints_of_the_command_name_its_options_and_a_run_that_is_over_says_so(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    settings = {
        "data": {"train": str(tmp_path / "text.txt"), "tokenizer": "bytes", "block_size": 8},
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8},
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "batch_size": 2,
        "lr_scheduler_type": "constant",
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    words = [str(tmp_path / "config.yaml")]
    assert main(["train", *words]) == 0
    capsys.readouterr()
    assert main(["train", *words]) == 0
    assert "finished at step 2 of 2 already; nothing to do" in capsys.readouterr().out
    assert main(["train", *words, "--learning_rate", "0.5"]) == DifferenceError.exit_code
    text = capsys.readouterr().err
    assert "go on with the new value: --allow learning_rate; keep" in text
    assert "allow=" not in text


def test_a_checkpointer_prints_what_it_resumes_once_and_on_demand_nothing(tmp_path, capsys):
    with of(tmp_path) as checkpointer:
        checkpointer.resume()
        checkpointer.save(4)
    assert capsys.readouterr().out == "no checkpoint yet: starting at step 0\n"
    with of(tmp_path) as checkpointer:
        checkpointer.resume()
    assert capsys.readouterr().out == f"resuming from {tmp_path}/checkpoint-4 (step 4): exact\n"
    lines: list[str] = []
    for tell in (None, lines.append):
        with of(tmp_path, tell=tell) as checkpointer:
            checkpointer.resume()
    assert capsys.readouterr().out == ""
    assert lines == [f"resuming from {tmp_path}/checkpoint-4 (step 4): exact"]


def test_a_run_that_is_over_says_so(tmp_path):
    for steps in (2, 2):
        trainer = small_trainer(tmp_path, max_steps=steps)
        lines: list[str] = []
        trainer.display.note = lines.append
        trainer.train()
    assert "finished at step 2 of 2 already; nothing to do" in lines
    assert sum("resuming from" in line for line in lines) == 1


def test_statistics_may_be_tensors_and_numbers_of_numpy(tmp_path):
    record = {
        "loss": torch.tensor(0.5, requires_grad=True),
        "one": torch.tensor([[2]]),
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
        "rate": np.float32(0.25),
        "count": np.int64(3),
        "array": np.ones(1),
        "is": np.bool_(True),
        "more": {"rates": (torch.tensor(1.0), 2)},
    }
    with of(tmp_path, tell=None) as checkpointer:
        checkpointer.log(record)
        for wrong, found in ((torch.ones(2), "a Tensor of shape (2,)"), (object(), "a object")):
            with pytest.raises(ConfigError, match=r"log\('loss'\)") as caught:
                checkpointer.log({"loss": wrong})
            assert found in str(caught.value)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "loss": 0.5,
        "one": 2,
        "half": 1.5,
        "rate": 0.25,
        "count": 3,
        "array": 1.0,
        "is": True,
        "more": {"rates": [1.0, 2]},
    }
