"""Saves of a sharded model in which something goes wrong, or each rank has something of its own."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import threading
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distributed.sharded import build, checkpointer_in, digest, facts, train
from unbroken.checkpoint import Checkpointer, RankPolicy, ResumePolicy, SavePolicy
from unbroken.distributed import join
from unbroken.distributed.dtensors import local_part
from unbroken.errors import CheckpointError, ConfigError, RankError, SaveError

LAYOUT = "fsdp-2"
END = 4


class Killed:
    """A group of which one rank is killed when it comes to a call, once it is armed."""

    def __init__(self, group, rank: int, at: str, armed: threading.Event) -> None:
        self._group, self._doomed, self._at = group, rank, at
        self.armed = armed

    def __getattr__(self, name):
        return getattr(self._group, name)

    def new_subgroup(self):
        return Killed(self._group.new_subgroup(), self._doomed, self._at, self.armed)

    def gather(self, what, value):
        self._come_to(what)
        return self._group.gather(what, value)

    def run_on_all(self, what, action):
        self._come_to(what)
        return self._group.run_on_all(what, action)

    def _come_to(self, what) -> None:
        if self.armed.is_set() and self._group.rank == self._doomed and what == self._at:
            os.kill(os.getpid(), signal.SIGKILL)


def run_to_the_end(folder: str, mode: str, kill: tuple[int, str] | None = None) -> None:
    """Save after two and three steps; with `kill`, one rank dies in the second save."""
    armed = threading.Event()
    group = join(timeout=60.0) if kill is None else Killed(join(timeout=60.0), *kill, armed)
    model, optimizer = build(LAYOUT, seed=1)
    options = {"save": SavePolicy(mode=mode)}
    checkpointer = checkpointer_in(f"{folder}/run", group, model, optimizer, **options)
    done = checkpointer.resume().step
    for step in range(done + 1, END + 1):
        train(model, optimizer, LAYOUT, range(step - 1, step))
        if step == 3:
            checkpointer.wait()
            armed.set()
        if step in (2, 3):
            save_or_tell(folder, checkpointer, step)
    leave(folder, group, checkpointer, {"from": done, "end": facts(model, optimizer)})


def save_or_tell(folder: str, checkpointer: Checkpointer, step: int) -> None:
    try:
        checkpointer.save(step)
    except RankError as error:
        Path(folder, f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def leave(folder: str, group, checkpointer, found: dict) -> None:
    """Tell what was found, and end without taking torch down."""
    Path(folder, f"found-{os.environ['RANK']}.json").write_text(json.dumps(found))
    checkpointer.close()
    group.close()
    os._exit(0)


def with_checkpointer(act, folder: str) -> None:
    """Give an act the checkpointer of a sharded model on this rank; leave what it returns."""
    group = join(timeout=30.0)
    model, optimizer = build(LAYOUT, seed=1)
    train(model, optimizer, LAYOUT, range(1))
    checkpointer = checkpointer_in(f"{folder}/run", group, model, optimizer)
    leave(folder, group, checkpointer, {"found": act(checkpointer, model, optimizer)})


def error_of(action, *kinds) -> str:
    try:
        action()
    except kinds as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def resume_with_a_damaged_shard(checkpointer, model, optimizer):
    report = checkpointer.resume()
    return [report.step, [one.reason for one in report.rejected]]


def resume_the_damaged_one(checkpointer, model, optimizer):
    return error_of(lambda: checkpointer.resume(3), CheckpointError)


def save_on_a_full_disk(checkpointer, model, optimizer):
    """On rank 1 no file may grow; then there is room, and the same call succeeds."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if checkpointer.group.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    error = error_of(lambda: checkpointer.save(1), SaveError, RankError)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = [folder for _, folder in checkpointer.run.catalog.folders()]
    checkpointer.save(1)
    return [error, left, Path(checkpointer.path(1)).is_dir()]


def save_where_only_rank_0_sees(checkpointer, model, optimizer):
    blind = Checkpointer(
        checkpointer.path(0) + "-run",
        ranks=RankPolicy(group=checkpointer.group, read_from="rank0"),
        model=model,
    )
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(1)  # the generators must be the same on all ranks
    with blind:
        return error_of(lambda: blind.save(1), ConfigError, RankError)


