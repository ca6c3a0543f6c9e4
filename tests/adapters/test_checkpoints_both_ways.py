"""Checkpoints of the host's own Trainer go on in ours, and ours in it; tools read both."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapters.kill_cases import PLAIN
from unbroken.cli.main import main

POINTS = [("shuffled", 8), ("shuffled", 18), ("accumulation with a remainder", 7)]
POINTS += [("a sampler of its own", 29), ("two workers", 13)]


@pytest.mark.parametrize(("name", "kill_at"), POINTS)
def test_a_stock_checkpoint_goes_on_as_the_hosts_own_would(name, kill_at, run, uninterrupted):
    assert run(trainer="stock", kill_at=kill_at, **PLAIN[name]).status < 0
    resumed = run(**PLAIN[name])
    assert resumed.first_step > 1
    assert resumed.digest == uninterrupted(trainer="stock", **PLAIN[name]).digest


def test_it_becomes_one_of_ours_and_is_kept_as_it_was(run):
    run(trainer="stock", kill_at=8)
    run(kill_at=7)
    assert (run.folder / "run/checkpoint-5/manifest.json").exists()
    assert (run.folder / "run/set-aside/checkpoint-5.1/optimizer.pt").exists()


def test_a_kill_after_that_loses_nothing(run, uninterrupted):
    run(trainer="stock", kill_at=8)
    run(kill_at=7)
    assert run().digest == uninterrupted().digest


def test_a_stock_checkpoint_of_elsewhere_is_named_by_its_path(run, uninterrupted):
    run("old", trainer="stock", kill_at=18)
    resumed = run(args={"resume_from_checkpoint": str(run.folder / "old/checkpoint-15")})
    assert (resumed.first_step, resumed.digest) == (16, uninterrupted().digest)
    assert (run.folder / "old/checkpoint-15/optimizer.pt").exists()


def test_weights_in_shards_are_read(run, uninterrupted):
    run(trainer="stock", kill_at=8)
    folder = run.folder / "run/checkpoint-5"
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert run().digest == uninterrupted().digest


def test_another_learning_rate_over_a_stock_checkpoint_is_refused_or_meant(run):
    run(trainer="stock", kill_at=8)
    lower = {"args": {"learning_rate": 1e-4}}
    assert "learning_rate: stored 0.001, now 0.0001" in run(**lower).text
    named = run("other", start=str(run.folder / "run/checkpoint-5"), **lower)
    assert named.rates["36"] <= named.rates["6"] <= 1e-4


@pytest.mark.parametrize(("name", "kill_at"), POINTS)
def test_the_hosts_own_goes_on_from_an_exported_one(name, kill_at, run, uninterrupted):
    run(kill_at=kill_at, **PLAIN[name])
    step = max(int(p.name.split("-")[1]) for p in (run.folder / "run").glob("checkpoint-*"))
    target = run.folder / f"stock/checkpoint-{step}"
    assert main(["export", str(run.folder / "run"), str(target), "--to", "transformers"]) == 0
    resumed = run("stock", trainer="stock", resume=True, **PLAIN[name])
    assert resumed.first_step == step + 1
    assert resumed.digest == uninterrupted(**PLAIN[name]).digest


def test_an_export_overwrites_nothing(run, tmp_path):
    run(kill_at=8)
    assert main(["export", str(run.folder / "run"), str(tmp_path), "--to", "transformers"]) == 2


@pytest.fixture
def folder(run):
    run(kill_at=8)
    return run.folder / "run/checkpoint-5"


def test_from_pretrained_reads_our_folder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder).architectures == ["GPT2LMHeadModel"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_our_folder_has_what_tools_look_for(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (5, 36)
    assert [line["step"] for line in state["log_history"]] == [3]
    assert json.loads((folder / "training_args.json").read_text())["learning_rate"] == 0.001


def test_nothing_in_our_folder_is_a_pickle(folder):
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_a_stock_archive_that_would_run_code_is_refused(run):
    run(trainer="stock", kill_at=8)

    class Evil:
        def __reduce__(self):
            return print, ("owned",)

    torch.save(Evil(), run.folder / "run/checkpoint-5/scheduler.pt")
    refused = run()
    assert refused.status == 1
    assert "reading it would run its code" in refused.text
    assert "\nowned" not in refused.text
