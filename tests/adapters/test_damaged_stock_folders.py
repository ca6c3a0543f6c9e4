"""What a stranger, or a failing disk, can do to a checkpoint of transformers' own Trainer.

Whatever it is, it is damage with the file's name in the reason: nothing is allocated that the files
do not hold, nothing outside the folder is read, nothing blocks, and the objects are as they were.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from unbroken.adapters.transformers.hf_checkpoint import (
    facts_of_hf_checkpoint,
    load_hf_checkpoint,
    problem_of_hf_checkpoint,
    refuse_what_does_not_fit,
)
from unbroken.errors import StateMismatchError, UnbrokenError

GIB = 1 << 30


def objects(width=3):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(width, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder as transformers writes it; nobody changes it."""
    folder, held = tmp_path_factory.mktemp("made") / "checkpoint-8", objects()
    folder.mkdir()
    for _ in range(2):
        held["model"](torch.randn(5, 3)).sum().backward()
        held["optimizer"].step()
        held["scheduler"].step()
    save_file(held["model"].state_dict(), folder / "model.safetensors")
    torch.save(held["optimizer"].state_dict(), folder / "optimizer.pt")
    torch.save(held["scheduler"].state_dict(), folder / "scheduler.pt")
    numpy, cpu = np.random.get_state(), torch.get_rng_state()
    rng = {"python": random.getstate(), "numpy": numpy, "cpu": cpu}
    torch.save(rng, folder / "rng_state.pth")
    state = {"global_step": 8, "max_steps": 20, "epoch": 0.5, "train_batch_size": 4}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "checkpoint-8")


@pytest.fixture(autouse=True)
def little_memory():
    """Let an allocation of gigabytes fail, as it does on a machine that has less."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + GIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def bits(held):
    return [tensor.clone() for tensor in held["model"].state_dict().values()]


def test_a_whole_one_has_no_problem_and_is_loaded(folder):
    held = objects()
    assert problem_of_hf_checkpoint(folder) is None
    refuse_what_does_not_fit(folder, held)
    load_hf_checkpoint(folder, held)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[n], value) for n, value in held["model"].state_dict().items())
    assert held["optimizer"].state_dict()["state"][0]["step"] == 2
    assert facts_of_hf_checkpoint(folder)["max_steps"] == 20


NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_anywhere_is_damage_or_changes_nothing_that_is_read(name, made, tmp_path):
    draw = random.Random(name)
    folder = shutil.copytree(made, tmp_path / "checkpoint-8")
    data = (made / name).read_bytes()
    places = {*range(min(len(data), 24)), *(draw.randrange(len(data)) for _ in range(60))}
    for place in sorted(places):
        harmed = bytearray(data)
        harmed[place] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(harmed)
        problem = problem_of_hf_checkpoint(folder)
        assert problem is None or problem.startswith(name), problem
        if problem is None and name != "trainer_state.json":
            held = objects()
            try:
                refuse_what_does_not_fit(folder, held)
            except StateMismatchError:
                continue
            load_hf_checkpoint(folder, held)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_is_damage(name, folder):
    data = (folder / name).read_bytes()
    for length in (0, 1, 7, 8, 9, len(data) // 2, len(data) - 1):
        (folder / name).write_bytes(data[:length])
        assert problem_of_hf_checkpoint(folder).startswith(name)


def test_a_length_of_exabytes_in_a_header_allocates_nothing(folder):
    data = (folder / "model.safetensors").read_bytes()
    for length in (2**63, 2**62, 2**40, len(data)):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])
        assert problem_of_hf_checkpoint(folder) == "model.safetensors ends too early"


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Write an archive anew, each entry as `change` makes it of its name and bytes."""
    with zipfile.ZipFile(path) as old:
        entries = {one.filename: old.read(one) for one in old.infolist()}
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in entries.items():
            new.writestr(name, change(name, data))


