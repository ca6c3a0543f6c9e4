"""DistributedDataParallel adds gradients after a resume as it did in the process that was killed.

On three ranks the order of a sum matters. `test_exact_on_four_ranks` shows that a loop which
brings back all that it can see ends with other bits: its buckets are laid out anew.
"""

from __future__ import annotations

import json
import signal

import pytest

from distributed.ddp_loops import LOOPS, TOLD, train_all
from distributed.ranks import run_ranks

WORLD = 3
KILLED = [-signal.SIGKILL] * WORLD


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What all loops ended with in one piece, and after they were killed at each cut."""
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    for folder, parts in ((whole, [None]), (cut, [0, 1, 2])):
        for part in parts:
            codes = run_ranks(train_all, str(folder), part, world_size=WORLD)
            assert codes == KILLED
    return {
        name: [json.loads((folder / name / "outcome").read_text()) for folder in (whole, cut)]
        for name in {**LOOPS, **TOLD}
    }


@pytest.mark.parametrize("name", LOOPS)
def test_a_resumed_loop_ends_with_the_bits_of_one_that_was_not_killed(name, trained):
    (whole, _), (resumed, told) = trained[name]
    assert resumed == whole
    assert told == []


SAYS = {
    "static, after the first step": ("equivalent", "saved after the first step of a static graph"),
    "other buckets": ("equivalent", "ddp.model.bucket_bytes: stored"),
    "no unused parameters any more": ("equivalent", "ddp.model.find_unused_parameters: stored"),
    "no group": ("equivalent", "ranks=join()"),
    "a hook with a state": ("not covered", "powerSGD_hook keeps a state of its own"),
}


@pytest.mark.parametrize("name", TOLD)
def test_where_the_order_cannot_be_brought_back_a_resume_says_why(name, trained):
    verdict, says = SAYS[name]
    _, (_, told) = trained[name]
    assert [line for line in told if verdict in line and says in line], told
