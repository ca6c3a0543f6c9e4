"""Samplers and loaders that give fewer samples than their length says, or more."""

from __future__ import annotations

import pytest

ARGS = {"max_steps": 30, "save_steps": 4}
BY_EPOCH = {"max_steps": 30, "save_strategy": "epoch"}


def sampler(given: int, draws: str) -> dict:
    return {"sampler": "of a wrong length", "length": {"given": given, "draws": draws}}


CASES = {
    "fewer, each drawn when it is asked for, 2 workers": (sampler(30, "global"), ARGS, 2, (9, 21)),
    "as many, each drawn when it is asked for": (sampler(48, "global"), ARGS, 0, (9, 21)),
    "fewer, at the end of an epoch": (sampler(30, "last"), BY_EPOCH, 0, (9, 21)),
    "more, from its own generator": (sampler(64, "own"), ARGS, 0, (21,)),
    "more, from its own generator, at the end of an epoch": (
        sampler(64, "own"),
        BY_EPOCH,
        0,
        (21,),
    ),
    "more, by a count at the end of a pass": (sampler(64, "last"), BY_EPOCH, 2, (21,)),
    "as many, by a count at the end of a pass": (sampler(48, "last"), BY_EPOCH, 0, (14, 27)),
    "lists that are fewer": ({"loader": "lists of 30 own"}, ARGS, 0, (9, 21)),
    "lists that are more": ({"loader": "lists of 64 own"}, BY_EPOCH, 0, (21,)),
    "no loader, fewer": ({"loader": "no loader of 30 own"}, BY_EPOCH, 0, (9, 21)),
    "no loader, more": ({"loader": "no loader of 64 own"}, BY_EPOCH, 0, (21,)),
    "no loader, more, inside of an epoch": ({"loader": "no loader of 64 last"}, ARGS, 0, (21,)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_length_goes_on_as_the_uninterrupted_run_did(name, run, uninterrupted):
    case, args, workers, kills = CASES[name]
    case = {**case, "args": {**args, "dataloader_num_workers": workers}}
    whole = uninterrupted(**case)
    for kill_at in kills:
        run(kill_at=kill_at, out=str(kill_at), **case)
        resumed = run(out=str(kill_at), **case)
        assert 1 < resumed.values.get("first_step", 0) <= kill_at, resumed.text
        assert resumed.bits == whole.bits, kill_at
        assert resumed.report[0].endswith(": exact")
