"""Meta's torch_checkpointing: staged beside the training, written by a process.

Its defaults but for direct I/O, which version 0.1.1 tries with unaligned memory: ext4 refuses it.
"""

from __future__ import annotations

from pathlib import Path

from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from peers.method import Method


class Manager(Method):
    def __init__(self, model, optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def write(self, path: Path):
        return self._manager.save(str(path), self.state()).result

    def before_update(self) -> None:
        with self._manager.lock():
            pass

    def load(self, number: int) -> None:
        state = self._manager.load(str(self.path(number)), into=self.state())
        self.optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        super().close()
        self._manager.close()
