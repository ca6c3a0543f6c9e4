"""A part of a tensor that rank 0 relays is the part that a reader would have read."""

from __future__ import annotations

import pytest

from store.small_runs import leaves_of, save
from unbroken.checkpoint.resume.readers import BroadcastSender
from unbroken.distributed import ByteStream, SingleProcess
from unbroken.storage import MemoryStorage
from unbroken.store import CheckpointReader

PATH = "model.embed.weight"


@pytest.mark.parametrize(
    ("offsets", "shape"),
    [((0, 0), (5, 7)), ((1, 0), (2, 7)), ((0, 3), (5, 2)), ((4, 6), (1, 1)), ((2, 0), (0, 7))],
)
def test_a_part_is_cut_out_of_the_whole(offsets, shape):
    storage = MemoryStorage()
    save(storage, 1)
    assert any(leaf.path == PATH for leaf in leaves_of("state at 1"))
    reader = CheckpointReader(storage, "checkpoint-1")
    relayed = BroadcastSender(reader, SingleProcess(), ByteStream(SingleProcess()))
    parts = [bytearray(4 * shape[0] * shape[1]) for _ in range(2)]
    for source, part in zip((reader, relayed), parts, strict=True):
        source.read_box_into(PATH, offsets, shape, memoryview(part))
    assert parts[0] == parts[1]
    assert any(parts[0]) == (len(parts[0]) > 0)
