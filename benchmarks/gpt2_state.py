"""The state that saving and loading are measured with: GPT-2 124M, AdamW, and its training step."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from gpt2 import gpt2

TOKENS = 128
LOOK_EVERY = 0.05  # seconds


def model_and_optimizer(*, quick: bool = False):
    """Return the model and its optimizer with moments, as they are after a step."""
    model = gpt2(quick=quick)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    train_step(model, optimizer)
    return model, optimizer


def train_step(model, optimizer, before_update: Callable[[], None] = lambda: None) -> None:
    inputs = torch.arange(TOKENS).view(1, TOKENS)
    model(input_ids=inputs, labels=inputs).loss.backward()
    before_update()
    optimizer.step()
    optimizer.zero_grad()


def nbytes_of(model, optimizer) -> int:
    return sum(tensor.nbytes for tensor in tensors_of(model, optimizer))


def tensors_of(model, optimizer) -> list[torch.Tensor]:
    state = [tensor for one in optimizer.state.values() for tensor in one.values()]
    return [*model.parameters(), *state]


def digest_of(model, optimizer) -> str:
    """Return a hash of every byte that is saved."""
    digest = hashlib.blake2b()
    for tensor in tensors_of(model, optimizer):
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class PeakMemory:
    """The memory above what it was at the start, at its highest: with that of child processes.

    Of a child only its own memory counts, looked at now and then: what it shares with this process
    is counted here. The page cache is not counted.
    """

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._before = memory_of("self", "VmRSS") + of_children()
        self._of_children, self._over = 0, threading.Event()
        self._looking = threading.Thread(target=self._look)
        self._looking.start()
        return self

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            self._of_children = max(self._of_children, of_children())

    def __exit__(self, *_) -> None:
        self._over.set()
        self._looking.join()
        children = max(self._of_children, of_children())
        self.nbytes = memory_of("self", "VmHWM") + children - self._before


def of_children() -> int:
    """Return the memory that child processes have for themselves."""
    lists = [task / "children" for task in Path("/proc/self/task").iterdir()]
    try:
        children = [child for one in lists for child in one.read_text().split()]
        return sum(memory_of(child, "RssAnon") for child in children)
    except (FileNotFoundError, ProcessLookupError):  # a thread or a child ended meanwhile
        return 0


def memory_of(process: str, field: str) -> int:
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    return 0  # of a process that has ended
