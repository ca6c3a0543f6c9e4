"""The state that saving and loading are measured with: GPT-2 124M, AdamW, and its training step."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

CHUNK = 16 << 20


def model_and_optimizer(layers: int = 12):
    """Return the model and its optimizer with moments, as they are after a step."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    train_step(model, optimizer)
    return model, optimizer


def train_step(model, optimizer) -> None:
    inputs = torch.arange(128).view(1, 128)
    model(input_ids=inputs, labels=inputs).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def nbytes_of(model, optimizer) -> int:
    state = [t for one in optimizer.state.values() for t in one.values()]
    return sum(t.nbytes for t in [*model.parameters(), *state])


def bare_write(path: Path, nbytes: int) -> float:
    """Return the seconds of a direct write and fsync of so many bytes: the device's speed."""
    data = memoryview(mmap.mmap(-1, CHUNK))
    data[:] = os.urandom(CHUNK)
    began = time.perf_counter()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    os.posix_fallocate(fd, 0, nbytes)
    for start in range(0, nbytes // 4096 * 4096, CHUNK):
        os.pwrite(fd, data[: min(CHUNK, nbytes // 4096 * 4096 - start)], start)
    os.fsync(fd)
    os.close(fd)
    seconds = time.perf_counter() - began
    path.unlink()
    return seconds


def bare_read(folder: Path) -> float:
    """Return the seconds of a direct read of all large files of a folder."""
    data = memoryview(mmap.mmap(-1, CHUNK))
    began = time.perf_counter()
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 1 << 20:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
            start = 0
            while count := os.preadv(fd, [data], start):
                start += count
            os.close(fd)
    return time.perf_counter() - began


def files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]


def sync(place: Path) -> None:
    """Make durable what a method left to the page cache."""
    for path in files_of(place):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def make_cold(place: Path) -> None:
    """Drop files from the page cache."""
    for path in files_of(place):
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def make_hot(place: Path) -> None:
    """Bring files into the page cache."""
    for path in files_of(place):
        path.read_bytes()


class PeakMemory:
    """The memory of this process above what it was at the start, at its highest."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._before = self._of("VmRSS")
        return self

    def __exit__(self, *_) -> None:
        self.nbytes = self._of("VmHWM") - self._before

    @staticmethod
    def _of(field: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) << 10
        raise SystemExit(f"no {field}")
