"""A process finds its group: torchrun's, one that the user made, or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed.launch_modes import (
    ask_for_a_gpu_that_is_not_there,
    ask_for_different_devices,
    join_a_group_of_the_user,
    join_and_close,
    join_twice,
    tell_how_joining_ends,
    two_groups_at_once,
)
from distributed.ranks import run_ranks
from unbroken.distributed import SingleProcess, join
from unbroken.errors import ConfigError

SCRIPT = Path(__file__).parent / "scripts" / "sum_of_ranks.py"


@pytest.fixture
def torchrun_said(monkeypatch):
    def say(**environment):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return say


@pytest.mark.slow
def test_torchrun_starts_the_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout == "[3.0] 2\n"


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_a_process_without_others_is_alone(torchrun_said, environment):
    torchrun_said(**environment)
    assert isinstance(join(), SingleProcess)


@pytest.mark.parametrize("store_on_rank_0", [True, False])
@pytest.mark.parametrize("world_size", [2, 4])
def test_joining_makes_the_process_group_and_closing_ends_it(world_size, store_on_rank_0):
    exits = run_ranks(join_and_close, world_size=world_size, store_on_rank_0=store_on_rank_0)
    assert exits == [0] * world_size


@pytest.mark.parametrize("file", [True, False])
def test_a_group_of_the_user_is_used_and_left_alone(tmp_path, file):
    path = str(tmp_path / "store") if file else None
    assert run_ranks(join_a_group_of_the_user, path) == [0, 0]


@pytest.mark.parametrize("store_on_rank_0", [True, False])
def test_a_process_may_join_again_after_closing(store_on_rank_0):
    assert run_ranks(join_twice, store_on_rank_0=store_on_rank_0) == [0, 0]


def test_two_groups_over_one_store_do_not_meet():
    assert run_ranks(two_groups_at_once) == [0, 0]


def test_a_rank_that_never_joins_is_named(tmp_path):
    run_ranks(tell_how_joining_ends, str(tmp_path), world_size=3, of_rank=[True, False, True])
    message = "RankTimeoutError: rank 1: no answer within 3 s: agree device_type"
    assert [path.read_text() for path in tmp_path.iterdir()] == [message] * 2


def test_a_missing_rank_is_a_timeout_where_rank_0_holds_the_store(tmp_path):
    of_rank = [True, False]
    run_ranks(tell_how_joining_ends, str(tmp_path), of_rank=of_rank, store_on_rank_0=True)
    told = (tmp_path / "0").read_text()
    assert told.startswith("RankTimeoutError: 127.0.0.1:")
    assert told.endswith("not all ranks came within 3 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_an_error_on_every_rank(tmp_path):
    assert run_ranks(ask_for_a_gpu_that_is_not_there, str(tmp_path)) == [0, 0]
    told = "LOCAL_RANK: there is no GPU for this rank: expected less than 0, found "
    assert [(tmp_path / rank).read_text() for rank in "01"] == [told + "0", told + "1"]


def test_ranks_on_different_devices_are_refused(tmp_path):
    run_ranks(ask_for_different_devices, str(tmp_path), of_rank=["cpu", "cuda"])
    message = 'rank 1: device_type: expected "cpu" (rank 0), found "cuda" (rank 1)'
    assert [path.read_text() for path in tmp_path.iterdir()] == [message] * 2


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(torchrun_said, environment, wrong):
    torchrun_said(**environment)
    with pytest.raises(ConfigError) as raised:
        join()
    assert raised.value.where == wrong