class Tape:
    """Something with a state, of which each rank has another one."""

    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self):
        return {"at": self.at, "noise": torch.full((2,), self.at)}

    def load_state_dict(self, state):
        self.at = state["at"]


def save_tapes(checkpointer, model, optimizer):
    checkpointer.objects["tape"] = Tape(10 + checkpointer.group.rank)
    checkpointer.save(1)
    return checkpointer.group.rank


def read_tapes(folder: str, per_rank) -> None:
    """Resume on any number of ranks, without the model."""
    from unbroken.distributed import SingleProcess

    group = join(timeout=30.0) if int(os.environ["WORLD_SIZE"]) > 1 else SingleProcess()
    tape = Tape(0)
    policy = ResumePolicy(skip=("model", "optimizer"), allow=("model", "optimizer"))
    checkpointer = Checkpointer(
        f"{folder}/run", ranks=RankPolicy(group=group, per_rank=per_rank), resume=policy, tape=tape
    )
    found = error_of(lambda: checkpointer.load(1, ["tape"]), CheckpointError, RankError)
    leave(folder, group, checkpointer, {"found": [tape.at, found]})


def save_other_state_by_rank(checkpointer, model, optimizer):
    if checkpointer.group.rank == 1:
        optimizer.state.clear()
    return error_of(lambda: checkpointer.save(1), RankError)


def save_another_buffer_by_rank(checkpointer, model, optimizer):
    model.calls += checkpointer.group.rank
    return error_of(lambda: checkpointer.save(1), RankError)


def save_after_an_evaluation(checkpointer, model, optimizer):
    """A forward pass alone leaves the root's parameters gathered; a save cuts them again."""
    model(torch.zeros(1, 3, dtype=torch.int64))
    gathered = not isinstance(model.norm.weight, DTensor)
    checkpointer.save(1)
    return [gathered, facts(model, optimizer)]


def load_over_what_is_there(checkpointer, model, optimizer):
    """Lose the moments, and load; tell where they lie before and after."""
    moments = [state["exp_avg"] for state in optimizer.state.values()]
    saved, places = facts(model, optimizer), [local_part(one).data_ptr() for one in moments]
    checkpointer.save(1)
    for one in moments:
        local_part(one).zero_()
    lost = facts(model, optimizer) != saved
    checkpointer.load(1, ["model", "optimizer"])
    now = [state["exp_avg"] for state in optimizer.state.values()]
    kept = [local_part(one).data_ptr() for one in now] == places
    return [lost, kept, facts(model, optimizer) == saved]


def resume_without_the_embedding(checkpointer, model, optimizer):
    """Leave the embedding as it is here, and load the rest."""
    here = digest(model.embed.weight)
    policy = ResumePolicy(
        skip=("embed.weight", "head.weight"), allow=("embed.weight", "head.weight")
    )
    place = checkpointer.run.storage.describe()
    checkpointer.close()
    with Checkpointer(
        place,
        ranks=checkpointer.group,
        resume=policy,
        model=model,
        optimizer=optimizer,
    ) as again:
        again.resume("must")
    return [digest(model.embed.weight) == here, facts(model, optimizer)]


def save_a_gpt2(folder: str) -> None:
    """Save a tiny sharded Hugging Face model, and tell what its weights are."""
    import transformers

    group = join(timeout=30.0)
    torch.manual_seed(1)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=6, vocab_size=11, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    checkpointer = Checkpointer(f"{folder}/run", ranks=group, model=model)
    checkpointer.save(1)
    weights = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    leave(folder, group, checkpointer, {"found": weights})


def save_a_ddp_model(folder: str) -> None:
    """Save a replicated model with two moments for each weight."""
    group = join(timeout=30.0)
    torch.manual_seed(1)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(*(nn.Linear(64, 64) for _ in "abc")))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    checkpointer = checkpointer_in(f"{folder}/run", group, model, optimizer)
    checkpointer.save(1)
    leave(folder, group, checkpointer, {"found": dist.get_world_size()})
