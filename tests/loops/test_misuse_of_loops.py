"""What a loop cannot do is said at once, with what to do instead."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from loops.scripts_of_loops import Noisy, Run
from unbroken import Checkpointer, batch_source
from unbroken.errors import ConfigError, DataError


def first_of(loop):
    for one in loop:
        return one
    return None


def in_a_loop(call):
    def inside(run):
        for batch in run.run.steps(3, batch_size=2):
            call(run.run)
            run.train(batch)

    return inside


def in_an_epoch(call, **sizes):
    def inside(run):
        for _ in run.run.epochs(2, **sizes):
            call(run.run)

    return inside


def twice_in_an_epoch(run):
    for _ in run.batches():
        break
    run.batches()


MISUSES = {
    "steps in steps": (in_a_loop(lambda run: run.steps(3)), "is under way", "batches()"),
    "epochs in steps": (in_a_loop(lambda run: run.epochs(3)), "is under way", "batches()"),
    "batches in steps": (in_a_loop(lambda run: run.batches()), "outside of a loop", "epochs(5)"),
    "batches outside": (lambda run: run.run.batches(), "outside of a loop", "run.steps"),
    "batches twice": (in_an_epoch(twice_in_an_epoch, batch_size=2), "given once", "second epoch"),
    "resume in steps": (in_a_loop(lambda run: run.resume()), "a loop is under way", "leave"),
    "save in steps": (in_a_loop(lambda run: run.save(1)), "save at the edge", "by hand"),
    "save_if_due in steps": (
        in_a_loop(lambda run: run.save_if_due(1)),
        "save_if_due(): steps() and epochs() save",
        "leave it out",
    ),
    "stop outside": (lambda run: run.run.stop(), "no loop is under way", "inside"),
    "no batch size": (lambda run: run.run.steps(3), "batch_size: is needed", "DataLoader"),
    "batch size of none": (lambda run: run.run.steps(3, batch_size=0), "at least 1", ""),
    "until of a text": (lambda run: run.run.steps("3"), "expected a whole number", ""),
    "resume before": (
        lambda run: (run.run.resume(), run.run.steps(3, batch_size=2)),
        "resume() was called before the data had a position",
        "leave resume() out",
    ),
}


@pytest.mark.parametrize("name", MISUSES)
def test_a_misuse_is_named_with_what_to_do(name, tmp_path):
    do, says, hint = MISUSES[name]
    run = Run(tmp_path, data=Noisy(), save_steps=2)
    with pytest.raises(ConfigError, match=re.escape(says)) as caught:
        do(run)
    assert hint in "\n".join(getattr(caught.value, "__notes__", []))


def test_a_loader_has_its_batch_size(tmp_path):
    run = Run(tmp_path, data=DataLoader(Noisy(), 4), save_steps=2)
    with pytest.raises(ConfigError, match="batch_size: has no meaning for a DataLoader"):
        run.run.steps(3, batch_size=4)


def test_a_loader_does_not_know_its_place_where_the_loop_is_written_by_hand(tmp_path):
    run = Run(tmp_path, data=DataLoader(Noisy(), 4), save_steps=2)
    with pytest.raises(ConfigError, match="does not know its place") as caught:
        run.run.resume()
    assert "run.steps(...) resumes" in "\n".join(caught.value.__notes__)


def test_an_optimizer_that_was_not_given_does_not_step(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Checkpointer(tmp_path, model=model, tell=None, save_steps=2)
    before = model.weight.detach().clone()

    def train():
        for _ in run.steps(3):
            model(torch.ones(1)).backward()
            optimizer.step()

    with pytest.raises(ConfigError, match="this SGD steps, and the Checkpointer was given no"):
        train()
    assert torch.equal(model.weight, before)


def test_batches_that_would_span_two_epochs_are_refused(tmp_path):
    data = batch_source(Noisy(), seed=0, global_batch_size=4)
    run = Run(tmp_path, data=data, save_steps=2)
    misuse = in_an_epoch(lambda run: first_of(run.batches()))
    with pytest.raises(DataError, match="would span two epochs"):
        misuse(run)


def test_another_accumulation_is_a_change_of_the_training(tmp_path):
    first = Run(tmp_path, data=Noisy(), save_steps=2)
    for batches in first.run.steps(2, batch_size=2, accumulate=2):
        first.train(*batches)
    first.run.close()
    again = Run(tmp_path, data=Noisy(), save_steps=2)
    with pytest.raises(Exception, match=r"loop.accumulate"):
        again.run.steps(4, batch_size=2, accumulate=4)


def test_a_name_in_the_state_that_a_dict_has_is_refused(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(ConfigError, match="values: this name is taken"):
        run.run.state.values = 3
    with pytest.raises(AttributeError, match="has no 'best'"):
        _ = run.run.state.best
