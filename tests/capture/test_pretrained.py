"""A checkpoint of a Hugging Face model is a folder that `from_pretrained` loads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from capture.round_trip import stored
from capture.tree_equality import account
from unbroken.capture import capture, files_for, pretrained_files
from unbroken.errors import CaptureError
from unbroken.storage import LocalStorage

transformers = pytest.importorskip("transformers")


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).to(dtype)


def checkpoint(model, folder):
    """Write a checkpoint with the files of the model, as a run does."""
    objects = {"model": model}
    reader = stored(capture(objects), files_for(objects), LocalStorage(folder))
    path = folder / reader.folder
    for name, data in pretrained_files(model).items():
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_from_pretrained_loads_a_checkpoint_with_equal_bytes(tmp_path, dtype):
    model = gpt2(dtype)
    again = transformers.GPT2LMHeadModel.from_pretrained(checkpoint(model, tmp_path))
    assert account(list(again.state_dict().values())) == account(list(model.state_dict().values()))
    assert again.lm_head.weight is again.transformer.wte.weight


def test_the_files_are_those_of_save_pretrained(tmp_path):
    model = gpt2()
    files = pretrained_files(model)
    model.save_pretrained(tmp_path)
    assert files == {name: (tmp_path / name).read_bytes() for name in files}
    assert set(files) == {"config.json", "generation_config.json"}


def test_the_live_configuration_is_not_changed():
    model = gpt2()
    before = model.config.to_json_string(use_diff=False)
    pretrained_files(model)
    assert model.config.to_json_string(use_diff=False) == before


def test_a_wrapped_model_is_looked_through():
    model = gpt2()
    assert pretrained_files(torch.nn.DataParallel(model)) == pretrained_files(model)


@pytest.mark.parametrize("value", [None, torch.nn.Linear(1, 1)], ids=repr)
def test_other_models_need_no_files(value):
    assert pretrained_files(value) == {}


def test_capture_does_not_import_transformers():
    code = "import sys, unbroken.capture; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Odd(torch.nn.Linear):
    @property
    def config(self):
        raise ValueError("not yet")


def test_a_property_called_config_that_raises_is_no_hugging_face_model():
    assert pretrained_files(Odd(1, 1)) == {}


def test_a_configuration_that_cannot_be_written_is_told_by_name():
    model = gpt2()
    model.config.extra = object()
    with pytest.raises(CaptureError, match=r"model\.config: cannot be written .*TypeError"):
        pretrained_files(model)
