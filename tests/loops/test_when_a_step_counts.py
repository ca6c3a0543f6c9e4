"""A step counts when an optimizer stepped: weights and position are never of two steps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from loops.scripts_of_loops import LeftError, Noisy, Run
from small_trainers import steps_in
from unbroken import Checkpointer


def seen_by(run, until, *, leave=None, at=None):
    """Return the first numbers of the batches that a loop is given; leave it there, if at all."""
    seen = []
    for batch in run.run.steps(until, batch_size=4):
        seen.append(batch[:, 0].round().tolist())
        place = len(seen)
        if leave == "before" and place == at:
            break
        if leave == "continue" and place == at:
            continue
        run.train(batch)
        if leave == "after" and place == at:
            break
        if leave == "error" and place == at:
            raise LeftError
    return seen


def test_a_loop_that_is_left_after_the_optimizers_step_goes_on_with_the_next_batch(tmp_path):
    whole = seen_by(Run(tmp_path / "whole", data=Noisy(), save_steps=2), 6)
    run = Run(tmp_path / "left", data=Noisy(), save_steps=2)
    first = seen_by(run, 6, leave="after", at=3)
    assert run.run.step == 3
    assert first + seen_by(run, 6) == whole


def test_so_does_one_that_an_error_has_left(tmp_path):
    run = Run(tmp_path, data=Noisy(), save_steps=2)
    with pytest.raises(LeftError):
        seen_by(run, 6, leave="error", at=3)
    assert run.run.step == 3
    assert len(seen_by(run, 6)) == 3


def test_a_batch_that_was_left_before_the_step_is_given_again(tmp_path):
    run = Run(tmp_path, data=Noisy(), save_steps=2)
    left = seen_by(run, 6, leave="before", at=3)
    assert run.run.step == 2
    assert seen_by(run, 3) == left[-1:]


def test_nothing_is_saved_where_a_loop_is_left(tmp_path):
    run = Run(tmp_path, data=Noisy(), save_steps=2)
    seen_by(run, 6, leave="after", at=3)
    run.run.close()
    assert steps_in(tmp_path) == [2]


def test_a_turn_without_a_step_uses_its_batch_and_counts_as_none(tmp_path):
    whole = seen_by(Run(tmp_path / "whole", data=Noisy(), save_steps=2), 6)
    run = Run(tmp_path / "some", data=Noisy(), save_steps=2)
    assert seen_by(run, 5, leave="continue", at=3) == whole
    assert run.run.step == 5
    assert steps_in(tmp_path / "some") == [2, 4, 5]


def scaled(run, scaler, until, *, huge_at=()):
    for number in run.run.steps(until):
        loss = run.model(torch.ones(2, 4)).square().mean()
        scaler.scale(loss * (float("inf") if number in huge_at else 1.0)).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        yield number


def test_a_step_that_a_scaler_skips_counts(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    run = Run(tmp_path, scaler=scaler, save_steps=2)
    assert list(scaled(run, scaler, 6, huge_at=(0, 3))) == [0, 1, 2, 3, 4, 5]
    assert scaler.get_scale() == 2.0
    assert steps_in(tmp_path) == [2, 4, 6]


def test_without_an_optimizer_each_turn_that_came_to_its_end_counts(tmp_path):
    total = torch.zeros(1)
    run = Checkpointer(tmp_path, total=total, tell=None, save_steps=2)
    for number in run.steps(5):
        total += number
        if number == 3:
            break
    assert run.step == 3
    assert list(run.steps(5)) == [3, 4]
    assert steps_in(tmp_path) == [2, 4, 5]


def test_steps_of_two_optimizers_in_a_turn_are_one_step(tmp_path):
    run = Run(tmp_path, save_steps=2)
    other = nn.Linear(1, 1)
    second = torch.optim.SGD(other.parameters(), lr=0.1)
    run.run.register(other=other, second=second)
    for number in run.run.steps(3):
        other(torch.ones(1)).backward()
        second.step()
        assert run.run.step == number + 1
        run.train(torch.ones(1, 4))
        assert run.run.step == number + 1


def test_a_step_is_given_its_micro_batches_as_one_list(tmp_path):
    run = Run(tmp_path / "lists", data=Noisy(24), save_steps=2)
    lists = []
    for batches in run.run.steps(4, batch_size=2, accumulate=3):
        lists.append([one[:, 0].round().tolist() for one in batches])
        run.train(*batches)
    single = Run(tmp_path / "single", data=Noisy(24), save_steps=2)
    flat = []
    for batch in single.run.steps(12, batch_size=2):
        flat.append(batch[:, 0].round().tolist())
        single.train(batch)
    assert [one for several in lists for one in several] == flat
    assert steps_in(tmp_path / "lists") == [2, 4]


def test_lines_belong_to_the_step_under_way(tmp_path):
    run = Run(tmp_path, save_steps=2)
    for _ in run.run.steps(2):
        run.run.log(before=1)
        run.train(torch.ones(1, 4))
        run.run.log(loss=torch.tensor(0.5))
    run.run.log({"plain": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"before":1,"step":1}',
        '{"loss":0.5,"step":1}',
        '{"before":1,"step":2}',
        '{"loss":0.5,"step":2}',
        '{"plain":3}',
    ]


def test_a_run_that_stop_has_ended_stays_ended(tmp_path):
    run = Run(tmp_path, data=Noisy(), save_steps=4)
    for batch in run.run.steps(20, batch_size=4):
        run.train(batch)
        if run.run.step == 6:
            run.run.stop()
    run.run.close()
    again = Run(tmp_path, data=Noisy(), save_steps=4)
    assert list(again.run.steps(20, batch_size=4)) == []
    line = "finished: stop() was called after step 6; with another `until` the run goes on"
    assert line in again.told
    again.run.close()
    longer = Run(tmp_path, data=Noisy(), save_steps=4)
    assert len(seen_by(longer, 8)) == 2


def test_a_run_that_is_further_says_that_it_is_finished(tmp_path):
    first = Run(tmp_path, data=Noisy(), save_steps=4)
    seen_by(first, 6)
    first.run.close()
    for until, says in [(6, "finished: 6 steps are done"), (4, "more than the 4 that are asked")]:
        again = Run(tmp_path, data=Noisy(), save_steps=4)
        assert seen_by(again, until) == []
        assert any(says in line for line in again.told)
        assert again.bits == first.bits
        again.run.close()


def test_enumerate_goes_on_from_the_steps_of_the_run_where_it_is_told_to(tmp_path):
    first = Run(tmp_path, data=Noisy(), save_steps=2)
    seen_by(first, 2)
    first.run.close()
    again = Run(tmp_path, data=Noisy(), save_steps=2)
    numbers = []
    for number, batch in enumerate(again.run.steps(4, batch_size=4), again.run.step):
        numbers.append((number, again.run.step))
        again.train(batch)
    assert numbers == [(2, 2), (3, 3)]
