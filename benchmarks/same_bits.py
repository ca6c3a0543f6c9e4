"""Digests of the weights and optimizers that runs of each kind end with: does a change of the code change a bit?

    python benchmarks/same_bits.py              print the table
    python benchmarks/same_bits.py --write      ... and write it to reference/same_bits.json
    python benchmarks/same_bits.py --compare    ... or say which runs end with other bits than there; status 1

Each run is made twice: by one process; and by processes of which the first is killed inside a step
(or stopped by a signal) and the last one resumes. Both must end with the same bits. Only public names
are used, so that the script outlives any rearrangement of the code. It takes about a minute.

Another processor or another PyTorch may round differently: the file tells its machine, and where that
is another one, other bits say nothing (status 2).
"""  # noqa: E501

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from unbroken import (
    Callback,
    Checkpointer,
    ResumeReport,
    SavePolicy,
    Trainer,
    TrainerConfig,
    batch_source,
)

REFERENCE = Path(__file__).parent / "reference" / "same_bits.json"
STEPS, SECONDS = 12, 600  # of a process; it needs two, on a core that nobody else uses
END = "SAME_BITS_END"  # not an attribute of a callback: that would be a change of the training


@dataclass(frozen=True)
class Ended:
    """What a process has at the end of its run."""

    model: nn.Module
    optimizer: Any
    report: ResumeReport


# How a run ends early


def end_if_asked(step: int, save: Callable[[], object] = lambda: None) -> None:
    """End this process in a step, after a backward pass, if the environment says so."""
    how, _, at = os.environ.get(END, "").partition(" ")
    if how and int(at) == step and os.environ.get("RANK", "1") == "1":
        if how == "saved":
            save()
        os.kill(os.getpid(), signal.SIGTERM if how == "stopped" else signal.SIGKILL)


class Ends(Callback):
    """Ends the own Trainer's process."""

    def on_micro_batch_end(self, trainer: Trainer) -> None:
        end_if_asked(trainer.progress.step + 1, trainer.save_checkpoint)


# Data and models


class Samples:
    """Random vectors with labels, each with noise from all three global generators."""

    def __init__(self, *, noise: bool = True) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(40, 6, generator=generator)
        self.y = torch.randint(0, 4, (40,), generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[index]
        if self.noise:
            x = x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x, self.y[index]


class Stream(torch.utils.data.IterableDataset):
    """The same samples in an order that each epoch draws."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        samples = Samples(noise=False)
        return (samples[int(index)] for index in torch.randperm(len(samples)))


def classifier(*, batch_norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    middle = nn.BatchNorm1d(16) if batch_norm else nn.Dropout(0.2)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), middle, nn.Linear(16, 4))


class Tied(nn.Module):
    """One weight under two names, as language models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.outer.weight = self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.dropout(torch.relu(self.inner(x)), 0.2, self.training)
        return self.head(self.outer(x))


def tied() -> nn.Module:
    torch.manual_seed(3)
    return Tied()


def in_fsdp() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = classifier(), init_device_mesh("cpu", (2,), mesh_dim_names=("data",))
    fully_shard(model[0], mesh=mesh)
    return fully_shard(model, mesh=mesh)


# Runs of the own Trainer


def own(
    folder: str,
    *,
    model: Callable[[], nn.Module] = classifier,
    data: Callable[[], Any] = Samples,
    **settings: Any,
) -> Ended:
    defaults = {
        "output_dir": folder,
        "batch_size": 8,
        "micro_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_steps": 3,
    }
    config = TrainerConfig(**{**defaults, **settings})
    trainer = Trainer(
        model(),
        config,
        data(),
        eval_dataset=Samples(noise=False) if config.evaluates else None,
        callbacks=[Ends()],
        loss_fn=nn.CrossEntropyLoss(),
    )
    trainer.train()
    return Ended(trainer.model, trainer.optimizer, trainer.resume_report)


BRANCH = {"branch": "lower", "resume_from_checkpoint": 3, "learning_rate": 0.002}


# Loops of one's own


def loop(folder: str, **options: Any) -> Ended:
    """Train with a source of batches, and with much that must be saved with the model."""
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=STEPS)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    data = batch_source(Samples(), seed=1, global_batch_size=8)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "data": data}
    with Checkpointer(folder, save_steps=3, average=average, **objects, **options) as checkpointer:
        report = checkpointer.resume()
        step = report.step
        for batch in data.iterate():
            x, y = batch.data
            (nn.functional.cross_entropy(model(x), y) + 0.01 * torch.randn(())).backward()
            end_if_asked(step + 1)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            average.update_parameters(model)
            data.used(batch)
            step += 1
            checkpointer.save_if_due(step)
            if step == STEPS:
                break
    return Ended(nn.ModuleList([model, average]), optimizer, report)


