"""Each rank gets back what it alone has kept in attributes."""

from __future__ import annotations

import json

import attribute_runs
from distributed.ranks import run_ranks


def test_what_each_rank_keeps_of_its_own_comes_back(tmp_path):
    for name, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
        assert run_ranks(attribute_runs.on_ranks, str(tmp_path / name), steps, world_size=2) == [
            0,
            0,
        ]
    for rank in (0, 1):
        whole, parts = (json.loads((tmp_path / f"{n}.{rank}.json").read_text()) for n in NAMES)
        assert parts == whole
        assert whole[0] == 4 * (rank + 0.5)


NAMES = ("whole", "parts")
