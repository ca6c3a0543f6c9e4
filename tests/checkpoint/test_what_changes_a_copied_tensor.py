"""Saves in the mode `"overlap"`, and all that may touch their tensors while they are copied."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import threading
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks

from unbroken.capture import capture, encode
from unbroken.checkpoint import Checkpointer, SavePolicy
from unbroken.checkpoint.save import staging
from unbroken.errors import SaveError
from unbroken.recorder.step_hooks import StepHooks
from unbroken.store import CheckpointReader


class Slowly:
    """Copies of other threads wait until they are let go, or for a moment."""

    def __init__(self, monkeypatch) -> None:
        self.go, self.seconds, real = threading.Event(), 0.002, ctypes.memmove

        def copy(*where) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.go.wait(self.seconds)
            real(*where)

        monkeypatch.setattr(staging.ctypes, "memmove", copy)

    def then(self, change) -> None:
        """Change something, and let the copies go."""
        change()
        self.go.set()


@pytest.fixture(autouse=True)
def slowly(monkeypatch):
    return Slowly(monkeypatch)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))


def digests_of(objects) -> dict[str, str]:
    leaves = encode(capture(objects)).leaves
    return {leaf.path: digest(b"".join(map(bytes, leaf.chunks()))) for leaf in leaves}


def stored(checkpointer, step) -> dict[str, str]:
    reader, found = CheckpointReader(checkpointer.run.storage, f"checkpoint-{step}"), {}
    for path, entry in reader.manifest.tensors.items():
        if not path.startswith(("rng.", "unfinished_gradients.")):
            data = bytearray(entry.nbytes)
            reader.read_leaf_into(path, memoryview(data))
            found[path] = digest(data)
    return found


def digest(data) -> str:
    return hashlib.sha256(data).hexdigest()


def backward(model) -> None:
    model(torch.ones(2, 64)).square().mean().backward()


def save_and(change, where, **objects) -> bool:
    """Save, then change something; return whether the checkpoint was made, with the right bytes."""
    with Checkpointer(where, save=SavePolicy(mode="overlap"), **objects) as checkpointer:
        checkpointer.save(1)
        wanted = digests_of(objects)
        change()
        try:
            checkpointer.wait()
        except SaveError:  # no word of success, and no checkpoint
            assert checkpointer.run.catalog.folders() == []
            return False
        assert stored(checkpointer, 1) == wanted
        return True


def test_a_fused_step_of_an_optimizer_that_is_not_saved_waits_for_the_copy(model, tmp_path):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)  # moves no version
    backward(model)
    assert save_and(optimizer.step, tmp_path, model=model)


def test_without_waiting_such_a_step_would_tear_the_copy(model, slowly, tmp_path, monkeypatch):
    before_step = "unbroken.checkpoint.save.async_saver.AsyncSaver._before_step"
    monkeypatch.setattr(before_step, lambda *_: None)
    monkeypatch.setattr(staging.SourceDigests, "differing", lambda *_: [])
    slowly.seconds = None  # until it is let go
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    optimizer.register_step_post_hook(lambda *_: slowly.go.set())
    backward(model)
    with pytest.raises(AssertionError):
        save_and(optimizer.step, tmp_path, model=model)


def test_an_optimizer_in_a_wrapper_may_be_saved(model, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    wrapped = accelerate.Accelerator(cpu=True).prepare(inner)
    backward(model)
    wrapped.step()
    assert save_and(wrapped.step, tmp_path, model=model, optimizer=wrapped)


def test_other_hooks_of_the_optimizer_run_as_without_a_save(model, tmp_path):
    optimizer, calls = torch.optim.AdamW(model.parameters()), []
    with Checkpointer(
        tmp_path, save=SavePolicy(mode="overlap"), model=model, optimizer=optimizer
    ) as saving:
        saving.save(1)
        optimizer.register_step_pre_hook(lambda *_: calls.append("own"))
        optimizer.step()
        optimizer.step()
    assert calls == ["own", "own"]


def test_hooks_of_a_closed_checkpointer_are_gone_when_the_next_ones_come(model, tmp_path):
    StepHooks()
    before = dict(hooks)
    save_and(lambda: None, tmp_path, model=model)
    StepHooks()
    assert dict(hooks) == before


@pytest.mark.parametrize("edited", [0, 1])
def test_an_edit_over_either_name_of_one_memory_is_found(edited, model, tmp_path):
    model[1].weight = nn.Parameter(model[0].weight.data)  # the same memory, another version
    with torch.no_grad():
        assert not save_and(lambda: model[edited].weight.mul_(2), tmp_path, model=model)


def test_an_edit_of_the_flat_buffer_under_the_parameters_harms_no_checkpoint(model, tmp_path):
    flat = torch.cat([one.data.flatten() for one in model.parameters()])
    parts = flat.split([one.numel() for one in model.parameters()])
    for one, part in zip(model.parameters(), parts, strict=True):
        one.data = part.view_as(one)
    assert save_and(lambda: flat.mul_(2), tmp_path, model=model)


@pytest.mark.parametrize("act", ["step", "close", "end"])
def test_a_forked_process_does_not_wait_for_the_save_of_its_parent(act, model, slowly, tmp_path):
    slowly.seconds = None  # until it is let go
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(
        tmp_path, save=SavePolicy(mode="overlap"), model=model, optimizer=optimizer
    ) as saving:
        acts = {"step": optimizer.step, "close": saving.close, "end": saving._saver._at_exit}
        saving.save(1)
        if not (child := os.fork()):
            acts[act]()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        slowly.go.set()
    assert CheckpointReader(saving.run.storage, "checkpoint-1").verify() == []


def test_forked_processes_do_not_get_the_copy(model, tmp_path):
    with Checkpointer(tmp_path, save=SavePolicy(mode="overlap"), model=model) as saving:
        saving.save(1)
        address = saving._saver._buffer._memory.data_ptr()
        if not (child := os.fork()):
            os._exit(is_mapped(address))
        assert is_mapped(address)
        assert os.waitpid(child, 0)[1] == 0


def is_mapped(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps]
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


WAITS = {"wait": Checkpointer.wait, "close": Checkpointer.close, "save": lambda one: one.save(2)}


@pytest.mark.parametrize("wait", WAITS)
def test_a_save_survives_an_interrupt_of_those_who_wait_for_it(wait, model, slowly, tmp_path):
    slowly.seconds = None
    saving = Checkpointer(tmp_path, save=SavePolicy(mode="overlap"), model=model)
    with pytest.raises(KeyboardInterrupt):
        save_and_be_interrupted(saving, WAITS[wait], slowly)
    assert CheckpointReader(saving.run.storage, "checkpoint-1").verify() == []


def save_and_be_interrupted(saving, wait, slowly) -> None:
    def interrupt() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        slowly.go.set()

    with saving:
        saving.save(1)
        threading.Timer(0.2, interrupt).start()
        wait(saving)


def flat_from_outside(model) -> None:
    weight = model[2].weight.detach()
    ctypes.memset(weight.data_ptr(), 0, weight.nbytes)


def clip(model) -> None:
    for one in model.parameters():
        one.data.clamp_(-0.02, 0.02)


UNSEEN = {
    "weights that are clipped": clip,
    "one element": lambda model: model[3].weight.data[5, 7].add_(1),
    "a step by hand": lambda model: [one.data.sub_(one.grad) for one in model.parameters()],
    "bytes from outside": flat_from_outside,
    "an alias": lambda model: model[2].weight.detach().numpy().fill(0.5),
    "an average that is given to all": lambda model: model[1].weight.data.copy_(model[2].weight),
}


@pytest.mark.parametrize("change", UNSEEN)
def test_an_edit_that_moves_no_version_makes_no_torn_checkpoint(change, model, slowly, tmp_path):
    backward(model)
    slowly.seconds = None
    before = [one._version for one in model.parameters()]
    edit = partial(slowly.then, partial(UNSEEN[change], model))
    assert not save_and(edit, tmp_path, model=model)
    assert [one._version for one in model.parameters()] == before


@pytest.fixture
def wide():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))


def test_weights_that_are_clipped_after_each_step_are_saved_as_they_were(wide, slowly, tmp_path):
    """As in WGAN: the first save is given up, and after that what is clipped is copied at once."""
    optimizer = torch.optim.RMSprop(wide.parameters(), lr=5e-5)
    objects, held = {"model": wide, "optimizer": optimizer}, []
    with Checkpointer(
        tmp_path, save=SavePolicy(steps=2, mode="overlap"), **objects
    ) as checkpointer:
        for step in range(1, 9):
            wide(torch.ones(2, 512)).square().mean().backward()
            optimizer.step()
            if checkpointer.should_save(step):
                checkpointer.save(step)
                held.append((step, digests_of(objects)))
            clip(wide)
        with suppress(SaveError):  # a tensor that was copied before it was clipped until now
            checkpointer.wait()
        found = dict(held)
        made = [step for step, _ in checkpointer.run.catalog.folders()]
        assert len(made) >= 2
        assert all(stored(checkpointer, step) == found[step] for step in made)


def test_between_saves_that_look_at_all_bytes_a_sample_shows_an_edit(
    wide, slowly, tmp_path, monkeypatch
):
    monkeypatch.setattr(staging, "_FEW", 1)  # as if they were many
    with Checkpointer(tmp_path, save=SavePolicy(mode="overlap"), model=wide) as checkpointer:
        checkpointer.save(1)
        checkpointer.wait()
        slowly.seconds = None  # until it is let go
        checkpointer.save(2)
        slowly.then(lambda: clip(wide))
        with pytest.raises(SaveError, match=r"were changed while they were being copied"):
            checkpointer.wait()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_element_edited_from_the_second_save_on_is_found_within_few(
    layer, wide, slowly, tmp_path
):
    """In turn each tensor is looked at as a whole; see the negative control below."""
    assert steps_made_under_edits(wide, layer, slowly, tmp_path) < TURNS


def test_a_sample_alone_would_not_find_one_element(wide, slowly, tmp_path, monkeypatch):
    real = staging._in_turn
    monkeypatch.setattr(
        staging, "_in_turn", lambda leaves, number: [] if number else real(leaves, 0)
    )
    assert steps_made_under_edits(wide, 1, slowly, tmp_path) == TURNS


TURNS = 4


def steps_made_under_edits(wide, layer: int, slowly, where) -> int:
    """Edit one element under each save but the first; return how many are made."""
    nbytes = sum(one.nbytes for one in wide.parameters())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_FEW", -(-nbytes // TURNS))  # as if they were many
        with Checkpointer(where, save=SavePolicy(mode="overlap"), model=wide) as checkpointer:
            checkpointer.save(0)
            checkpointer.wait()
            slowly.seconds = None  # until it is let go
            for step in range(1, TURNS + 1):
                slowly.go.clear()
                checkpointer.save(step)
                slowly.then(lambda: wide[layer].weight.data[300, 301].add_(1))
                try:
                    checkpointer.wait()
                except SaveError:
                    return step - 1
    return TURNS


def test_of_a_small_model_each_save_looks_at_all_bytes(wide, slowly, tmp_path):
    with Checkpointer(tmp_path, save=SavePolicy(mode="overlap"), model=wide) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step)
            checkpointer.wait()
        slowly.seconds = None
        checkpointer.save(3)
        slowly.then(lambda: wide[2].weight.data[300, 300].add_(1))
        with pytest.raises(SaveError, match=r"2\.weight"):
            checkpointer.wait()


def test_without_the_digests_such_a_checkpoint_would_be_torn(model, slowly, tmp_path, monkeypatch):
    """The negative control."""
    slowly.seconds = None
    monkeypatch.setattr(staging.SourceDigests, "differing", lambda *_: [])
    with pytest.raises(AssertionError):
        save_and(partial(slowly.then, partial(clip, model)), tmp_path, model=model)
