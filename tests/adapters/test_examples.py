"""The examples resume exactly, as `unbroken check` finds; an adapter's base is stored once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from check.recorded_scripts import ScriptServer
from check.trials import Trials
from unbroken.check import Status

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = ("--max_steps", "12", "--save_steps", "3")  # the kill may come beside the second save


@pytest.fixture(scope="module")
def server():
    server = ScriptServer("unbroken.adapters.transformers", "peft", path=(EXAMPLES,))
    yield server
    server.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2_finetune", "masked_lm", "lora"])
def test_the_check_finds_that_an_example_resumes_exactly(name, server, tmp_path):
    trials = Trials(tmp_path, str(EXAMPLES / f"{name}.py"), kill_after=8, server=server)
    assert trials.verdict(broken=SHORT).status is Status.EXACT


@pytest.fixture(scope="module")
def adapters(server, tmp_path_factory):
    """A run of lora.py that was killed, and went on."""
    root = tmp_path_factory.mktemp("lora")
    command = [str(EXAMPLES / "lora.py"), "--output_dir", "run"]
    for steps in ("6", "12"):
        words = [*command, "--max_steps", steps, "--save_steps", "3"]
        status, _ = server.run_script(words, root, None, root / "log")
        assert status == 0, (root / "log").read_text()
    return root / "run"


def bytes_written(folder):
    return sum(file.stat().st_size for file in folder.iterdir() if file.stat().st_nlink == 1)


@pytest.mark.slow
def test_checkpoints_of_adapters_write_the_frozen_base_once(adapters):
    first = sum(file.stat().st_size for file in (adapters / "checkpoint-3").iterdir())
    for step in (6, 9, 12):  # the third in another process
        assert bytes_written(adapters / f"checkpoint-{step}") < first / 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # of peft 0.21
def test_peft_reads_the_adapter_of_a_checkpoint(adapters):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"vocab_size": 1024, "n_positions": 64, "n_layer": 4, "n_head": 8, "n_embd": 256}
    base = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0))
    model = PeftModel.from_pretrained(base, adapters / "checkpoint-12")
    stored = load_file(adapters / "checkpoint-12/adapter_model.safetensors")
    name = "base_model.model.transformer.h.0.attn.c_attn.lora_B"
    live = dict(model.named_parameters())[f"{name}.default.weight"]
    assert live.view(torch.uint8).equal(stored[f"{name}.weight"].view(torch.uint8))
    assert bool(live.any())
