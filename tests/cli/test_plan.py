"""`unbroken plan`: what it says of a cluster that is not here."""

from __future__ import annotations

import json
import time

import pytest

from unbroken.cli.main import main

LLAMA = ("--gpus", "16384", "--parameters", "405B", "--bandwidth", "2TB/s")


def test_the_plan_of_a_large_cluster(capsys):
    assert main(["plan", *LLAMA, "--step-seconds", "6"]) == 0
    told = capsys.readouterr().out
    words = ("4.9 TB", "one every 3.1 h", "save_steps=39", "95.30% by the formula", "60.0 min")
    assert [word for word in words if word not in told] == []


def test_the_plan_as_json_holds_both_figures(capsys):
    assert main(["plan", *LLAMA, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert abs(plan["goodput"] - plan["simulated"]["goodput"]) < 3 * plan["simulated"]["error"]
    assert plan["storage_bytes"] == 4 * 405e9 * 12


def test_an_overlapped_save_is_made_more_often_and_loses_less(capsys):
    plans = []
    for more in ([], ["--lost-seconds", "0.1"]):
        main(["plan", *LLAMA, "--json", *more])
        plans.append(json.loads(capsys.readouterr().out))
    blocking, overlapped = plans
    assert overlapped["rhythm"]["interval"] < blocking["rhythm"]["interval"]
    assert overlapped["goodput"] > blocking["goodput"]


SMALL = ("--gpus", "8", "--parameters", "8B", "--bandwidth")
QUICK = {
    "saves cost nothing": (*SMALL, "2GB/s", "--lost-seconds", "0"),
    "the storage is as fast as one likes": (*SMALL, "inf"),
    "failures are all but unknown": (*SMALL, "2GB/s", "--gpu-days", "1e12"),
}


@pytest.mark.parametrize("words", QUICK.values(), ids=QUICK)
def test_a_plan_is_made_at_once_however_many_saves_lie_between_failures(words, capsys):
    began = time.process_time()
    assert main(["plan", *words, "--json"]) == 0
    assert time.process_time() - began < 5  # a billion saves, played one by one, take minutes
    plan = json.loads(capsys.readouterr().out)
    difference = abs(plan["goodput"] - plan["simulated"]["goodput"])
    assert difference < max(4 * plan["simulated"]["error"], 1e-9)


def test_no_save_comes_in_the_middle_of_a_step(capsys):
    assert main(["plan", *LLAMA, "--step-seconds", "1000", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["save_steps"], plan["rhythm"]["interval"]) == (1, 1000)


def test_an_interval_that_slow_storage_forbids_is_not_told_again_and_again(capsys):
    assert main(["plan", *SMALL, "1MB/s", "--lost-seconds", "1"]) == 0
    assert capsys.readouterr().out.count("(best)") == 1


BAD = {
    "gpu_days: must be positive and finite": (*LLAMA, "--gpu-days", "inf"),
    "lost: must be a number of seconds": (*LLAMA, "--lost-seconds", "inf"),
    "expected a number such as 8B": ("--gpus", "8", "--parameters", "8X", "--bandwidth", "1GB/s"),
    "gpus: must be positive": ("--gpus", "0", "--parameters", "8B", "--bandwidth", "1GB/s"),
    "would never get on": ("--gpus", "2000000", "--parameters", "800B", "--bandwidth", "1GB/s"),
    "--keep: expected at least 1": (*LLAMA, "--keep", "0"),
    "--step-seconds: expected more than 0": (*LLAMA, "--step-seconds", "0"),
}


@pytest.mark.parametrize("words", BAD)
def test_a_plan_that_cannot_be_made_says_why(words, capsys):
    assert main(["plan", *BAD[words]]) == 2
    assert words in capsys.readouterr().err
