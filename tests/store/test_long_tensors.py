"""Of a long tensor every byte counts, not only those of the first pieces that are hashed."""

from __future__ import annotations

import pytest

from store.small_runs import PlainLeaf
from unbroken.errors import CorruptCheckpointError
from unbroken.storage import CompressedStorage, LocalStorage, MemoryStorage
from unbroken.store import CheckpointReader, CheckpointWriter
from unbroken.store.export import export_weights
from unbroken.store.format.canonical_json import digest_of

MIB = 1 << 20
NBYTES = 5 * MIB + 3  # more than two pieces of the writer, and of the reader
PLACES = [0, MIB - 1, MIB, 2 * MIB, 3 * MIB + 1, 4 * MIB, NBYTES - 1]
EACH_PLACE = pytest.mark.parametrize("place", PLACES)
STATE = (
    b'{"model":{"$":"object","kind":"module","class":"M","facts":{},"state":{"w":'
    b'{"$":"tensor","leaf":"model.w","dtype":"uint8","shape":[%d]}}}}' % NBYTES
)


def content(place: int | None = None) -> bytes:
    data = bytearray(NBYTES)
    if place is not None:
        data[place] = 1
    return bytes(data)


def leaf(data: bytes, chunk_bytes: int) -> PlainLeaf:
    return PlainLeaf("model.w", "w.safetensors", "w", "U8", (NBYTES,), data, chunk_bytes)


def save(storage, step: int, data: bytes, chunk_bytes: int = 16 * MIB, **options) -> None:
    with CheckpointWriter(storage, step=step, run_id="a" * 32, **options) as writer:
        writer.write_leaves([leaf(data, chunk_bytes)])
        writer.write_file("state.json", STATE)
        writer.commit({})


@EACH_PLACE
@pytest.mark.parametrize("chunk_bytes", [16 * MIB, MIB, 3 * MIB])
def test_a_writer_hashes_every_byte(chunk_bytes, place):
    storage, data = MemoryStorage(), content(place)
    save(storage, 1, data, chunk_bytes)
    found = CheckpointReader(storage, "checkpoint-1").manifest.tensors["model.w"]
    assert found.digest == digest_of(data)


WAYS = {
    "read": lambda reader, _: reader.read_leaf_into("model.w", memoryview(bytearray(NBYTES))),
    "read together": lambda reader, _: reader.read_boxes_into(
        [("model.w", None, memoryview(bytearray(NBYTES)))]
    ),
    "read in part": lambda reader, _: reader.read_box_into(
        "model.w", (0,), (1,), memoryview(bytearray(1))
    ),
    "checked": lambda reader, _: reader.check_rest(),
    "verified": lambda reader, _: found_damage(reader),
    "exported": lambda reader, folder: export_weights(reader, folder / "weights"),
}


def found_damage(reader: CheckpointReader) -> None:
    if damage := reader.verify():
        raise CorruptCheckpointError(reader.folder, damage[0].what)


@EACH_PLACE
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_changed_byte_is_found_wherever_it_is_and_however_it_is_read(way, place, tmp_path):
    save(LocalStorage(tmp_path / "run"), 1, content())
    reader = CheckpointReader(LocalStorage(tmp_path / "run"), "checkpoint-1")
    start = reader._files["w.safetensors"].regions[1].offset
    with (tmp_path / "run/checkpoint-1/w.safetensors").open("r+b") as file:
        file.seek(start + place)
        file.write(b"\1")
    with pytest.raises(CorruptCheckpointError):
        way(reader, tmp_path)


@EACH_PLACE
def test_a_file_is_not_linked_in_place_of_one_with_any_other_byte(place):
    storage = MemoryStorage()
    save(storage, 1, content())
    like = CheckpointReader(storage, "checkpoint-1")
    save(storage, 2, content(place), like=like, constant=["w.safetensors"])
    found = bytearray(NBYTES)
    CheckpointReader(storage, "checkpoint-2").read_leaf_into("model.w", memoryview(found))
    assert bytes(found) == content(place)


@EACH_PLACE
def test_a_compressed_tensor_comes_back_whole(place):
    storage = CompressedStorage(MemoryStorage(), least_bytes=1)
    save(storage, 1, content(place))
    found = bytearray(NBYTES)
    CheckpointReader(storage, "checkpoint-1").read_leaf_into("model.w", memoryview(found))
    assert bytes(found) == content(place)
