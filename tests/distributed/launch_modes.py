"""Ways in which a process comes to its group."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from unbroken.distributed import StoreGroup, join
from unbroken.errors import ConfigError, RankError


def join_and_close() -> None:
    group = join(timeout=30.0)
    assert dist.get_backend() == "gloo"
    assert all_reduced_ones() == group.world_size
    group.close()
    assert not dist.is_initialized()


def all_reduced_ones() -> float:
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return ones.item()


def join_a_group_of_the_user(file: str | None) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    where = {"init_method": f"file://{file}", "rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", **(where if file is not None else {}))
    group = join(timeout=30.0)
    assert (group.rank, group.world_size, group.local_rank) == (rank, world_size, rank)
    assert group.gather("rank", rank) == list(range(world_size))
    group.close()
    assert all_reduced_ones() == world_size
    dist.destroy_process_group()


def join_twice() -> None:
    for value in ("first", "second"):
        group = join(timeout=30.0)
        assert group.gather("call", value) == [value] * group.world_size
        group.close()


def two_groups_at_once() -> None:
    dist.init_process_group("gloo")
    first, second = join(timeout=30.0), join(timeout=30.0)
    assert isinstance(first, StoreGroup)
    assert first.broadcast("name", "first") == "first"
    assert second.broadcast("name", "second") == "second"
    first.close()
    second.close()
    dist.destroy_process_group()


def tell_how_joining_ends(joins: bool, folder: str) -> None:
    if not joins:
        return
    try:
        join(timeout=3.0)
    except RankError as error:
        told = f"{type(error).__name__}: {error}"
        Path(folder, os.environ["RANK"]).write_text(told)


def ask_for_a_gpu_that_is_not_there(folder: str) -> None:
    with pytest.raises(ConfigError) as raised:
        join(device_type="cuda", timeout=30.0)
    assert not dist.is_initialized()
    Path(folder, os.environ["RANK"]).write_text(str(raised.value))


def ask_for_different_devices(device_type: str, folder: str) -> None:
    try:
        join(device_type=device_type, timeout=30.0)
    except RankError as error:
        Path(folder, os.environ["RANK"]).write_text(str(error))
