"""A real GPT-2 on real text, dropout on: killed, continued, and read back by transformers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fresh import run_fresh
from scenarios import outcome
from unbroken.language_model import TokenDataset, builtin_text
from unbroken.training import Callback, NoDisplay, Trainer, TrainerConfig

STEPS = 8


class Kill(Callback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_micro_batch_end(self, trainer) -> None:
        if trainer.progress.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=layers,
            n_embd=32,
            n_head=2,
            n_positions=32,
            vocab_size=257,
            loss_type="ForCausalLM",
        )
    )


def finetune(folder: str, kill_at: int | None, settings: dict) -> None:
    torch.set_num_threads(1)
    config = TrainerConfig(
        output_dir=folder,
        batch_size=8,
        micro_batch_size=4,
        max_steps=STEPS,
        learning_rate=1e-3,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        save_steps=3,
        logging_steps=1,
        log_data_digest=True,
        **settings,
    )
    cache = os.path.join(folder, "..", "tokens")
    dataset = TokenDataset.from_files(builtin_text(), block_size=32, cache=cache)
    callbacks = [Kill(kill_at)]
    layers = 1 if "torch_compile" in settings else 2  # less to compile at the first time
    model = gpt2_or_its_maker(folder, layers)
    Trainer(model, config, dataset, callbacks=callbacks, display=NoDisplay()).train()


SETTINGS = {
    "fp32": {},
    "bf16": {"bf16": True},
    "checkpointed activations": {"gradient_checkpointing": True},
    "adafactor, workers": {"optim": "adafactor", "dataloader_num_workers": 2},
}


def gpt2_or_its_maker(folder: str, layers: int) -> GPT2LMHeadModel | Callable[[], GPT2LMHeadModel]:
    """Return the model where the run is uninterrupted, and what makes it where it is cut."""
    return gpt2(layers) if folder.endswith("whole") else partial(gpt2, layers)


def resumes_exactly(settings, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_fresh(finetune, str(whole), None, settings) == 0
    assert run_fresh(finetune, str(cut), 5, settings) == -signal.SIGKILL
    assert run_fresh(finetune, str(cut), None, settings) == 0
    assert outcome(cut, STEPS) == outcome(whole, STEPS)


@pytest.mark.parametrize("name", SETTINGS)
def test_gpt2_killed_in_mid_epoch_ends_with_the_same_bits(name, tmp_path):
    resumes_exactly(SETTINGS[name], tmp_path)


@pytest.mark.slow
def test_a_compiled_gpt2_killed_in_mid_epoch_ends_with_the_same_bits(tmp_path):
    resumes_exactly({"torch_compile": True}, tmp_path)


def test_from_pretrained_reads_a_checkpoint_with_equal_bytes(tmp_path):
    assert run_fresh(finetune, str(tmp_path / "run"), None, {}) == 0
    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    loaded = GPT2LMHeadModel.from_pretrained(checkpoint)
    trained = gpt2()
    trainer = Trainer(trained, TrainerConfig(output_dir=str(tmp_path / "run")), display=NoDisplay())
    trainer.checkpointer.load(STEPS, ["model"])
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    for name, value in trained.state_dict().items():
        assert torch.equal(value.view(torch.uint8), loaded.state_dict()[name].view(torch.uint8))
