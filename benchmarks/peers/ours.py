"""Our Checkpointer, in its three ways to get hold of the state."""

from __future__ import annotations

from pathlib import Path

from peers.method import Method
from unbroken import Checkpointer
from unbroken.checkpoint import SavePolicy


class Blocking(Method):
    save_mode = "blocking"

    def __init__(self, model, optimizer, folder: Path) -> None:
        super().__init__(model, optimizer, folder)
        objects = {"model": model, "optimizer": optimizer}
        self._checkpointer = Checkpointer(folder, save=SavePolicy(mode=self.save_mode), **objects)
        self._checkpointer.resume()
        self._is_durable = False

    def path(self, number: int) -> Path:
        return self.folder / f"checkpoint-{number}"

    def save(self, number: int) -> None:
        self._is_durable = False
        self._checkpointer.save(number)

    def is_durable(self) -> bool:
        self._is_durable = self._is_durable or bool(self._checkpointer.poll())
        return self._is_durable

    def finish(self) -> None:
        self._checkpointer.wait()
        self._is_durable = bool(self._checkpointer.poll())

    def load(self, number: int) -> None:
        self._checkpointer.load(number, ["model", "optimizer"])

    def close(self) -> None:
        super().close()
        self._checkpointer.close()


class Async(Blocking):
    save_mode = "async"


class Overlap(Blocking):
    save_mode = "overlap"
