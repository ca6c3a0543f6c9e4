"""What loading costs: GPT-2 124M with AdamW, 1.49 GB, into a live model and optimizer.

    python benchmarks/load.py [--rounds 5]

The protocol: each method has a process of its own, in which it loads cold (the page cache was
dropped) and hot, and takes a training step after each. Ours verifies every byte; the peers
verify none. *bare*: a direct read of the same files, in the same process just before. *extra
memory*: the highest of the process above what it was before the cold load, page cache not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from machine import measured_in_a_fresh_process, median, write

METHODS = ("unbroken", "torch.load", "safetensors")


def measure(method: str, layers: int) -> dict:
    from gpt2_state import PeakMemory, bare_read, make_cold, make_hot, model_and_optimizer

    model, optimizer = model_and_optimizer(layers)
    place = Path(tempfile.mkdtemp(dir=os.environ.get("BENCHMARK_DIR")))
    found: dict[str, float] = {}
    try:
        load = saved(method, model, optimizer, place)
        for heat, prepare in (("cold", make_cold), ("hot", make_hot)):
            make_cold(place)
            found["bare"] = bare_read(place)
            prepare(place)
            with PeakMemory() as peak:
                found[heat] = seconds_of(load)
            found[f"{heat} extra memory"] = peak.nbytes
            found[f"{heat} first step"] = seconds_of(lambda: step(model, optimizer))
    finally:
        shutil.rmtree(place)
    return {**found, "cold_over_bare": found["cold"] / found["bare"]}


def seconds_of(call) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step(model, optimizer) -> None:
    from gpt2_state import train_step

    train_step(model, optimizer)


def saved(method: str, model, optimizer, place: Path):
    """Save the state by a method, and return what loads it."""
    import torch

    if method == "unbroken":
        from unbroken import Checkpointer

        checkpointer = Checkpointer(place / "run", model=model, optimizer=optimizer)
        checkpointer.save(1)
        return lambda: checkpointer.load(1, ["model", "optimizer"])
    if method == "torch.load":
        torch.save([model.state_dict(), optimizer.state_dict()], place / "state.pt")
        return lambda: load_torch(model, optimizer, place / "state.pt")
    from save import save_safetensors

    save_safetensors(model, optimizer, place)
    return lambda: load_safetensors(model, optimizer, place)


def load_torch(model, optimizer, path: Path) -> None:
    import torch

    of_model, of_optimizer = torch.load(path, weights_only=True)
    model.load_state_dict(of_model)
    optimizer.load_state_dict(of_optimizer)


def load_safetensors(model, optimizer, place: Path) -> None:
    import torch
    from safetensors import safe_open

    with torch.no_grad():
        with safe_open(place / "model.safetensors", framework="pt") as file:
            for name, parameter in model.named_parameters():
                parameter.copy_(file.get_tensor(name))
        with safe_open(place / "optimizer.safetensors", framework="pt") as file:
            for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
                for key, tensor in optimizer.state[parameter].items():
                    tensor.copy_(file.get_tensor(f"{number}.{key}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--measure")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.layers)))
        raise SystemExit
    found: dict[str, list[dict]] = {method: [] for method in METHODS}
    for number in range(arguments.rounds):
        first = number % len(METHODS)
        for method in [*METHODS[first:], *METHODS[:first]]:
            more = ["--measure", method, "--layers", arguments.layers]
            found[method].append(measured_in_a_fresh_process(__file__, *more))
    medians = {
        method: {key: median([one[key] for one in all_]) for key in all_[0]}
        for method, all_ in found.items()
    }
    for method, one in medians.items():
        print(f"{method:12}", *(f"{key} {value:.3g}" for key, value in one.items()))
    write("load", {"rounds": arguments.rounds, "medians": medians, "all": found})
