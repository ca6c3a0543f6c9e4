"""`unbroken show` says what resumes have found of the steps that they repeated."""

from __future__ import annotations

from repeated_loops import Loop, run_starts

KILLED = Loop(kill_after=10)  # 9 and 10 were taken after checkpoint-8


def test_the_summary_of_a_run_counts_resumes_and_repeated_steps(unbroken, tmp_path):
    run_starts(tmp_path / "run", KILLED, Loop(kill_after=14), Loop())
    assert "2; 4 repeated steps, all with the same bits" in unbroken("show", tmp_path / "run")[1]


def test_the_summary_of_a_run_says_which_step_was_not_repeated(unbroken, tmp_path):
    run_starts(tmp_path / "run", KILLED, Loop(temperature=2.0))
    _, shown, _ = unbroken("show", tmp_path / "run", "--history")
    assert "0 repeated steps with the same bits; others from step 9" in shown
    assert "step 9 was not repeated with the same bits" in shown
