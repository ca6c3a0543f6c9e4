"""What may happen around a save beside the training: other optimizers, aliases, forks, Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from torch import nn

from unbroken.capture import capture, encode
from unbroken.checkpoint import Checkpointer, SavePolicy
from unbroken.checkpoint.save import staging
from unbroken.cli.main import main
from unbroken.errors import SaveError
from unbroken.store import CheckpointReader


class Slow:
    """Holds each copy beside the training back for a moment, or until it is let go."""

    def __init__(self, monkeypatch, seconds=0.01) -> None:
        self.go, self.began = threading.Event(), threading.Event()
        real = staging.ctypes.memmove

        def copy(*where) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.began.set()
                self.go.wait(seconds)
            real(*where)

        monkeypatch.setattr(staging.ctypes, "memmove", copy)


class Run:
    """A model whose saves are held against what it was."""

    def __init__(self, where, model=None, **objects) -> None:
        torch.manual_seed(5)
        self.model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) if model is None else model
        self.objects = {"model": self.model, **objects}
        self.checkpointer = Checkpointer(where, save=SavePolicy(mode="overlap"), **self.objects)

    def backward(self) -> None:
        self.model(torch.ones(4, 8)).square().sum().backward()

    def save(self, step=1) -> dict[str, bytes]:
        """Save, and return the bytes that the checkpoint has to hold."""
        self.checkpointer.save(step)
        leaves = encode(capture(self.objects)).leaves
        return {leaf.path: b"".join(map(bytes, leaf.chunks())) for leaf in leaves}

    def stored(self, step=1) -> dict[str, bytes]:
        reader, found = CheckpointReader(self.checkpointer.run.storage, f"checkpoint-{step}"), {}
        for path, entry in reader.manifest.tensors.items():
            found[path] = bytearray(entry.nbytes)
            reader.read_leaf_into(path, memoryview(found[path]))
        return {
            path: bytes(data)
            for path, data in found.items()
            if not path.startswith(("rng.", "unfinished_gradients."))
        }


class Wrapped:
    """An optimizer behind a class of the user's own."""

    def __init__(self, parameters) -> None:
        self.inner = torch.optim.AdamW(parameters, lr=0.1, fused=True)

    def step(self) -> None:
        self.inner.step()

    def state_dict(self):
        return {"rate": 0.1}

    def load_state_dict(self, state) -> None:
        self.inner.param_groups[0]["lr"] = state["rate"]


@pytest.mark.parametrize("is_saved", [True, False])
def test_the_step_of_an_optimizer_that_nobody_registered_waits_for_the_copy(
    is_saved, tmp_path, monkeypatch
):
    model = nn.Linear(8, 8)
    wrapped = Wrapped(model.parameters())  # fused: its steps count no version up
    run = Run(tmp_path, model, **({"wrapped": wrapped} if is_saved else {}))
    run.backward()
    Slow(monkeypatch)
    data = run.save()
    wrapped.step()
    run.checkpointer.wait()
    assert run.stored() == data
    assert run.save(2) != data
    run.checkpointer.close()


def test_an_optimizer_that_accelerate_prepared_waits_for_the_copy(tmp_path, monkeypatch):
    from accelerate import Accelerator  # imports transformers' own dependencies: seconds

    model = nn.Linear(8, 8)
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters(), fused=True))
    run = Run(tmp_path, model, optimizer=optimizer)
    run.backward()
    Slow(monkeypatch)
    data = run.save()
    optimizer.step()
    run.checkpointer.wait()
    assert run.stored() == data
    run.checkpointer.close()


@pytest.mark.parametrize("which", [0, 1])
def test_an_edit_through_either_of_two_parameters_over_one_memory_is_found(
    which, tmp_path, monkeypatch
):
    run = Run(tmp_path)
    run.model[1].weight = nn.Parameter(run.model[0].weight.data)  # has a version of its own
    held = Slow(monkeypatch, seconds=None)
    run.save()
    run.model[which].weight.detach().mul_(2)
    held.go.set()
    with pytest.raises(SaveError, match="changed while they were being copied"):
        run.checkpointer.close()


def test_parameters_that_lie_in_a_flat_buffer_may_be_edited_through_it(tmp_path, monkeypatch):
    run, start = Run(tmp_path), 0
    flat = torch.cat([one.data.flatten() for one in run.model.parameters()])
    for one in run.model.parameters():
        one.data, start = flat[start : start + one.numel()].view_as(one), start + one.numel()
    held = Slow(monkeypatch, seconds=None)
    data = run.save()
    flat.mul_(2)
    held.go.set()
    run.checkpointer.wait()
    assert run.stored() == data
    run.checkpointer.close()


def test_nothing_is_committed_before_the_thread_that_trains_has_looked(tmp_path):
    run = Run(tmp_path)
    run.save()
    thread = next(one for one in threading.enumerate() if one.name == "unbroken-save")
    thread.join(0.3)  # it has copied and written, and waits
    run.model[0].weight.detach().mul_(2)
    assert run.checkpointer.run.catalog.folders() == []
    with pytest.raises(SaveError, match=r"model\.0\.weight"):
        run.checkpointer.close()


def in_a_fork(action) -> int:
    """Do it in a forked process; return how that ended. One that hangs is killed."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    signal.alarm(20)
    try:
        action()
    finally:
        os._exit(0)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_save_that_it_has_not(tmp_path, monkeypatch):
    run, held = Run(tmp_path), Slow(monkeypatch, seconds=None)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    run.backward()
    data = run.save()
    assert held.began.wait(20)
    assert in_a_fork(optimizer.step) == 0
    assert in_a_fork(run.checkpointer.close) == 0
    held.go.set()
    run.checkpointer.wait()
    assert run.stored() == data
    run.checkpointer.close()


def interrupt_soon(held) -> None:
    """Press Ctrl-C, and let the copy go on then."""

    def press() -> None:
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        held.go.set()

    threading.Timer(0.1, press).start()


@pytest.mark.parametrize("waiting", ["wait", "close", "save"])
def test_a_save_that_ctrl_c_finds_waiting_is_still_finished(waiting, tmp_path, monkeypatch):
    run, held = Run(tmp_path), Slow(monkeypatch, seconds=None)
    data = run.save()
    interrupt_soon(held)
    with pytest.raises(KeyboardInterrupt), run.checkpointer:
        getattr(run.checkpointer, waiting)(*[2] * (waiting == "save"))
    with Checkpointer(tmp_path, model=run.model) as again:
        assert again.resume("must").step == 1
        run.checkpointer = again
        assert run.stored() == data


def test_a_save_that_was_given_up_is_told_with_the_tensors_that_changed(tmp_path, capsys):
    with (run := Run(tmp_path)).checkpointer:
        run.save(1)
        run.model[1].bias.detach().mul_(2)
        run.save(2)
    assert main(["show", str(tmp_path), "--history"]) == 0
    assert "gave up step 1: changed while copied: model.1.bias" in capsys.readouterr().out


def test_what_a_save_takes_of_the_processor_beside_the_training_is_counted(tmp_path):
    run = Run(tmp_path, nn.Linear(8, 1 << 17))
    run.save()
    run.checkpointer.wait()
    assert run.checkpointer.last_save_cost.computing > 0
    run.checkpointer.close()


def test_memory_is_the_same_for_each_save(tmp_path):
    run, memory = Run(tmp_path), []
    for step in range(3):
        run.save(step)
        run.checkpointer.wait()
        memory.append(run.checkpointer._saver._buffer._memory)
    assert memory[0] is memory[1] is memory[2]
    run.checkpointer.close()
