"""Models that accelerate shards with FSDP2: two ranks over gloo, killed and gone on with."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from adapters.conftest import Runs
from unbroken.adapters.transformers.trainer import refuse_what_cannot_resume
from unbroken.cli.main import main
from unbroken.errors import ConfigError

FSDP = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
SHARDED = {"action": "train_on_ranks", "ranks": 2, "fsdp": FSDP}
LENGTH = {"num_train_epochs": 2, "logging_steps": 2}
CASE = {**SHARDED, "args": {**LENGTH, "save_steps": 4}}

# An epoch has 6 steps: how often to save, the step of the kill, and the first step after that.
KILLS = {
    "inside an epoch": (4, 9, 9),
    "at the edge of an epoch": (6, 8, 7),
    "after the first step": (1, 2, 2),
    "before the first save": (4, 1, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", KILLS)
def test_a_sharded_run_is_the_same_run_after_a_kill(place, run, uninterrupted):
    save_steps, kill_at, first = KILLS[place]
    case = {**SHARDED, "args": {**LENGTH, "save_steps": save_steps}}
    killed = run(kill_at=kill_at, on_rank=1, **case)
    assert killed.status == -signal.SIGKILL, killed.text
    resumed = run(**case)
    assert resumed.first_step == first, resumed.text
    assert resumed.bits == uninterrupted(**CASE).bits


OTHERS = {
    "an adapter": {"lora": True},
    "activation checkpointing": {"fsdp": {**FSDP, "activation_checkpointing": True}},
    "weights on rank 0 alone": {"fsdp": {**FSDP, "cpu_ram_efficient_loading": True}},
    "bf16 and accumulation": {
        "args": {**CASE["args"], "bf16": True, "gradient_accumulation_steps": 2, "save_steps": 2}
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_a_sharded_run_is_the_same_run_with(name, run, uninterrupted):
    case = {**CASE, **OTHERS[name]}
    assert run(kill_at=5, on_rank=1, **case).status == -signal.SIGKILL
    resumed = run(**case)
    assert resumed.first_step == 5, resumed.text
    assert resumed.bits == uninterrupted(**case).bits


@pytest.mark.slow
@pytest.mark.parametrize("part", ["random states", "place", "losses"])
def test_a_sharded_run_is_another_run_without(part, run, uninterrupted):
    run(sabotage=part, kill_at=5, on_rank=1, **CASE)
    assert run(sabotage=part, **CASE).bits != uninterrupted(**CASE).bits


@pytest.mark.slow
def test_an_uninterrupted_sharded_run_has_the_bits_of_the_hosts_own(uninterrupted):
    assert uninterrupted(**CASE).bits == uninterrupted(**CASE, trainer="stock").bits


@pytest.mark.slow
def test_the_best_of_a_sharded_run_is_loaded_in_the_end(uninterrupted):
    best = {"eval_strategy": "steps", "eval_steps": 4, "load_best_model_at_end": True}
    case = {**SHARDED, "args": {**CASE["args"], **best, "learning_rate": 0.05}}
    ours = uninterrupted(**case)
    assert ours.best is not None
    assert ours.bits == uninterrupted(**case, trainer="stock").bits


@pytest.fixture(scope="module")
def killed(server, cache, tmp_path_factory):
    """A sharded run that was killed after step 5, and saved at step 4."""
    run = Runs(server, tmp_path_factory.mktemp("sharded"), cache)
    run(kill_at=5, on_rank=1, **CASE)
    return run


ALONE = {"args": {**CASE["args"], "gradient_accumulation_steps": 2}}


@pytest.mark.slow
def test_one_process_goes_on_from_two_sharded_ranks(killed, run):
    resumed = run(start=str(killed.folder / "run/checkpoint-4"), **ALONE)
    assert (resumed.first_step, resumed.step) == (5, 12), resumed.text
    assert "gradient_accumulation_steps: stored 1, now 2: equivalent" in resumed.text
    assert len(resumed.read) == 2 * 48 - 4 * 8


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_weights_and_moments_are_the_same_bytes_on(ranks, killed, run, uninterrupted):
    saved = uninterrupted(looks=True, **CASE).states["4"]
    order = {**CASE, "ranks": ranks} if ranks > 1 else ALONE
    named = {"start": str(killed.folder / "run/checkpoint-4"), "looks": True}
    resumed = run(**named, **order)
    assert resumed.status == 0, resumed.text
    assert resumed.states["4"] == saved
    assert resumed.states["8"] != saved


@pytest.mark.slow
def test_the_hosts_own_goes_on_from_an_exported_sharded_run(killed, run, uninterrupted):
    target = run.folder / "run/checkpoint-4"
    stored = killed.folder / "run/checkpoint-4"
    assert main(["export", str(stored), str(target), "--to", "transformers"]) == 0
    ddp = {key: value for key, value in CASE.items() if key != "fsdp"}
    resumed = run(trainer="stock", resume=True, **ddp)
    assert (resumed.status, resumed.first_step) == (0, 5), resumed.text
    assert resumed.log[-2]["loss"] == pytest.approx(uninterrupted(**CASE).log[-2]["loss"])


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [FSDP, {**FSDP, "state_dict_type": "SHARDED_STATE_DICT"}])
def test_a_sharded_checkpoint_of_the_hosts_own_is_refused_by_name(fsdp, run):
    case = {**CASE, "fsdp": fsdp}
    run(trainer="stock", kill_at=5, **case)
    assert "checkpoint-4: FSDP under transformers' own Trainer wrote" in run(**case).text


@pytest.mark.slow
def test_a_checkpoint_of_the_hosts_own_is_not_put_into_shards(run):
    run(trainer="stock", kill_at=5, **{k: v for k, v in CASE.items() if k != "fsdp"})
    assert "cannot be put into a sharded model" in run(**CASE).text


def test_fsdp1_is_refused_by_name():
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=1))
    accelerated = SimpleNamespace(state=state)
    kinds = {"is_fsdp_enabled": True, "is_deepspeed_enabled": False}
    with pytest.raises(ConfigError, match="fsdp_config: FSDP1"):
        refuse_what_cannot_resume(SimpleNamespace(**kinds, args=None, accelerator=accelerated))


def test_deepspeed_is_refused_by_name():
    with pytest.raises(ConfigError, match="deepspeed"):
        refuse_what_cannot_resume(SimpleNamespace(is_deepspeed_enabled=True, args=None))
