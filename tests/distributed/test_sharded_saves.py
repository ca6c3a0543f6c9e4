"""Saves of a sharded model: killed, damaged, refused, and what each rank has of its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from distributed import sharded_saves as acts
from distributed.ranks import run_ranks
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, export_weights

PHASES = ["begin a save", "who sees the staging folder", "save", "what is stored", "commit"]
HEARD = "when to hear of a save"
KILLS = [("blocking", phase) for phase in PHASES]
KILLS += [("overlap", phase) for phase in ("copy the rest", *PHASES, HEARD)]
KILLS += [("async", "what is stored")]


def found(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"found-{rank}.json").read_text())


def told_by_all(act, folder: Path) -> list:
    """Run an act on both ranks; return what each of them found."""
    codes = run_ranks(acts.with_checkpointer, str(folder), of_rank=[act, act])
    assert codes == [0, 0]
    return [found(folder, rank)["found"] for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert run_ranks(acts.run_to_the_end, str(folder), "blocking") == [0, 0]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("mode", "phase"), KILLS)
def test_a_rank_killed_in_a_save_leaves_a_checkpoint_that_goes_on_exactly(
    mode, phase, rank, whole, tmp_path
):
    kill = (rank, phase)
    codes = run_ranks(acts.run_to_the_end, str(tmp_path), mode, kill, never_end=[1 - rank])
    assert codes[rank] == -signal.SIGKILL
    assert run_ranks(acts.run_to_the_end, str(tmp_path), mode) == [0, 0]
    assert found(tmp_path)["end"] == found(whole)["end"]
    committed = kill == (1, "commit")  # by rank 0, if it came to it before it was ended as well
    newest = (3,) if phase == HEARD else (2, 3) if committed else (2,)
    assert found(tmp_path)["from"] in newest
    assert list((tmp_path / "run" / ".staging").iterdir()) == []


def test_a_rank_killed_before_it_told_what_it_stored_is_named_by_the_others(tmp_path):
    kill = (1, "what is stored")
    assert run_ranks(acts.run_to_the_end, str(tmp_path), "blocking", kill) == [3, -signal.SIGKILL]
    assert "rank 1: has ended before gather what is stored" in (tmp_path / "error-0").read_text()
    assert not (tmp_path / "run" / "checkpoint-3").exists()


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A run of which one shard of the newest checkpoint is damaged."""
    assert run_ranks(acts.run_to_the_end, str(tmp_path), "blocking") == [0, 0]
    shards = tmp_path / "run" / "checkpoint-3" / "model.rank1.safetensors"
    raw = bytearray(shards.read_bytes())
    raw[-1] ^= 1
    shards.write_bytes(raw)
    return tmp_path


def test_one_damaged_shard_sends_all_ranks_to_the_next_older_checkpoint(damaged):
    for step, reasons in told_by_all(acts.resume_with_a_damaged_shard, damaged):
        assert step == 2
        assert "rank" in reasons[0]
        assert "model.rank1.safetensors: model.score.weight (shard at 2, 0)" in reasons[0]


def test_one_damaged_shard_of_the_checkpoint_asked_for_is_an_error_on_all_ranks(damaged):
    for error in told_by_all(acts.resume_the_damaged_one, damaged):
        assert error.startswith("CorruptCheckpointError: rank")
        assert "(shard at" in error


def test_a_full_disk_of_one_rank_fails_the_save_on_all_and_costs_nothing(tmp_path):
    for rank, (error, left, saved) in enumerate(told_by_all(acts.save_on_a_full_disk, tmp_path)):
        assert error.startswith("SaveError" if rank == 1 else "RankError: rank 1: save: SaveError")
        assert (left, saved) == ([], True)


def test_shards_are_not_saved_where_only_rank_0_sees_the_disk(tmp_path):
    for error in told_by_all(acts.save_where_only_rank_0_sees, tmp_path):
        assert error.startswith("ConfigError: model.")
        assert "rank 1 cannot store it" in error


def tapes(folder: Path, world_size: int, per_rank=None) -> list:
    codes = run_ranks(acts.read_tapes, str(folder), per_rank, world_size=world_size)
    assert codes == [0] * world_size
    return [found(folder, rank)["found"] for rank in range(world_size)]


def test_each_rank_gets_back_its_own_on_as_many_ranks_only(tmp_path):
    told_by_all(acts.save_tapes, tmp_path)
    assert [at for at, _ in tapes(tmp_path, 2)] == [10, 11]
    for at, error in tapes(tmp_path, 1):
        assert at == 0
        assert "tape: each rank has a state of its own" in error
        assert "expected 2 ranks, found 1" in error
    assert [at for at, _ in tapes(tmp_path, 1, per_rank=())] == [10]


def test_an_optimizer_with_another_state_on_each_rank_is_refused(tmp_path):
    for error in told_by_all(acts.save_other_state_by_rank, tmp_path):
        assert "rank 1: the state to be saved, without tensors.optimizer" in error


def test_a_buffer_that_differs_between_ranks_is_refused_by_name(tmp_path):
    for error in told_by_all(acts.save_another_buffer_by_rank, tmp_path):
        assert "rank 1: the tensors that each rank holds whole.model.calls" in error


def test_parameters_that_a_forward_pass_gathered_are_saved_and_skipped_in_their_shards(tmp_path):
    (gathered, saved), _ = told_by_all(acts.save_after_an_evaluation, tmp_path)
    (kept, loaded), _ = told_by_all(acts.resume_without_the_embedding, tmp_path)
    assert gathered
    assert kept
    others = [name for name in saved if not name.startswith(("embed.", "head."))]
    assert {n: loaded[n] for n in others} == {n: saved[n] for n in others}


def test_the_state_of_a_sharded_optimizer_is_overwritten_where_it_is(tmp_path):
    for found_by_rank in told_by_all(acts.load_over_what_is_there, tmp_path):
        assert found_by_rank == [True, True, True]


def test_shards_of_a_hugging_face_model_become_what_from_pretrained_reads(tmp_path):
    import transformers

    from distributed.sharded import digest

    assert run_ranks(acts.save_a_gpt2, str(tmp_path)) == [0, 0]
    reader = CheckpointReader(LocalStorage(tmp_path / "run"), "checkpoint-1")
    exported = export_weights(reader, tmp_path / "out", max_file_bytes=3000)
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert {n: digest(t) for n, t in model.state_dict().items()} == found(tmp_path)["found"]
    assert "model.safetensors.index.json" in exported.files


def test_ranks_with_the_same_state_divide_the_writing_evenly(tmp_path):
    assert run_ranks(acts.save_a_ddp_model, str(tmp_path), world_size=4) == [0] * 4
    reader = CheckpointReader(LocalStorage(tmp_path / "run"), "checkpoint-1")
    sizes = {f.name: f.nbytes for f in reader.manifest.files if "optimizer" in f.name}
    weight = 64 * 64 * 4
    assert "model.safetensors" in {file.name for file in reader.manifest.files}
    assert list(sizes) == [f"optimizer.rank{rank}.safetensors" for rank in (1, 2, 3)]
    assert max(sizes.values()) - min(sizes.values()) < 2 * weight
