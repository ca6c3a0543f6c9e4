"""Runs in which any rank is killed at any phase of a save, or has no room for it.

The phases are those of rank 0, which makes the staging folder and commits, whoever writes what
in between. When rank 0 comes to the phase, it kills the victim, and goes on when it is dead. With
`save_mode="overlap"` that happens beside the training.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
from pathlib import Path

from distributed.training import make_trainer
from unbroken.distributed import join
from unbroken.errors import UnbrokenError
from unbroken.storage import LocalStorage
from unbroken.store.format.names import MANIFEST_NAME, STAGING
from unbroken.training import Callback

BEFORE, AT = 3, 6  # the checkpoint that was made before, and the save in which the kill comes
SECONDS = 20.0  # in which all must have ended; ranks would wait for each other much longer
PHASES = ("before stage", "staged", "written", "before commit", "after commit")


def terminate(pid: int) -> None:
    """Ask a process to stop."""
    os.kill(pid, signal.SIGTERM)


def kill(pid: int) -> None:
    """Kill a process, and return when it is dead."""
    ending = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([ending], [], [])


class PhaseStorage(LocalStorage):
    """A disk that notices the phases of a save."""

    def __init__(self, root: str, phase: str, victim: int, act=kill) -> None:
        super().__init__(root)
        self.phase, self.victim, self.act, self.is_armed = phase, victim, act, False

    def reach(self, phase: str) -> None:
        if self.is_armed and phase == self.phase:
            self.is_armed = False
            self.act(self.victim)

    def make_folder(self, path: str) -> None:
        super().make_folder(path)
        if path.startswith(f"{STAGING}/"):
            self.reach("staged")

    def create(self, path: str, *more, **others):
        if path.startswith(f"{STAGING}/") and path.endswith(f"/{MANIFEST_NAME}"):
            self.reach("written")
        return super().create(path, *more, **others)

    def rename(self, source: str, target: str) -> None:
        is_commit = target == f"checkpoint-{AT}"
        if is_commit:
            self.reach("before commit")
        super().rename(source, target)
        if is_commit:
            self.reach("after commit")


class Arm(Callback):
    """Makes rank 0's disk notice the phases, from the step on whose save is meant."""

    def on_step_end(self, trainer) -> None:
        if trainer.progress.step != AT:
            return
        trainer.checkpointer.wait()  # the save before is over, on a slow machine too
        storage = trainer.checkpointer.run.storage
        if isinstance(storage, PhaseStorage):
            storage.is_armed = True
            storage.reach("before stage")


def train_until_killed(
    folder: str, phase: str, victim: int, save_mode: str = "blocking", act=kill
) -> None:
    """Train; rank 0 kills a rank, the others leave their errors in files."""
    group = join(timeout=600.0)
    pids = group.gather("pids", os.getpid())
    parts = {"group": group, "callbacks": [Arm()]}
    if group.rank == 0:
        parts["storage"] = PhaseStorage(f"{folder}/run", phase, pids[victim], act)
    _end_with_error(folder, parts, save_mode)


class Fill(Callback):
    """From a step on, no file of one rank may become longer than a little."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, trainer) -> None:
        if trainer.progress.step == AT and trainer.group.rank == self.rank:
            most = 100 if self.rank else 2500  # bytes; rank 0 writes journals too
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))


def train_without_room(folder: str, rank: int, save_mode: str) -> None:
    group = join(timeout=30.0)
    _end_with_error(folder, {"group": group, "callbacks": [Fill(rank)]}, save_mode)


def _end_with_error(folder: str, parts: dict, save_mode: str) -> None:
    settings = {"logging_steps": 8, "save_mode": save_mode}
    try:
        make_trainer(f"{folder}/run", settings, **parts).train()
    except UnbrokenError as error:
        told = f"{type(error).__name__}: {error}"
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        Path(folder, f"error-{os.environ['RANK']}").write_text(told)
        sys.stdout.flush()
        parts["group"].close()
        os._exit(3)
