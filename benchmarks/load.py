"""What loading costs: GPT-2 124M with AdamW, 1.49 GB, into a live model and optimizer.

    python benchmarks/load.py [--quick] [--rounds 3] [--methods METHOD ...]

In each process the state is loaded cold (the page cache was dropped) and hot, in turns, and a
training step follows each: what a method puts off until the memory is first used is in it. Ours
verifies every byte; the peers verify none. *bare*: a direct read of the same files; *step*: a
training step with nothing loaded before it; both in the same process, in turns with the rest.
*extra memory*: the highest of the process above what it was before the first load, page cache not
counted, but for files that are mapped.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from statistics import median

import peers
from disk import bare_read, make_cold, make_hot
from protocol import Protocol
from save import seconds_of

TURNS = 3


def measure(name: str, quick: bool) -> dict[str, float]:
    from gpt2_state import PeakMemory, model_and_optimizer, train_step

    model, optimizer = model_and_optimizer(quick=quick)
    place = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    found: dict[str, list[float]] = {}
    step = lambda: train_step(model, optimizer)  # noqa: E731
    try:
        method = peers.make(name, model, optimizer, place / "run")
        method.save(1)
        method.finish()
        check_that_it_loads(method, model, optimizer)
        for turn in range(TURNS):
            note(found, "step", seconds_of(step))
            make_cold(place)
            note(found, "bare", bare_read(method.path(1)))
            for heat, prepare in (("cold", make_cold), ("hot", make_hot)):
                prepare(place)
                with PeakMemory() as peak:
                    note(found, heat, seconds_of(lambda: method.load(1)))
                note(found, f"{heat}_first_step", seconds_of(step))
                if turn == 0:
                    found[f"{heat}_extra_memory"] = [peak.nbytes]
        method.close()
    finally:
        shutil.rmtree(place)
    return summary({key: median(values) for key, values in found.items()})


def check_that_it_loads(method, model, optimizer) -> None:
    from gpt2_state import digest_of, train_step

    saved = digest_of(model, optimizer)
    train_step(model, optimizer)
    changed = digest_of(model, optimizer)
    method.load(1)
    if changed == saved or digest_of(model, optimizer) != saved:
        raise SystemExit(f"{type(method).__name__} does not load what it saved")


def note(found: dict[str, list[float]], key: str, value: float) -> None:
    found.setdefault(key, []).append(value)


def summary(one: dict[str, float]) -> dict[str, float]:
    for heat in ("cold", "hot"):
        one[f"{heat}_and_step"] = one[heat] + one[f"{heat}_first_step"]
    one["cold_over_bare"] = one["cold_and_step"] / (one["bare"] + one["step"])
    return one


def conclude(medians: dict[str, dict[str, float]]) -> dict[str, object]:
    ours = medians.get("unbroken blocking")
    if ours is None:
        return {}
    peers_hot = {name: one["hot_and_step"] for name, one in medians.items() if one is not ours}
    found: dict[str, object] = {
        "cold load and step over bare read and step": ours["cold_over_bare"],
        "extra memory in MiB": max(ours["cold_extra_memory"], ours["hot_extra_memory"]) / 2**20,
    }
    if peers_hot:
        fastest = min(peers_hot, key=peers_hot.__getitem__)
        found["fastest peer, hot"] = fastest
        found["hot load and step over that"] = ours["hot_and_step"] / peers_hot[fastest]
    return found


if __name__ == "__main__":
    protocol = Protocol(__file__, __doc__, measure, peers.LOADING, rounds=3)
    if protocol.quick:
        import peers.dcp
        import peers.hosts
    protocol.run(conclude)
