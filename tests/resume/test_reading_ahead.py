"""A checkpoint that is read while a function makes the model: the same run, without waiting."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fresh import run_fresh
from scenarios import outcome
from small_trainers import bits, small_trainer
from unbroken.errors import CheckpointError, DifferenceError, LockHeldError, StateMismatchError
from unbroken.storage import LocalStorage
from unbroken.training import Callback

MIB = 1 << 20
PARTS, PART = 8, 32 * MIB


def net(width: int = 8) -> nn.Module:
    """Make a small model; its tied layers have one weight."""
    torch.manual_seed(5)
    first, tied = nn.Linear(6, width), nn.Linear(width, width)
    tied.weight = (again := nn.Linear(width, width)).weight
    return nn.Sequential(first, tied, again, nn.Dropout(0.2), nn.Linear(width, 4))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


class Counted:
    """An open file that tells how many bytes were read of it."""

    def __init__(self, handle, tell) -> None:
        self._handle, self._tell = handle, tell
        self.nbytes, self.close = handle.nbytes, handle.close

    def read_into(self, offset, buffer, /) -> None:
        self._tell(buffer.nbytes)
        self._handle.read_into(offset, buffer)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class CountingStorage(LocalStorage):
    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.read: Counter[str] = Counter()

    def open(self, path):
        return Counted(super().open(path), lambda nbytes: self.read.update({path: nbytes}))


def made(width: int = 8) -> nn.Module:
    """Make the small model, after all was read that is read ahead."""
    for thread in readers():
        thread.join()
    return net(width)


class Maker:
    """Makes a model in this way, and remembers how much was read before."""

    def __init__(self, storage: CountingStorage) -> None:
        self.storage = storage

    def __call__(self) -> nn.Module:
        model = made()
        read = self.storage.read.items()
        self.read = sum(nbytes for path, nbytes in read if path.endswith(".safetensors"))
        return model


class Kill(Callback):
    def on_micro_batch_end(self, trainer) -> None:
        if trainer.progress.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: str, harm: str | None = None, *, kill: bool = False) -> None:
    """Train in this process; `harm` is a tensor of which one bit is turned while it is ahead."""
    torch.set_num_threads(1)
    callbacks = {"callbacks": [Kill()] if kill else []}
    trainer = small_trainer(folder, model=made, trainer=callbacks)
    trainer.checkpointer.objects["callbacks"] = {}
    if harm is not None:
        assert trainer._parts.construction.ahead.wait()
        trainer._parts.construction.ahead._rooms[harm][5] ^= 1
    trainer.train()


def train_until_killed(folder: str) -> None:
    train(folder, kill=True)


@pytest.fixture
def run(tmp_path):
    """Return the folder of a finished run of six steps, saved after each second one."""
    small_trainer(tmp_path, model=net()).train()
    return tmp_path


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Return the folder of a run that was killed in its sixth step, and what it would have left."""
    folder = tmp_path_factory.mktemp("runs")
    assert run_fresh(train, str(folder / "whole")) == 0
    return folder, outcome(folder / "whole", 6)


def resumed(killed, name: str, harm: str | None = None) -> bool:
    """Kill a run, let it go on in a fresh process; return whether nobody could tell."""
    folder, whole = killed
    assert run_fresh(train_until_killed, str(folder / name)) == -signal.SIGKILL
    assert run_fresh(train, str(folder / name), harm) == 0
    return outcome(folder / name, 6) == whole


def test_a_killed_run_goes_on_exactly(killed):
    assert resumed(killed, "good")


@pytest.mark.parametrize("leaf", ["model.4.weight", "optimizer.state.0.weight.exp_avg"])
def test_one_turned_bit_of_what_was_read_ahead_would_show(killed, leaf):
    assert not resumed(killed, leaf, harm=leaf)