def plain_loop(folder: str, *, ranks: bool = False) -> Ended:
    """Train by a step's number alone; on ranks in DDP. Windows of 3 passes, saves inside them."""
    model, options = classifier(), {}
    net: nn.Module = model
    if ranks:
        from unbroken.distributed import join

        options["ranks"] = join()
        net = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    with Checkpointer(
        folder, save_steps=4, model=model, optimizer=optimizer, **options
    ) as checkpointer:
        report = checkpointer.resume()
        for step in range(report.step, 3 * STEPS):
            of_rank = 100 * int(os.environ.get("RANK", "0"))
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(of_rank + step))
            net.require_backward_grad_sync = step % 3 == 2
            net(x).square().mean().backward()
            end_if_asked(step + 1)
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
            checkpointer.save_if_due(step + 1)
    return Ended(model, optimizer, report)


# Runs of the Hugging Face Trainer


def drop_in(
    folder: str,
    *,
    stock_first: bool = False,
    lora: bool = False,
    options: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Ended:
    import transformers

    from unbroken.adapters.transformers import Trainer as OurTrainer

    class EndsHost(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **more):
            end_if_asked(state.global_step + 1)

    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    is_hf_checkpoint = stock_first and END in os.environ
    rows = torch.randint(0, 64, (40, 12), generator=torch.Generator().manual_seed(5))
    trainer = (transformers.Trainer if is_hf_checkpoint else OurTrainer)(
        tiny_gpt2(lora=lora),
        transformers.TrainingArguments(**{**defaults, **settings}),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[EndsHost()],
        **(options or {}),
    )
    trainer.train()
    return Ended(trainer.model, trainer.optimizer, trainer.resume_report)


def tiny_gpt2(*, lora: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    how = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return get_peft_model(model, how)


@dataclass(frozen=True)
class Run:
    """How a run is trained, by how many ranks, and how the first process of the second one ends.

    Attributes:
        train: Called with a folder, in each process.
        ranks: Processes that train together.
        resumed_on: As many resume it.
        end: "killed", "stopped" (by SIGTERM), or "saved" (and killed), and the step.
        begins: Trained before, in the same folder, undisturbed.
    """

    train: Callable[[str], Ended]
    ranks: int = 1
    resumed_on: int | None = None
    end: str = "killed 8"
    begins: Callable[[str], Ended] | None = field(default=None)


accumulated = partial(own, micro_batch_size=2)
overlapped = {"save_mode": "overlap"}
RUNS: Mapping[str, Run] = {
    "trainer": Run(accumulated),
    "trainer, stopped by a signal": Run(accumulated, end="stopped 8"),
    "trainer, gradients of an unfinished window": Run(accumulated, end="saved 8"),
    "trainer, saves overlap the training": Run(partial(own, **overlapped)),
    "trainer, fp16": Run(partial(own, fp16=True)),
    "trainer, bf16": Run(partial(own, bf16=True, optim="sgd", sgd_momentum=0.9)),
    "trainer, workers and augmentation": Run(partial(own, dataloader_num_workers=2)),
    "trainer, tied weights, adafactor": Run(partial(own, model=tied, optim="adafactor")),
    "trainer, batch statistics, best at the end": Run(
        partial(
            own,
            model=partial(classifier, batch_norm=True),
            eval_steps=2,
            load_best_model_at_end=True,
            lr_scheduler_type="reduce_lr_on_plateau",
        )
    ),
    "trainer, iterable data set": Run(partial(own, data=Stream)),
    "trainer, branch with another learning rate": Run(
        partial(own, **BRANCH, allow=("learning_rate",)), begins=own
    ),
    "trainer, 2 ranks": Run(own, ranks=2),
    "trainer, 2 ranks, bf16, workers": Run(
        partial(own, bf16=True, dataloader_num_workers=1, micro_batch_size=2), ranks=2
    ),
    "trainer, 2 lanes": Run(partial(own, lanes=2, micro_batch_size=2)),
    "trainer, 4 lanes on 2 ranks, then on 1": Run(
        partial(own, lanes=4, micro_batch_size=2), ranks=2, resumed_on=1
    ),
    "trainer, FSDP2 on 2 ranks": Run(partial(own, model=in_fsdp), ranks=2),
    "loop": Run(loop),
    "loop, saves overlap the training": Run(partial(loop, save=SavePolicy(mode="overlap"))),
    "loop, unfinished windows": Run(plain_loop, end="killed 15"),
    "loop, DDP on 2 ranks": Run(partial(plain_loop, ranks=True), ranks=2, end="killed 15"),
    "drop-in": Run(drop_in),
    "drop-in, stopped by a signal": Run(drop_in, end="stopped 8"),
    "drop-in, LoRA": Run(partial(drop_in, lora=True)),
    "drop-in, bf16, saves overlap the training": Run(
        partial(drop_in, bf16=True, options=overlapped)
    ),
    "drop-in, begun by transformers": Run(partial(drop_in, stock_first=True)),
    "drop-in, DDP on 2 ranks": Run(drop_in, ranks=2),
}


# Digests


def digests(ended: Ended) -> dict[str, str]:
    """Return the digests of all weights and of the optimizer, in the order of their names."""
    names = {one: name for name, one in ended.model.named_parameters()}
    held = {**dict(ended.model.named_buffers()), **ended.model.state_dict()}
    state = {
        f"{names[parameter]} {key}": value
        for parameter, values in ended.optimizer.state.items()
        for key, value in values.items()
    }
    for number, group in enumerate(ended.optimizer.param_groups):
        state |= {f"{number} {key}": value for key, value in group.items() if key != "params"}
    return {"weights": digest(held), "optimizer": digest(state)}


def digest(values: Mapping[str, Any]) -> str:
    found = hashlib.sha256()
    for name in sorted(values):
        found.update(name.encode() + b"\0" + raw(values[name]) + b"\0")
    return found.hexdigest()


def raw(value: Any) -> bytes:
    """Return the bytes of a tensor (of a sharded one, of this rank's part) or of a number."""
    if isinstance(value, torch.Tensor):
        part = value.to_local() if hasattr(value, "to_local") else value
        head = f"{part.dtype} {tuple(part.shape)} ".encode()
        flat = part.detach().cpu().contiguous().view(-1)
        return head + flat.view(torch.uint8).numpy().tobytes()
    return struct.pack("<d", value) if isinstance(value, float) else repr(value).encode()


# Processes

PRELOADED = ["torch._dynamo", "torch.distributed.fsdp"]
HOSTS = ["peft", "unbroken.adapters.transformers"]


def train_alone(
    train: Callable[[str], Ended], folder: str, out: str, environment: dict[str, str]
) -> None:
    """Train in this process, which is a fresh one; leave the digests in a file."""
    os.environ.update(environment)
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    status = 1
    try:
        ended = train(folder)
        more = {"step": ended.report.step, "inexact": what_is_not_exact(ended.report)}
        Path(out).write_text(json.dumps({**digests(ended), **more}))
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # gloo may not survive the end of an interpreter


def processes(
    train: Callable[[str], Ended], folder: Path, ranks: int, end: str | None
) -> list[int]:
    """Train in fresh processes; when one dies, end the others. Return their statuses."""
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(PRELOADED)  # looked at when the first process starts
    store = None if ranks == 1 else torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # fmt: skip
    started = []
    for rank in range(ranks):
        environment = {} if store is None else rank_environment(rank, ranks, store.port)
        environment |= {} if end is None else {END: end}
        arguments = (train, str(folder / "run"), str(folder / f"{rank}.json"), environment)
        started.append(fresh.Process(target=train_alone, args=arguments))
        started[-1].start()
    deadline, left = time.monotonic() + SECONDS, {one.sentinel: one for one in started}
    while left and time.monotonic() < deadline:
        for sentinel in wait(list(left), deadline - time.monotonic()):
            process = left.pop(sentinel)
            process.join()
            if process.exitcode != 0 and process.exitcode != 75:
                deadline = 0.0
    for process in started:
        process.kill()
        process.join()
    return [process.exitcode for process in started]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Return what torchrun sets, whose agent holds the store as this process does."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": socket.if_nameindex()[0][1],  # the loopback
        "RES_OPTIONS": "timeout:1 attempts:1",  # a TCPStore looks up the name of each address
    }


# Each run, whole and resumed


class RunError(Exception):
    """A run did not go as it must."""


def trained(run: Run, folder: Path, *, interrupted: bool) -> dict[str, Any]:
    """Train it in a folder of its own; return what it ended with."""
    folder.mkdir()
    if run.begins is not None:
        demand(processes(run.begins, folder, 1, None), [0], folder)
    ranks = run.ranks
    if interrupted:
        statuses = processes(run.train, folder, ranks, run.end)
        expected = 75 if run.end.startswith("stopped") else -signal.SIGKILL
        demand(statuses[-1:], [expected], folder)
        ranks = run.resumed_on or ranks
    demand(processes(run.train, folder, ranks, None), [0] * ranks, folder)
    ends = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]
    one = {name: of_all([end[name] for end in ends]) for name in ("weights", "optimizer")}
    if interrupted and ends[0]["step"] == 0:
        raise RunError("was not resumed, but trained from the start")
    if interrupted and ends[0]["inexact"]:
        raise RunError("\n".join(["was not resumed as exact", *ends[0]["inexact"]]))
    return one


