"""What is done to a run on purpose: a part taken out, a kill in a save, a slow disk."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from adapters.callbacks import SeenBeside


def sabotage(part: str) -> None:
    """Take one part out of the adapter, so that the tests must fail."""
    from unbroken.adapters.transformers import changes, dataloader, position, session
    from unbroken.checkpoint.coverage import attributes
    from unbroken.data import KeyedRandom

    def nothing(*_: Any, **__: Any) -> None: ...

    targets = {
        "random states": (session.TrainSession, "restore_random_states"),
        "losses": (session.LossAccumulators, "bring_back"),
        "callbacks": (changes.CallbackState, "load_state_dict"),
        "order": (dataloader.IndexBatches, "_draw_from"),
        "keys": (KeyedRandom, "seed"),
        "attributes": (attributes.Attributes, "restore"),
        "place": (position.PositionCallback, "on_substep_end"),
    }
    setattr(*targets[part], nothing)


def kill_before_write(name: str) -> None:
    """End the process with kill -9 before the host writes a file of checkpoint-10."""

    def killing(write: Any, path_of: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            path = str(path_of(*arguments))
            if "checkpoint-10" in path and name in f"{path}/save_pretrained":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*arguments, **options)

        return wrapped

    state = transformers.trainer_callback.TrainerState
    if name == "save_pretrained":
        model = transformers.PreTrainedModel
        model.save_pretrained = killing(model.save_pretrained, lambda _, path: path)
    elif name == "trainer_state.json":
        state.save_to_json = killing(state.save_to_json, lambda _, path: path)
    else:
        torch.save = killing(torch.save, lambda _, path: path)


def hold_commit_until(step: int) -> None:
    """Let the commit of checkpoint-5 wait until training has come to a step, or fail."""
    from unbroken.storage import LocalStorage
    from unbroken.store.run import directory

    SeenBeside.release_at = step

    class Holding(LocalStorage):
        def rename(self, source: str, target: str) -> None:
            if target == "checkpoint-5" and not SeenBeside.released.wait(3):
                raise OSError(5, "training stands still", target)
            super().rename(source, target)

    directory.storage_at = Holding


def kill_when_rotated() -> None:
    """End rank 1 before its last file of checkpoint-8, when rank 0 has removed checkpoint-4."""
    write = torch.save

    def killing(value: Any, path: Any, **options: Any) -> None:
        if str(path).endswith("checkpoint-8/rng_state_1.pth"):
            older = Path(path).parents[1] / "checkpoint-4"
            deadline = time.monotonic() + 60
            while older.exists() and time.monotonic() < deadline:
                os.sched_yield()
            os.kill(os.getpid(), signal.SIGKILL)
        write(value, path, **options)

    torch.save = killing


def kill_at_storage_step(step: int) -> None:
    """End the process with kill -9 at a step of what our Trainer does to the disk."""
    from unbroken.store.run import directory
    from unbroken.testing import KillingStorage

    class Killing(KillingStorage):
        def __init__(self, root: str, *, create: bool = True) -> None:
            super().__init__(root, kill_at=step)

    directory.storage_at = Killing
