"""torch.distributed.checkpoint, blocking and asynchronous, with its stagers.

Staging in pinned memory needs an accelerator, and is not measured on a CPU. "Overlapped" is what
dcp calls zero-overhead: the state is copied while training goes on, until the next update.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from peers.method import Method


class Blocking(Method):
    def __init__(self, model, optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        warnings.filterwarnings("ignore", category=UserWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        if not torch.distributed.is_initialized():
            os.environ["MASTER_ADDR"] = "127.0.0.1"  # for the process that saves
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)

    def write(self, path: Path):
        dcp.save(self.state(), checkpoint_id=path)

    def load(self, number: int) -> None:
        state = self.state()  # over the live tensors, which are filled in place
        dcp.load(state, checkpoint_id=self.path(number))
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        super().close()
        torch.distributed.destroy_process_group()


class Thread(Blocking):
    where = AsyncCheckpointerType.THREAD
    staging: StagingOptions | None = None

    def __init__(self, model, optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        self._stager = None if self.staging is None else DefaultStager(self.staging)
        self._staged = None

    def write(self, path: Path):
        saving = dcp.async_save(
            self.state(),
            checkpoint_id=path,
            async_checkpointer_type=self.where,
            async_stager=self._stager,
        )
        self._staged = getattr(saving, "staging_completion", None)
        return getattr(saving, "upload_completion", saving).result

    def before_update(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
        super().close()


def options(*, shared: bool, overlapped: bool) -> StagingOptions:
    return StagingOptions(
        use_pinned_memory=False,
        use_shared_memory=shared,
        use_async_staging=overlapped,
        use_non_blocking_copy=False,
    )


class ThreadReused(Thread):
    staging = options(shared=False, overlapped=False)


class ThreadOverlapped(Thread):
    staging = options(shared=False, overlapped=True)


class ProcessReused(Thread):
    where = AsyncCheckpointerType.PROCESS
    staging = options(shared=True, overlapped=False)


class ProcessOverlapped(Thread):
    where = AsyncCheckpointerType.PROCESS
    staging = options(shared=True, overlapped=True)
