"""Each rank compresses what it stores, and reads what the others stored."""

from __future__ import annotations

import pytest

from distributed.compressed import save_and_resume
from distributed.ranks import run_ranks
from distributed.test_sharded_saves import found
from unbroken.cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    assert run_ranks(save_and_resume, str(folder)) == [0, 0]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_what_each_rank_resumes_is_what_was_saved(rank, folder):
    told = found(folder, rank)
    assert told["resumed"] == [told["saved"]] * 2


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_compressed_its_shards(rank, folder):
    shards = folder / "run" / "checkpoint-2" / f"model.rank{rank}.safetensors.planes"
    assert shards.read_bytes().startswith(b"\x89unbroken zstd\n")


def test_shards_of_a_compressed_run_are_verified(folder, capsys):
    assert main(["verify", str(folder / "run")]) == 0
