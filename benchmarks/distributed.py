"""Two gloo ranks: our steps beside a bare DDP loop, our checkpoints beside those of stock `dcp`.

    python benchmarks/distributed.py [--rounds 4]

The protocol is that of step_overhead.py: each measurement has its own processes, a core for each
rank and one thread on it; a round measures every method once, and who goes first rotates from
round to round. What is stated is the median over the rounds, and the ratio within a round: its
median and its quartiles.

Steps: a process's figure is the median of its steps; no start, save or end is in it. *computed*
is the processor time in a step, of all threads of rank 0: other processes on the machine hardly
change it.

Checkpoints: a model in FSDP2 with its optimizer is saved and loaded a few times, the first time
not counted; a process's figure is the median. *blocked* is how long the call takes, *durable* how
long it takes until all files are synced. Ours are hashed as they are written, and verified as
they are loaded. They are made in each way of taking hold of the state: while the caller waits
("blocking"), copied at once ("async"), or copied beside the training ("overlap"). With the last,
the next step of the optimizer waits for the copy; there is none here.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles

from machine import write
from unbroken.checkpoint import SavePolicy

RANKS = 2
STEP_SHAPE = {"n_layer": 6, "n_embd": 320, "n_head": 5, "vocab_size": 8192}
CHECKPOINT_SHAPE = {"n_layer": 8, "n_embd": 512, "n_head": 8, "vocab_size": 8192}
BLOCK, BATCH = 64, 8  # tokens of a sample, samples of a step over both ranks
STEPS, WARM = 24, 4
SAVES = 3
LEARNING_RATE, SEED = 1e-4, 0


def gpt2(shape: dict[str, int]):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(**shape, n_positions=BLOCK, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


def samples() -> list[dict]:
    import torch

    tokens = torch.randint(0, STEP_SHAPE["vocab_size"], (64, BLOCK))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Watch:
    """Notes the time at the end of each step, and the time that its process has computed."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.computed: list[float] = []

    def step(self, step: int) -> None:
        if WARM <= step < STEPS:
            self.times.append(time.perf_counter())
            self.computed.append(time.process_time())

    def seconds(self) -> dict[str, float]:
        return {"step": between(self.times), "computed": between(self.computed)}


def between(times: list[float]) -> float:
    return median([after - before for before, after in pairwise(times)])


