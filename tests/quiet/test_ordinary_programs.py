"""Ordinary programs resume as exact, with the uninterrupted run's bits, and with no new line."""

from __future__ import annotations

import pytest

from quiet.programs import OF_RANKS, OF_THE_DROP_IN, PROGRAMS
from quiet.running import on_two_ranks, resumes_exactly


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_it_resumes_exactly_and_nothing_is_said(program, tmp_path):
    resumes_exactly(program, tmp_path)


@pytest.mark.parametrize("program", OF_RANKS.values(), ids=OF_RANKS)
def test_a_loop_of_two_ranks_resumes_exactly_and_nothing_is_said(program, tmp_path):
    resumes_exactly(program, tmp_path, on_two_ranks)


def test_thirty_programs_are_tried():
    assert len([*PROGRAMS, *OF_RANKS, *OF_THE_DROP_IN]) >= 35
