"""What no reader would take is refused at the save, before it is written if that can be known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from store.small_runs import RUN_ID
from unbroken import Checkpointer
from unbroken.capture import encode
from unbroken.errors import CaptureError
from unbroken.storage import MemoryStorage
from unbroken.store import CheckpointReader, CheckpointWriter
from unbroken.store.checkpoint import reader, writer
from unbroken.store.format import manifest


class Watched(MemoryStorage):
    """Remembers every file that was begun."""

    def __init__(self):
        super().__init__()
        self.begun = []

    def create(self, path, nbytes=0):
        self.begun.append(path)
        return super().create(path, nbytes)


@pytest.fixture
def small_limit(monkeypatch):
    """A limit that is reached without filling the memory of the machine."""
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 20_000)


def test_facts_of_more_than_a_manifest_holds_are_refused_before_a_byte_is_written(monkeypatch):
    assert manifest.MAX_MANIFEST_BYTES == 256 << 20
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 1 << 20)
    storage = Watched()
    with Checkpointer(storage, model=nn.Linear(2, 1)) as checkpointer:
        checkpointer.save(1)
        before = [*storage.begun]
        with pytest.raises(CaptureError, match="at most 1 MiB") as caught:
            checkpointer.save(2, facts={"huge": "x" * (2 << 20)})
        assert storage.begun == before
        assert "huge 2 MiB" in str(caught.value)
        assert "not as facts or settings" in caught.value.hint
        assert storage.list(".staging") == []
        checkpointer.save(2)
    assert CheckpointReader(storage, "checkpoint-1").step == 1
    assert CheckpointReader(storage, "checkpoint-2").step == 2


def test_more_tensors_than_a_manifest_holds_are_refused_before_one_is_written(small_limit):
    storage = Watched()
    many = {f"tensor {number}": torch.zeros(1) for number in range(200)}
    with Checkpointer(storage, many=many) as checkpointer:
        with pytest.raises(CaptureError, match="larger than any reader takes"):
            checkpointer.save(1)
        assert [name for name in storage.begun if name.startswith(".staging")] == []


def test_a_manifest_that_turns_out_too_large_is_not_committed(small_limit):
    storage = MemoryStorage()
    writer = CheckpointWriter(storage, step=1, run_id=RUN_ID)
    writer.write_file("state.json", b"{}")
    with pytest.raises(CaptureError, match="nothing was committed"):
        writer.commit({"words": ["a"] * 10_000})
    assert storage.list("") == [".staging"]


def test_a_manifest_of_the_very_limit_is_committed_and_read(monkeypatch):
    def commit(storage):
        writer = CheckpointWriter(storage, step=1, run_id=RUN_ID, clock=lambda: 0.0)
        writer.write_file("state.json", b"{}")
        return writer.commit({"text": "é" * 100})

    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", len(commit(MemoryStorage()).to_bytes()))
    commit(storage := MemoryStorage())
    assert CheckpointReader(storage, "checkpoint-1").step == 1
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", manifest.MAX_MANIFEST_BYTES - 1)
    with pytest.raises(CaptureError):
        commit(MemoryStorage())


def test_a_file_that_could_not_be_read_whole_is_not_written(monkeypatch):
    for module in (reader, writer):
        monkeypatch.setattr(module, "MAX_WHOLE_BYTES", 1000)
    with Checkpointer(storage := MemoryStorage(), model=nn.Linear(2, 1)) as checkpointer:
        with pytest.raises(CaptureError, match="too large to be read back"):
            checkpointer.save(1, {"text": "x" * 1000})
        assert storage.list(".staging") == []


def test_a_path_that_no_manifest_can_hold_is_refused():
    leaf = next(iter(encode({"model": torch.zeros(1)}).leaves))
    leaf = leaf._replace(path="x" * 5000)
    writer = CheckpointWriter(storage := MemoryStorage(), step=1, run_id=RUN_ID)
    with pytest.raises(CaptureError, match="too long a path"):
        writer.write_leaves([leaf])
    assert storage.list(".staging") == []
