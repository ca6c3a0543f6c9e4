"""One process and several keep the same contract."""

from __future__ import annotations

import pytest

from distributed.group_contract import CLAIMS, a_claim_that_is_false, keep
from distributed.ranks import run_ranks


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.__name__)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_group_keeps_the_contract(claim, world_size):
    assert run_ranks(keep, claim, world_size=world_size) == [0] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_claim_that_is_false_is_found(world_size):
    assert run_ranks(keep, a_claim_that_is_false, world_size=world_size) == [1] * world_size