def of_all(found: list[str]) -> str:
    """Return one digest for those of all ranks: theirs, where all have the same."""
    if len(set(found)) == 1:
        return found[0]
    return hashlib.sha256("".join(found).encode()).hexdigest()


def what_is_not_exact(report: ResumeReport) -> list[str]:
    """Return the differences that a resume names, besides edits of this checkout meanwhile."""
    told = [str(one) for one in report.differences if one.verdict != "harmless"]
    return [line for line in told if not line.startswith("code.git")]


def demand(statuses: list[int], expected: list[int], folder: Path) -> None:
    if statuses != expected:
        logs = "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))
        raise RunError(f"ended with {statuses}, expected {expected}\n{logs}")


def measured(name: str, folder: Path) -> dict[str, str]:
    """Return the digests of a run, which are those of the resumed one, too."""
    whole = trained(RUNS[name], folder / "whole", interrupted=False)
    resumed = trained(RUNS[name], folder / "resumed", interrupted=True)
    if other := [what for what in whole if whole[what] != resumed[what]]:
        raise RunError(f"resumed, it ends with other bits: {', '.join(other)}")
    return whole


def machine() -> dict[str, str]:
    """Return what may round differently elsewhere."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    packages = ("torch", "numpy", "transformers", "accelerate", "peft")
    return {
        "processor": processor[0] if processor else platform.machine(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": "1",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def compared(found: Mapping[str, Any], reference: Mapping[str, Any]) -> int:
    """Say which runs end with other bits than in the reference; return the exit status."""
    expected, here = reference["runs"], machine()
    other = [name for name in found if found[name] != expected.get(name)]
    for name in other:
        what = [
            what for what in found[name] if found[name][what] != expected.get(name, {}).get(what)
        ]
        print(f"OTHER BITS: {name}: {', '.join(what)}")
    facts = [
        f"{name}: {reference['machine'].get(name)} there, {here[name]} here"
        for name in here
        if here[name] != reference["machine"].get(name)
    ]
    if facts:
        print("another machine, which may round differently:", *facts, sep="\n  ")
    print(f"{len(found) - len(other)} of {len(found)} runs have the bits of the reference")
    return (2 if facts else 1) if other else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="runs whose name holds this text")
    parser.add_argument("--write", nargs="?", type=Path, const=REFERENCE, metavar="FILE")
    parser.add_argument("--compare", nargs="?", type=Path, const=REFERENCE, metavar="FILE")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the fork server, which loads torch after this
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    names = [name for name in RUNS if given.only is None or given.only in name]
    PRELOADED.extend(HOSTS if any("drop-in" in name for name in names) else [])
    found, failed = {}, []
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    print(f"{'run':45} {'weights':16} optimizer")
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        began = time.monotonic()
        try:
            found[name] = measured(name, place)
        except RunError as failure:
            failed.append(name)
            print(f"FAILED: {name}: {failure}", flush=True)
            continue
        short = (found[name][what][:16] for what in ("weights", "optimizer"))
        print(f"{name:45}", *short, f"{time.monotonic() - began:5.1f} s", flush=True)
    shutil.rmtree(folder)
    if failed:
        print(f"{len(failed)} of {len(names)} runs failed: {', '.join(failed)}")
        return 1
    if given.write is not None:
        given.write.parent.mkdir(exist_ok=True)
        given.write.write_text(json.dumps({"machine": machine(), "runs": found}, indent=1) + "\n")
        print(f"written: {given.write}")
    return 0 if given.compare is None else compared(found, json.loads(given.compare.read_text()))


if __name__ == "__main__":
    sys.exit(main())