def ddp() -> dict[str, float]:
    import torch

    torch.distributed.init_process_group("gloo")
    model, data, watch = gpt2(STEP_SHAPE), samples(), Watch()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = adamw(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    sampler = torch.utils.data.DistributedSampler(data)
    loader = torch.utils.data.DataLoader(data, BATCH // RANKS, sampler=sampler)
    parallel.train()
    step, total = 0, 0.0
    while step < STEPS:
        for inputs in loader:
            loss = parallel(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            total += loss.item()
            step += 1
            watch.step(step)
            if step >= STEPS:
                break
    return watch.seconds()


def adamw(model):
    import torch

    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def unbroken(lanes: int | None = None) -> dict[str, float]:
    from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

    class Stopwatch(Callback):
        def on_step_end(self, trainer) -> None:
            watch.step(trainer.progress.step)

    model, data, watch = gpt2(STEP_SHAPE), samples(), Watch()
    config = TrainerConfig(
        output_dir=os.path.join(os.environ["BENCHMARK_FOLDER"], "run"),
        batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=LEARNING_RATE,
        save_steps=None,
        seed=SEED,
        lanes=lanes,
    )
    Trainer(model, config, data, callbacks=[Stopwatch()], display=NoDisplay()).train()
    return watch.seconds()


def sharded_state():
    """Return a model in FSDP2 and an optimizer that has made one step."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    model = gpt2(CHECKPOINT_SHAPE)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = adamw(model)
    tokens = torch.zeros(1, BLOCK, dtype=torch.long)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def timed(action) -> float:
    """Return the seconds until an action is over on all ranks."""
    import torch.distributed as dist

    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def our_checkpoints(save_mode: str) -> dict[str, float]:
    import torch.distributed as dist

    from unbroken import Checkpointer
    from unbroken.distributed import join

    model, optimizer = sharded_state()
    run, group = os.path.join(os.environ["BENCHMARK_FOLDER"], "run"), join()
    blocked, durable = [], []
    objects = {"model": model, "optimizer": optimizer}
    with Checkpointer(run, ranks=group, save=SavePolicy(mode=save_mode), **objects) as checkpointer:
        checkpointer.resume()
        for number in range(1, SAVES + 2):
            dist.barrier()
            began = time.perf_counter()
            checkpointer.save(number)
            blocked.append(time.perf_counter() - began)
            checkpointer.wait()
            dist.barrier()
            durable.append(time.perf_counter() - began)
    found = {"blocked": median(blocked[1:]), "durable": median(durable[1:])}
    if save_mode != "blocking":
        return found
    with Checkpointer(run, ranks=group, **objects) as checkpointer:
        loads = [
            timed(lambda: checkpointer.load(SAVES + 1, ["model", "optimizer"]))
            for _ in range(SAVES + 1)
        ]
    dist.barrier()
    return {**found, "load": median(loads[1:])}


def dcp_state(model, optimizer) -> dict:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def dcp_checkpoints() -> dict[str, float]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, optimizer = sharded_state()
    folder = Path(os.environ["BENCHMARK_FOLDER"])

    def save(number: int) -> None:
        dcp.save(dcp_state(model, optimizer), checkpoint_id=folder / str(number))

    def load() -> None:
        state = dcp_state(model, optimizer)
        dcp.load(state, checkpoint_id=folder / str(SAVES + 1))
        weights, moments = state["model"], state["optimizer"]
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)

    saves = [timed(lambda n=n: save(n)) for n in range(1, SAVES + 2)]
    loads = [timed(load) for _ in range(SAVES + 1)]
    durable = median(saves[1:])
    return {"blocked": durable, "durable": durable, "load": median(loads[1:])}


def dcp_async_checkpoints() -> dict[str, float]:
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    model, optimizer = sharded_state()
    folder, blocked, durable = Path(os.environ["BENCHMARK_FOLDER"]), [], []
    for number in range(1, SAVES + 2):
        dist.barrier()
        began = time.perf_counter()
        saving = dcp.async_save(dcp_state(model, optimizer), checkpoint_id=folder / str(number))
        blocked.append(time.perf_counter() - began)
        saving.result()
        dist.barrier()
        durable.append(time.perf_counter() - began)
    return {"blocked": median(blocked[1:]), "durable": median(durable[1:])}


STEP_METHODS = {
    "ddp": ddp,
    "unbroken": unbroken,
    "unbroken, 2 lanes": lambda: unbroken(lanes=2),
    "unbroken, 4 lanes": lambda: unbroken(lanes=4),
}
CHECKPOINT_METHODS = {
    "dcp.save": dcp_checkpoints,
    "dcp.async_save": dcp_async_checkpoints,
    "unbroken": lambda: our_checkpoints("blocking"),
    "unbroken, sync": lambda: our_checkpoints("async"),
    "unbroken, overlap": lambda: our_checkpoints("overlap"),
}
STOCK = {"steps": ("ddp",), "checkpoints": ("dcp.save", "dcp.async_save")}
METHODS = {"steps": STEP_METHODS, "checkpoints": CHECKPOINT_METHODS}


def measure(what: str, method: str) -> None:
    """Run on one rank, on a core of its own; rank 0 tells."""
    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    seconds = METHODS[what][method]()
    if rank == 0:
        print(json.dumps(seconds), flush=True)
    os._exit(0)  # gloo may not survive the end of an interpreter


def on_all_ranks(*arguments: str) -> dict[str, float]:
    """Run this script once a rank, in fresh processes; return what rank 0 tells."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "BENCHMARK_FOLDER": folder,
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, "--measure", *arguments],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(RANKS)
        ]
        told = [process.communicate() for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"{arguments}: a rank has failed\n{told[0][1]}\n{told[1][1]}")
    return json.loads(told[0][0].splitlines()[-1])


def compare(what: str, rounds: int) -> dict[str, dict]:
    """Return the seconds of each method in each round, and the ratios to the stock methods."""
    names = list(METHODS[what])
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)  # nobody always runs after the same other
        for name in names[first:] + names[:first]:
            rows[name].append(on_all_ranks(what, name))
            print(what, name, rows[name][-1], flush=True)
    found = {
        name: {
            figure: {
                "seconds": median([row[figure] for row in own]),
                **{
                    f"speed_over_{stock}": spread([row[figure] for row in rows[stock]], own, figure)
                    for stock in STOCK[what]
                    if figure in rows[stock][0]
                },
                "all": [row[figure] for row in own],
            }
            for figure in own[0]
        }
        for name, own in rows.items()
    }
    show(found)
    return found


def show(found: dict[str, dict]) -> None:
    """Print the medians, and how many times as fast as the stock methods they are."""
    for name, figures in found.items():
        for figure, one in figures.items():
            ratios = [f"{key}: {one[key]['median']:.2f}" for key in one if "speed_over_" in key]
            print(f"{name:20} {figure:9} {one['seconds']:.3f} s", *ratios, sep="  ", flush=True)


def spread(stock: list[float], own: list[dict[str, float]], figure: str) -> dict[str, float]:
    """Return the quartiles of the speed over the stock method of the same round."""
    ratios = [one / row[figure] for one, row in zip(stock, own, strict=True)]
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {"lower_quartile": low, "median": middle, "upper_quartile": high}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--measure", nargs=2, metavar=("WHAT", "METHOD"))
    arguments = parser.parse_args()
    if arguments.measure:
        measure(*arguments.measure)
    else:
        write("distributed", {what: compare(what, arguments.rounds) for what in METHODS})