def test_all_is_read_before_the_model_is_made(run):
    storage = CountingStorage(run)
    make = Maker(storage)
    trainer = small_trainer(run, model=make, trainer={"storage": storage})
    nbytes = sum(room.nbytes for room in trainer._parts.construction.ahead._rooms.values())
    assert make.read == nbytes > 0


def test_no_byte_of_a_tensor_is_read_twice(run):
    storage = CountingStorage(run)
    trainer = small_trainer(run, model=made, trainer={"storage": storage})
    trainer.load_checkpoint()
    for name in ("model", "optimizer"):
        path = f"checkpoint-6/{name}.safetensors"
        assert storage.read[path] == (run / path).stat().st_size


@pytest.mark.parametrize("compressed", [False, True])
def test_what_was_read_ahead_is_what_the_objects_get(tmp_path, compressed):
    settings = {"save_compressed": compressed}
    small_trainer(tmp_path, model=net(), **settings).train()
    trainer = small_trainer(tmp_path, model=made, **settings)
    assert trainer._parts.construction.ahead.wait()
    rooms = {room.data_ptr() for room in trainer._parts.construction.ahead._rooms.values()}
    trainer.load_checkpoint()
    assert {parameter.data_ptr() for parameter in trainer.model.parameters()} < rooms
    assert bits(trainer.model) == bits(resumed_model(tmp_path, trainer))


def test_every_byte_of_the_checkpoint_is_still_verified(run):
    file = run / "checkpoint-6" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[10] ^= 1  # in the header, which no tensor is
    file.write_bytes(data)
    assert small_trainer(run, model=made).load_checkpoint().step == 4


def went_on(folder, model):
    """Let a run go on; return what the report says of it, and the model."""
    trainer = small_trainer(folder, model=model)
    report = trainer.load_checkpoint()
    trainer.checkpointer.close()
    return report.step, report.rejected, bits(trainer.model)


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_a_damaged_newest_checkpoint_is_named_and_walked_past(run, tmp_path_factory, name):
    file = run / "checkpoint-6" / f"{name}.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    copy = shutil.copytree(run, tmp_path_factory.mktemp("copy") / "run")
    expected = went_on(copy, net())
    assert went_on(run, made) == expected
    assert (expected[0], len(expected[1])) == (4, 1)


def refusal(folder, model, error, **settings):
    """Return what a resume is refused with, and the model after it."""
    trainer = small_trainer(folder, model=model, **settings)
    with pytest.raises(error) as caught:
        trainer.load_checkpoint()
    trainer.checkpointer.close()
    return str(caught.value), caught.value.__notes__, bits(trainer.model)


def test_a_refused_difference_is_told_as_always_and_nothing_is_loaded(run):
    expected = refusal(run, net(), DifferenceError, learning_rate=0.5)
    assert refusal(run, made, DifferenceError, learning_rate=0.5) == expected
    assert expected[2] == bits(net())


def test_a_model_of_another_structure_is_refused_as_always(run):
    expected = refusal(run, net(9), StateMismatchError)
    assert refusal(run, partial(made, 9), StateMismatchError) == expected


def test_a_lock_that_another_holds_is_respected(run):
    trainer = small_trainer(run, model=net())
    trainer.load_checkpoint()
    with pytest.raises(LockHeldError):
        small_trainer(run, model=made).load_checkpoint()


def test_what_is_not_resumed_after_all_is_dropped(run):
    trainer = small_trainer(run, model=made)
    trainer.load_checkpoint(2)
    assert not trainer._parts.construction.ahead._rooms
    assert not readers()
    assert bits(trainer.model) == bits(resumed_model(run, trainer, 2))


def test_a_file_that_changed_meanwhile_is_read_again(run):
    trainer = small_trainer(run, model=made)
    assert trainer._parts.construction.ahead.wait()
    file = run / "checkpoint-6" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    assert trainer.load_checkpoint().step == 4