def test_a_record_that_inflates_to_gigabytes_is_not_inflated(folder):
    whole = bytes(2 * GIB // 1000)  # enough to see that it is refused, and quick to make
    rewritten(
        folder / "optimizer.pt",
        lambda name, data: whole if name.endswith("data/1") else data,
        zipfile.ZIP_DEFLATED,
    )
    assert (
        problem_of_hf_checkpoint(folder) == "optimizer.pt is compressed, as torch.save never does"
    )


def test_a_pickle_that_asks_for_four_gigabytes_does_not_get_them(folder):
    asks = b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        shutil.copy(folder / name, folder / "kept")
        rewritten(folder / name, lambda entry, data: asks if entry.endswith("data.pkl") else data)
        assert problem_of_hf_checkpoint(folder).startswith(f"{name} asks for memory of any size")
        (folder / "kept").rename(folder / name)


def test_a_pickle_that_names_code_runs_none(folder):
    runs = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."
    rewritten(
        folder / "optimizer.pt", lambda name, data: runs if name.endswith("data.pkl") else data
    )
    assert "reading it would run its code" in problem_of_hf_checkpoint(folder)


def test_a_tensor_without_strides_claims_no_terabytes(folder):
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    state["state"][0]["exp_avg"] = torch.zeros(1).expand(1 << 40)
    torch.save(state, folder / "optimizer.pt")
    assert problem_of_hf_checkpoint(folder) == "optimizer.pt has a tensor larger than itself"
    torch.save({**state, "more": torch.empty(1 << 40, device="meta")}, folder / "optimizer.pt")
    assert problem_of_hf_checkpoint(folder) == "optimizer.pt has a tensor larger than itself"


@pytest.mark.parametrize(
    "held", [[], {}, {"state": {}, "param_groups": [1]}, {"state": [], "param_groups": []}, None]
)
def test_an_optimizer_of_another_form_is_damage(held, folder):
    torch.save(held, folder / "optimizer.pt")
    assert problem_of_hf_checkpoint(folder).startswith("optimizer.pt is not of the form")


@pytest.mark.parametrize("key", ["python", "numpy", "cpu"])
def test_random_states_that_are_none_are_damage(key, folder):
    states = torch.load(folder / "rng_state.pth", weights_only=False)
    for value in (None, (), torch.zeros(3, dtype=torch.uint8)):
        torch.save({**states, key: value}, folder / "rng_state.pth")
        assert problem_of_hf_checkpoint(folder).startswith("rng_state.pth")
    del states[key]
    torch.save(states, folder / "rng_state.pth")
    assert problem_of_hf_checkpoint(folder).startswith("rng_state.pth is damaged")


@pytest.mark.parametrize("text", ["[]", "1", "{}", '{"global_step": "8"}', "[" * 100_000, "\xff"])
def test_a_state_of_another_form_is_damage(text, folder):
    (folder / "trainer_state.json").write_text(text, encoding="latin-1")
    assert problem_of_hf_checkpoint(folder).startswith("trainer_state.json")


def index(folder, weight_map):
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_an_index_of_files_in_the_folder_is_read(folder):
    index(folder, {"0.weight": "part.safetensors", "0.bias": "part.safetensors"})
    assert problem_of_hf_checkpoint(folder) is None
    refuse_what_does_not_fit(folder, objects())


@pytest.mark.parametrize("way", ["above", "absolute", "link", "number", "list", "none", "folder"])
def test_an_index_leads_nowhere_else(way, folder, made, tmp_path):
    outside = shutil.copy(made / "model.safetensors", tmp_path / "outside.safetensors")
    names = {
        "above": "../outside.safetensors",
        "absolute": str(outside),
        "link": "link.safetensors",
    }
    (folder / "link.safetensors").symlink_to(outside)
    kinds = {"number": 3, "list": ["part.safetensors"], "folder": "."}
    index(folder, {} if way == "none" else {"0.weight": {**names, **kinds}[way]})
    assert problem_of_hf_checkpoint(folder).startswith("model.safetensors.index.json")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_read(kind, name, folder):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    assert problem_of_hf_checkpoint(folder).startswith(f"{name} is not a regular file")


@pytest.mark.parametrize("core", ["core", "_core"])
def test_random_states_of_either_numpy_are_read(core, folder):
    other = b"numpy.core.multiarray" if core == "core" else b"numpy._core.multiarray"

    def renamed(name, data):
        now = b"numpy._core.multiarray" if b"numpy._core" in data else b"numpy.core.multiarray"
        return data.replace(now, other) if name.endswith("data.pkl") else data

    rewritten(folder / "rng_state.pth", renamed)
    assert problem_of_hf_checkpoint(folder) is None
    load_hf_checkpoint(folder, objects())


# What does not fit is refused before anything is changed


def other_shape(folder):
    return objects(width=5)


def other_optimizer(folder):
    held = objects()
    held["optimizer"].add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    return held


def grouped_otherwise(folder):
    held = objects()
    parameters = [*held["model"].parameters()]
    held["optimizer"] = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:]}])
    return held


def weights_missing(folder):
    stored = load_file(folder / "model.safetensors")
    del stored["0.bias"]
    save_file(stored, folder / "model.safetensors")
    return objects()


def weights_unknown(folder):
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "head": torch.zeros(1)}, folder / "model.safetensors")
    return objects()


@pytest.mark.parametrize(
    "harm", [other_shape, other_optimizer, grouped_otherwise, weights_missing, weights_unknown]
)
def test_what_does_not_fit_is_refused_and_changes_nothing(harm, folder):
    held = harm(folder)
    before = bits(held)
    assert problem_of_hf_checkpoint(folder) is None
    with pytest.raises(StateMismatchError):
        refuse_what_does_not_fit(folder, held)
    assert all(map(torch.equal, bits(held), before))


JUNK = [None, -1, 2**40, 1.5, "x", [], {}, [None], torch.zeros(0), torch.zeros(2, 2), b"x"]


def with_junk(content, draw):
    """Put something else in one place of a content, or take it out."""
    places = list(places_in(content))
    holder, key = draw.choice(places)
    if draw.random() < 0.3 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw.choice(JUNK)
    return content


def places_in(value):
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places_in(value[key])


@pytest.mark.parametrize("name", NAMES[1:])
def test_odd_content_in_a_whole_archive_is_an_error_of_ours_or_harmless(name, made, tmp_path):
    draw = random.Random(name)
    folder = shutil.copytree(made, tmp_path / "checkpoint-8")
    for _ in range(15):
        if name.endswith(".json"):
            content = with_junk(json.loads((made / name).read_text()), draw)
            (folder / name).write_text(json.dumps(content, default=str))
        else:
            content = torch.load(made / name, weights_only=False)
            torch.save(with_junk(content, draw), folder / name)
        if problem_of_hf_checkpoint(folder) is None:
            held = objects()
            try:
                refuse_what_does_not_fit(folder, held)
                load_hf_checkpoint(folder, held)
                facts_of_hf_checkpoint(folder)
            except UnbrokenError:
                continue
