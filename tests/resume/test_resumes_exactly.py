"""Killed and started again: the same bits as the run that nobody touched, in fresh processes."""

from __future__ import annotations

import itertools

import pytest

from scenarios import CUTS, Scenario, killed_and_resumed, uninterrupted

VALUES = {
    "model": ("dropout", "batchnorm", "tied"),
    "optimizer": ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor"),
    "precision": ("fp32", "bf16", "fp16"),
    "shuffle": (True, False),
    "augmentation": (True, False),
    "random_collator": (True, False),
    "workers": (0, 2),
    "accumulation": (1, 4),
    "cut": tuple(CUTS),
}


NAMES = tuple(VALUES)


def pairs(case: tuple) -> frozenset[tuple]:
    return frozenset(itertools.combinations(zip(NAMES, case, strict=True), 2))


def pairwise() -> list[tuple]:
    """Return few cases that together hold every pair of values (a greedy covering array)."""
    candidates = {case: pairs(case) for case in itertools.product(*VALUES.values())}
    missing = set().union(*candidates.values())
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: len(candidates[case] & missing))
        chosen.append(best)
        missing -= candidates[best]
    return chosen


def title(case: tuple) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case)


def resumes_exactly(case: tuple, tmp_path) -> None:
    settings = dict(zip(NAMES, case, strict=True))
    cut = CUTS[settings.pop("cut")]
    scenario = Scenario(**settings)
    reference = uninterrupted(scenario, tmp_path / "whole", cut.save_steps)
    assert killed_and_resumed(scenario, tmp_path / "cut", cut) == reference


@pytest.mark.parametrize("case", pairwise(), ids=title)
def test_a_killed_run_ends_with_the_bits_of_the_uninterrupted_run(case, tmp_path):
    resumes_exactly(case, tmp_path)


@pytest.mark.sweep
@pytest.mark.parametrize(
    "chosen",
    list(itertools.product(*(VALUES[name] for name in NAMES[:3]), VALUES["cut"])),
    ids=title,
)
def test_every_combination_ends_with_the_bits_of_the_uninterrupted_run(chosen, tmp_path):
    *first, cut = chosen
    for number, rest in enumerate(itertools.product(*(VALUES[name] for name in NAMES[3:-1]))):
        resumes_exactly((*first, *rest, cut), tmp_path / str(number))


LEFT_OUT = {
    "model": Scenario(),
    "buffers": Scenario(model="batchnorm"),
    "optimizer": Scenario(optimizer="sgd"),
    "scheduler": Scenario(),
    "scaler": Scenario(precision="fp16"),
    "data": Scenario(),
    "statistics": Scenario(),
    "random generators": Scenario(),
    "keys of the samples": Scenario(workers=2),
}


@pytest.mark.parametrize("part", LEFT_OUT)
def test_a_run_resumed_without_one_part_of_its_state_ends_with_other_bits(part, tmp_path):
    scenario, cut = LEFT_OUT[part], CUTS["mid-epoch"]
    reference = uninterrupted(scenario, tmp_path / "whole", cut.save_steps)
    assert killed_and_resumed(scenario, tmp_path / "cut", cut, left_out=part) != reference
