"""Killed and started again: the same bits as the run that nobody touched, in fresh processes.

The runs live in memory where the system has a place for files there: a kill is no power cut, and
what a killed process had written is there with or without a disk. (Disks under power cuts are the
matter of tests/crash.)
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from sabotage_runs import PARTS, parts_that_matter
from scenarios import CUTS, Scenario, killed, uninterrupted

VALUES = {
    "model": ("dropout", "batchnorm", "tied"),
    "optimizer": ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"),
    "precision": ("fp32", "bf16", "fp16"),
    "shuffle": (True, False),
    "augmentation": (True, False),
    "random_collator": (True, False),
    "workers": (0, 2),
    "accumulation": (1, 4),
}
PRODUCT = list(itertools.product(*VALUES.values(), CUTS))
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def pairs(case: tuple) -> frozenset[tuple]:
    return frozenset(itertools.combinations(enumerate(case), 2))


def pairwise() -> list[tuple]:
    """Return few cases that together hold every pair of values (a greedy covering array)."""
    candidates = {case: pairs(case) for case in PRODUCT}
    missing = set().union(*candidates.values())
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: len(candidates[case] & missing))
        chosen.append(best)
        missing -= candidates[best]
    return chosen


PAIRWISE = pairwise()


def title(case: tuple) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case)


def scenario_of(case: tuple) -> Scenario:
    return Scenario(**dict(zip(VALUES, case, strict=False)))


def parts_of(case: tuple) -> list[str]:
    return parts_that_matter(scenario_of(case), CUTS[case[-1]])


def one_part_of(case: tuple) -> str:
    """Draw one of the parts that matter in a case, the same in each run of the tests."""
    return random.Random(title(case)).choice(parts_of(case))


@pytest.fixture(scope="module", params=PAIRWISE, ids=title)
def case(request):
    """A case of the selection: a run that was killed, what it must end with, what matters."""
    scenario, cut = scenario_of(request.param), CUTS[request.param[-1]]
    with TemporaryDirectory(dir=IN_MEMORY, prefix="unbroken-") as folder:
        reference = uninterrupted(scenario, Path(folder))
        yield killed(scenario, cut, Path(folder)), reference, parts_of(request.param)


def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_run(case):
    run, reference, _ = case
    assert run.resumed() == reference


def test_resumed_without_any_one_part_of_its_state_it_ends_with_other_bits(case):
    run, reference, parts = case
    for part in parts:
        assert run.resumed(left_out=part) != reference, part


@pytest.mark.sweep
@pytest.mark.parametrize("values", list(itertools.product(*VALUES.values())), ids=title)
def test_every_combination_ends_so_and_without_one_part_does_not(values):
    scenario = scenario_of(values)
    with TemporaryDirectory(dir=IN_MEMORY, prefix="unbroken-") as folder:
        reference = uninterrupted(scenario, Path(folder))
        for name, cut in CUTS.items():
            run, part = killed(scenario, cut, Path(folder, name)), one_part_of((*values, name))
            assert run.resumed() == reference, name
            assert run.resumed(left_out=part) != reference, (name, part)


@pytest.mark.parametrize(
    ("left_out", "at_least"),
    [
        (Counter(part for case in PAIRWISE for part in parts_of(case)), 4),
        (Counter(map(one_part_of, PRODUCT)), 100),
    ],
    ids=["selection", "product"],
)
def test_every_part_is_left_out_in_many_cases(left_out, at_least):
    assert set(left_out) == set(PARTS)
    assert min(left_out.values()) >= at_least
