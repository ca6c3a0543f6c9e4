"""What a run shows: plain lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import io

from rich.console import Console
from torch.utils.data import DataLoader

from small_trainers import PAIRS, small_trainer
from unbroken.goodput import SaveInterval
from unbroken.training import Display


def shown(folder, *, terminal=False, **settings) -> str:
    output = io.StringIO()
    display = Display(Console(file=output, force_terminal=terminal, width=200))
    trainer = small_trainer(folder, **settings)
    trainer.display = display
    if hasattr(trainer.source, "on_skip"):
        trainer.source.on_skip = display.skipping
    trainer.train()
    return output.getvalue()


def test_a_pipe_gets_one_plain_line_for_each_log_line(tmp_path):
    lines = shown(tmp_path).splitlines()
    assert lines[0] == "no checkpoint yet: starting at step 0"
    assert [line.split("  ")[0] for line in lines[1:]] == [f"step {n}/6" for n in range(1, 7)]
    assert "\x1b" not in "".join(lines)


def test_a_resume_says_in_its_first_line_from_where(tmp_path):
    shown(tmp_path, max_steps=4)
    first = shown(tmp_path).splitlines()[0]
    assert first == f"resuming from {tmp_path}/checkpoint-4 (step 4): changed"


def test_a_terminal_gets_a_bar(tmp_path):
    assert "━" in shown(tmp_path, terminal=True)


def test_skipping_shows_what_it_costs(tmp_path):
    shown(tmp_path, dataset=DataLoader(PAIRS, batch_size=8), max_steps=4)
    again = shown(tmp_path, dataset=DataLoader(PAIRS, batch_size=8))
    assert "skipped 4 items of data to come back to the place" in again


def test_how_often_a_run_saves_by_itself_stands_in_a_line_and_beside_the_bar(tmp_path):
    lines = shown(tmp_path / "lines", save_steps="auto").splitlines()
    assert any(line.startswith("saves every ") and "a save costs" in line for line in lines)
    assert ", saves every " in shown(tmp_path / "bar", terminal=True, save_steps="auto")


def test_steps_that_take_longer_for_a_while_are_no_news():
    told = SaveInterval(100.0, step_seconds=0.1)
    assert not SaveInterval(100.0, step_seconds=1.0).is_worth_reporting(told)
    assert SaveInterval(130.0, step_seconds=0.1).is_worth_reporting(told)


def test_it_is_told_again_only_when_it_has_changed_and_after_a_save():
    output = io.StringIO()
    display = Display(Console(file=output, width=200))
    for seconds, saved in ((100.0, False), (150.0, False), (110.0, True), (200.0, True)):
        display.saves(SaveInterval(seconds), saved=saved)
    assert [line.split(":")[0] for line in output.getvalue().splitlines()] == [
        "saves every 100 s",
        "saves every 3.3 min",
    ]