def test_who_looked_at_a_tensor_before_sees_what_is_resumed(run):
    trainer = small_trainer(run, model=made)
    looking = trainer.model[0].weight.detach()
    trainer.load_checkpoint()
    assert looking.data_ptr() == trainer.model[0].weight.data_ptr()
    assert bits(trainer.model) == bits(resumed_model(run, trainer))


def resumed_model(folder, trainer, which="latest") -> nn.Module:
    """Return the model of a trainer as it is resumed without anything that was read ahead."""
    trainer.checkpointer.close()
    usual = small_trainer(folder, model=net())
    usual.load_checkpoint(which)
    return usual.model


def test_tensors_are_ordinary_ones_with_memory_of_their_own(run):
    trainer = small_trainer(run, model=made)
    trainer.load_checkpoint()
    state = [value for one in trainer.optimizer.state.values() for value in one.values()]
    for tensor in (*trainer.model.parameters(), *state):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0
    assert trainer.model[1].weight is trainer.model[2].weight


def child_that_reads(memory) -> int:
    """Return the exit code of a forked child that reads an array."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        memory.sum()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give children all memory")
def test_children_have_the_memory_that_a_tensor_has_got_and_no_other(tmp_path):
    small_trainer(tmp_path, model=partial(net, 800)).train()
    trainer = small_trainer(tmp_path, model=partial(made, 800))
    assert trainer._parts.construction.ahead.wait()
    room = trainer._parts.construction.ahead._rooms["model.1.weight"].numpy()
    assert child_that_reads(room) == -signal.SIGSEGV
    trainer.load_checkpoint()
    assert child_that_reads(room) == 0
    assert child_that_reads(trainer.model[1].weight.detach().numpy()) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems give children all memory")
def test_children_have_the_memory_that_was_not_taken(tmp_path):
    small_trainer(tmp_path, model=partial(net, 800)).train()
    trainer = small_trainer(tmp_path, model=partial(made, 800))
    assert trainer._parts.construction.ahead.wait()
    room = trainer._parts.construction.ahead._rooms["model.1.weight"].numpy()
    trainer.load_checkpoint(2)
    assert child_that_reads(room) == 0


def test_a_model_that_is_evaluated_first_has_its_first_weights_and_resumes_then(run):
    trainer = small_trainer(run, model=made)
    trainer._parts.construction.initialise()
    assert bits(trainer.model) == bits(net())
    trainer.load_checkpoint()
    assert bits(trainer.model) == bits(resumed_model(run, trainer))


def test_where_there_is_no_intact_checkpoint_it_is_the_usual_error(run):
    for file in run.glob("checkpoint-*/manifest.json"):
        file.write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="not one checkpoint is intact"):
        small_trainer(run, model=made).load_checkpoint()


class Large(nn.Module):
    """A quarter of a gigabyte, and with its momentum twice as much."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(nn.Parameter(torch.ones(PART // 4)) for _ in range(PARTS))

    def forward(self, x):
        return sum(part[:4].sum() for part in self.parts) + x[:, :4]


def large() -> nn.Module:
    for thread in readers():
        thread.join()
    return Large()


def peak() -> int:
    """Return the most memory that this process itself ever had."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def large_run(folder: str, action: str) -> int:
    """Train two steps, or go on from there; return how the peak grew."""
    settings = {"optim": "sgd", "sgd_momentum": 0.9, "max_steps": 2, "batch_size": 40}
    before = peak()
    trainer = small_trainer(folder, model=large, **settings)
    if action == "train":
        trainer.train()
    else:
        trainer.load_checkpoint()
    return peak() - before


def in_a_process(folder, action: str) -> int:
    command = [sys.executable, __file__, str(folder), action]
    here = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=here)
    return int(done.stdout)


@pytest.mark.disk
def test_reading_ahead_takes_no_second_copy_of_the_state(tmp_path):
    in_a_process(tmp_path, "train")
    state = 2 * PARTS * PART
    assert state <= in_a_process(tmp_path, "resume") < state + 128 * MIB


if __name__ == "__main__":
    print(large_run(*sys.argv[1:]))
