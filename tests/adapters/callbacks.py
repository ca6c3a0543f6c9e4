"""Callbacks that look at a run, and that end it."""

from __future__ import annotations

import copy
import hashlib
import os
import signal
import threading
from typing import Any, ClassVar

import torch
import transformers
import transformers.trainer_jit_checkpoint


def digest_of(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + bytes_of(tensor))
    return digest.hexdigest()


def digest_of_moments(model: torch.nn.Module, optimizer: Any) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        for key, moment in sorted(optimizer.state.get(parameter, {}).items()):
            digest.update(f"{name}.{key}".encode() + bytes_of(moment))
    return digest.hexdigest()


def bytes_of(tensor: torch.Tensor) -> bytes:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().numpy().tobytes()


class Counting(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
    """Counts steps, and draws a random number at each."""

    def __init__(self, by: int = 1) -> None:
        self.by, self.count = by, 0

    def on_step_end(self, args, state, control, **more):
        self.count += self.by

    def state(self) -> dict:
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


KILL: dict[str, Any] = {}  # of this process: in an attribute, it would be a change of the callback


class KilledAt(transformers.TrainerCallback):
    """Ends the process with a signal after a step; kill -9 by default."""

    @classmethod
    def by(cls, order: dict) -> KilledAt:
        is_here = os.environ.get("RANK", "0") == str(order.get("on_rank", 0))
        KILL.update({"signal": signal.SIGKILL, "after_save": False, **order, "is_here": is_here})
        return cls()

    def on_epoch_begin(self, args, state, control, **more):
        if KILL["kill_at"] == "no step":
            os.kill(os.getpid(), KILL["signal"])

    def on_step_end(self, args, state, control, **more):
        if state.global_step == KILL["kill_at"] and not KILL["after_save"] and KILL["is_here"]:
            if "seconds_left" in KILL:
                signal.alarm(KILL["seconds_left"])
            os.kill(os.getpid(), KILL["signal"])

    def on_save(self, args, state, control, **more):
        if state.global_step == KILL["kill_at"] and KILL["after_save"]:
            os.kill(os.getpid(), KILL["signal"])


class StoppedInAWindow(transformers.TrainerCallback):
    """Lets the host's own way of stopping begin between two micro-batches of a step."""

    def __init__(self, step: int, trainer: transformers.Trainer) -> None:
        kind = transformers.trainer_jit_checkpoint.JITCheckpointCallback
        own = [one for one in trainer.callback_handler.callbacks if isinstance(one, kind)]
        self.step, self.manager = step, own[0].jit_manager

    def on_substep_end(self, args, state, control, **more):
        if state.global_step == self.step:
            self.manager._enable_checkpoint()


class Seen(transformers.TrainerCallback):
    """Takes the weights' digest after each step, and what the learning rate was.

    Of the steps of its own process alone: what stands in a class is not saved.
    """

    rates: ClassVar[dict[int, float]] = {}
    states: ClassVar[dict[int, list[str]]] = {}

    def __init__(self, looks: bool = False) -> None:
        self.looks = looks
        self.begun_at_epoch: float | None = None

    def look(self, step: int, model: torch.nn.Module, optimizer: Any) -> None:
        if self.looks:
            self.states[step] = [digest_of(model), digest_of_moments(model, optimizer)]

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **more):
        self.begun_at_epoch = state.epoch
        self.look(state.global_step, model, optimizer)

    def on_save(self, args, state, control, model=None, optimizer=None, **more):
        self.look(state.global_step, model, optimizer)

    def on_step_end(self, args, state, control, lr_scheduler=None, **more):
        self.rates[state.global_step] = lr_scheduler.get_last_lr()[0]


class KilledBeside(KilledAt):
    """As above, without an `on_save` that a save would be waited for."""

    on_save = transformers.TrainerCallback.on_save


class SeenBeside(Seen):
    """The same; a save that is held back may end when training has come to a step."""

    on_save = transformers.TrainerCallback.on_save
    release_at, released = 0, threading.Event()

    def on_step_end(self, args, state, control, **more):
        super().on_step_end(args, state, control, **more)
        if state.global_step == self.release_at:
            self.released.set()


class Levels(transformers.TrainerCallback):
    """Sets an attribute of the data set at each step, or at the edges of epochs."""

    def __init__(self, at_edges: bool) -> None:
        self.at_edges, self.data = at_edges, None

    def on_train_begin(self, args, state, control, train_dataloader=None, **more):
        self.data = train_dataloader.dataset.dataset

    def on_step_end(self, args, state, control, **more):
        if not self.at_edges:
            self.data.level = state.global_step

    def on_epoch_end(self, args, state, control, **more):
        self.data.level = state.global_step


class Raises(transformers.TrainerCallback):
    """Sets an attribute of the data set, from a counter that it begins at the beginning."""

    def __init__(self, every: int = 4) -> None:
        self.every, self.count = every, 3

    def on_train_begin(self, args, state, control, **more):
        self.count = 1

    def on_step_end(self, args, state, control, model=None, **more):
        self.count += 1
        with torch.no_grad():
            next(model.parameters()).mul_(1 - 0.01 * (self.count // self.every))


@torch.no_grad()
def pull(trainer: Any, model: torch.nn.Module, how: str) -> None:
    trainer.pulls += 1
    if how == "a table":
        own = model.named_parameters()
        trainer.shadow = trainer.shadow or {name: p.clone() for name, p in own}
        means = list(trainer.shadow.values())
    elif how == "made late":
        trainer.average = trainer.average or copy.deepcopy(model)
        means = list(trainer.average.parameters())
    else:
        means = list(trainer.teacher.parameters())
    for mean, p in zip(means, model.parameters(), strict=True):
        mean.data.lerp_(p, 0.1)
        p.lerp_(mean, 1 / (1 + trainer.pulls))


def keeping(base: type, how: str) -> type:
    """Return a Trainer that keeps a teacher, a table and a counter, which pull the weights."""

    class Keeping(base):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.pulls, self.shadow, self.average = 0, None, None
            self.teacher = copy.deepcopy(self.model) if how == "a teacher" else None

        def training_step(self, model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
            loss = super().training_step(model, *arguments, **options)
            pull(self, model, how)
            return loss

    if how != "a state of its own":
        return Keeping

    class WithState(Keeping):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.teacher = copy.deepcopy(self.model)

        def state_dict(self) -> dict:
            return {"teacher": self.teacher.state_dict(), "pulls": self.pulls}

        def load_state_dict(self, state: dict) -> None:
            self.teacher.load_state_dict(state["teacher"])
            self.pulls = state["pulls"]

    return WithState


def kept_by(trainer: transformers.Trainer) -> list:
    teacher = getattr(trainer, "teacher", None)
    return [getattr(trainer, "pulls", 0), teacher and digest_of(teacher)]


class Raising(transformers.TrainerCallback):
    """Raises once, in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.at:
            self.at = -1
            raise RuntimeError("of the user's")
