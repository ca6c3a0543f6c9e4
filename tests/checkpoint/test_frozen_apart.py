"""Weights that are not trained are written once, and linked in each later checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from unbroken import Checkpointer
from unbroken.checkpoint.save.session import FROZEN, INDEX, TRAINED

transformers = pytest.importorskip("transformers")


def gpt2(frozen: bool = True):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=64, n_head=2, vocab_size=5000, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    if frozen:
        model.transformer.wte.requires_grad_(False)  # the head is tied to it
    return model


def run(folder, model):
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    return Checkpointer(folder, model=model, optimizer=optimizer), optimizer


def saved_twice(folder, model, between=lambda: None):
    """Save, train a step, save again; return what `os.stat` says of the frozen file in both."""
    checkpointer, optimizer = run(folder, model)
    checkpointer.resume()
    checkpointer.save(1)
    ids = torch.arange(8).view(1, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    between()
    checkpointer.save(2)
    checkpointer.close()
    return [(folder / f"checkpoint-{step}" / FROZEN).stat() for step in (1, 2)]


def bits(model):
    return {name: one.detach().numpy().tobytes() for name, one in model.named_parameters()}


def test_the_second_checkpoint_links_what_is_frozen(tmp_path):
    first, second = saved_twice(tmp_path, gpt2())
    assert first.st_ino == second.st_ino
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_frozen_weights_that_were_edited_are_written_anew(tmp_path):
    model = gpt2()
    weight = model.transformer.wte.weight
    first, second = saved_twice(tmp_path, model, lambda: weight.data[0].add_(1.0))
    assert first.st_ino != second.st_ino
    fresh = gpt2()
    run(tmp_path, fresh)[0].resume()
    assert bits(fresh) == bits(model)


def test_from_pretrained_reads_both_files_with_equal_bytes(tmp_path):
    model = gpt2()
    saved_twice(tmp_path, model)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-2")
    assert bits(loaded) == bits(model)


def test_the_index_names_just_the_tensors_that_the_files_hold(tmp_path):
    saved_twice(tmp_path, gpt2())
    folder = tmp_path / "checkpoint-2"
    found = {}
    for file in (FROZEN, TRAINED):
        with safe_open(folder / file, framework="pt") as tensors:
            found.update(dict.fromkeys(tensors.keys(), file))
    assert json.loads((folder / INDEX).read_text())["weight_map"] == found


def test_a_checkpoint_goes_on_when_what_was_frozen_is_trained_from_now_on(tmp_path):
    model = gpt2()
    saved_twice(tmp_path, model)
    later = gpt2(frozen=False)
    with Checkpointer(tmp_path, model=later) as checkpointer:
        checkpointer.load(2, ["model"])
        assert bits(later) == bits(model)


@pytest.mark.parametrize(
    "model",
    [gpt2(frozen=False), nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))],
    ids=["nothing is frozen", "little is frozen"],
)
def test_the_model_stays_one_file_where_it_is_not_worth_two(tmp_path, model):
    checkpointer, _ = run(tmp_path, model)
    checkpointer.save(1)
    checkpointer.close()
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()
    assert not (tmp_path / "checkpoint-1" / INDEX).exists()
