"""Tensors in shards: any part of one is read from whatever shards hold it, or nothing is."""

from __future__ import annotations

import json
import tracemalloc
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.plain_reader import read_checkpoint, state_digest
from store.small_runs import RUN_ID, PlainLeaf
from store.test_manifest import body_of, read, spelled
from unbroken.errors import (
    CaptureError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    SaveError,
    StateMismatchError,
)
from unbroken.storage import LocalStorage, MemoryStorage
from unbroken.store import (
    Box,
    CheckpointReader,
    CheckpointWriter,
    diff_checkpoints,
    export_weights,
    store_leaves,
)

STATE = {
    "model": {
        "$": "object",
        "kind": "module",
        "class": "Net",
        "facts": {},
        "state": {"w": {"$": "tensor", "leaf": "model.w", "dtype": "uint16", "shape": [4, 6]}},
    }
}


def numbers(shape) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)


def leaf(values: np.ndarray, offsets, global_shape, rank: int, path="model.w") -> PlainLeaf:
    cut = (None, None) if values.shape == tuple(global_shape) else (offsets, global_shape)
    place = (path, f"model.rank{rank}.safetensors", path.partition(".")[2], "U16", values.shape)
    return PlainLeaf(*place, np.ascontiguousarray(values).tobytes(), 64, *cut)


def cut_at(values: np.ndarray, cuts) -> list[PlainLeaf]:
    """Cut at these places of each dimension; empty parts are stored by nobody."""
    ends = [sorted({0, *places, size}) for places, size in zip(cuts, values.shape, strict=True)]
    ranges = product(*map(pairwise, ends))
    return [
        leaf(values[tuple(slice(*r) for r in box)], tuple(r[0] for r in box), values.shape, rank)
        for rank, box in enumerate(ranges)
    ]


def saved(storage, leaves, step=10, state=STATE) -> CheckpointReader:
    with CheckpointWriter(storage, step=step, run_id=RUN_ID) as writer:
        writer.write_file("state.json", json.dumps(state).encode())
        writer.write_file("config.json", b"{}")
        writer.write_leaves(leaves)
        writer.commit({})
    return CheckpointReader(storage, f"checkpoint-{step}")


def part_of(reader, box, path="model.w") -> np.ndarray:
    offsets, shape = tuple(r.start for r in box), tuple(r.stop - r.start for r in box)
    found = np.empty(shape, np.uint16)
    reader.read_box_into(path, offsets, shape, memoryview(found.reshape(-1).view(np.uint8)))
    return found


@st.composite
def cut_tensors(draw):
    """Draw a shape, two ways to cut it, and a part of it."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    cuts = [[draw(st.lists(st.integers(0, size), max_size=3)) for size in shape] for _ in "ab"]
    ends = [sorted(draw(st.tuples(*[st.integers(0, size)] * 2))) for size in shape]
    return shape, cuts, tuple(slice(*end) for end in ends)


@given(cut_tensors())
def test_any_part_comes_back_from_any_cut(drawn):
    shape, (cuts, _), box = drawn
    values = numbers(shape)
    reader = saved(MemoryStorage(), cut_at(values, cuts))
    assert np.array_equal(part_of(reader, box), values[box])


@given(cut_tensors())
def test_parts_and_wholes_are_read_together(drawn):
    shape, (cuts, _), box = drawn
    values = numbers(shape)
    reader = saved(MemoryStorage(), cut_at(values, cuts))
    whole, part = np.zeros_like(values), np.zeros_like(values[box])
    places = (None, Box(tuple(r.start for r in box), part.shape))
    buffers = [memoryview(found.reshape(-1).view(np.uint8)) for found in (whole, part)]
    reader.read_boxes_into([("model.w", *one) for one in zip(places, buffers, strict=True)])
    assert np.array_equal(whole, values)
    assert np.array_equal(part, values[box])


@given(cut_tensors())
def test_the_whole_comes_back_from_any_cut(drawn):
    shape, (cuts, _), _ = drawn
    reader = saved(MemoryStorage(), cut_at(numbers(shape), cuts))
    buffer = bytearray(2 * numbers(shape).size)
    reader.read_leaf_into("model.w", memoryview(buffer))
    assert bytes(buffer) == numbers(shape).tobytes()


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


@pytest.fixture
def reader(storage):
    """A tensor of 4 x 6 in four shards, two of them in the upper half."""
    return saved(storage, cut_at(numbers((4, 6)), [[2], [3]]))


def test_an_independent_reader_puts_it_together(reader, tmp_path):
    manifest, state = read_checkpoint(tmp_path / "checkpoint-10")
    assert state["model.w"] == numbers((4, 6)).tobytes()
    assert state_digest(manifest) == reader.manifest.state_digest


def test_a_sharded_tensor_is_one_tensor_of_the_manifest(reader):
    entry = reader.manifest.tensors["model.w"]
    assert (entry.shape, entry.nbytes, entry.is_whole, len(entry.shards)) == ((4, 6), 48, False, 4)


def test_a_damaged_shard_is_named_with_its_file_and_place(reader, tmp_path):
    flip_last_byte(tmp_path / "checkpoint-10" / "model.rank2.safetensors")
    with pytest.raises(CorruptCheckpointError, match=r"model\.rank2.*model\.w \(shard at 2, 0\)"):
        part_of(reader, (slice(0, 4), slice(0, 6)))
    assert [str(one).split(":")[0] for one in reader.verify()] == ["model.rank2.safetensors"]


def test_a_damaged_shard_harms_nobody_who_needs_another_one(reader, tmp_path):
    flip_last_byte(tmp_path / "checkpoint-10" / "model.rank2.safetensors")
    assert np.array_equal(part_of(reader, (slice(0, 2), slice(0, 6))), numbers((4, 6))[:2])


class CountingStorage(LocalStorage):
    """Counts the bytes that are read."""

    nbytes = 0

    def open(self, path):
        handle, storage = super().open(path), self
        read_into = handle.read_into

        class Counting:
            nbytes = handle.nbytes
            close, __enter__, __exit__ = handle.close, handle.__enter__, handle.__exit__

            def read_into(self, offset, buffer):
                storage.nbytes += len(buffer)
                read_into(offset, buffer)

        return Counting()


@pytest.mark.parametrize(("left_to_others", "rows"), [(True, 2), (False, 4)])
def test_of_a_shard_that_others_verify_no_more_is_read_than_is_wanted(
    left_to_others, rows, tmp_path
):
    storage, values = CountingStorage(tmp_path), numbers((4, 40_000))
    reader = saved(storage, [leaf(values, (0, 0), values.shape, 0)])
    if left_to_others:
        reader.leave_to_others(frozenset({("model.rank0.safetensors", 1)}))
    storage.nbytes = 0
    assert np.array_equal(part_of(reader, (slice(1, 3), slice(0, 40_000))), values[1:3])
    assert storage.nbytes == rows * 40_000 * 2


def flip_last_byte(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("offsets", "shape", "nbytes"),
    [((0,), (4,), 8), ((3, 0), (2, 6), 24), ((0, 0), (4, 6), 47)],
    ids=["other dimensions", "beyond the end", "another length"],
)
def test_a_part_that_is_none_is_refused(reader, offsets, shape, nbytes):
    with pytest.raises(StateMismatchError):
        reader.read_box_into("model.w", offsets, shape, memoryview(bytearray(nbytes)))


def test_shards_that_leave_a_hole_are_not_committed(storage):
    leaves = cut_at(numbers((4, 6)), [[2], [3]])[1:]
    with pytest.raises(CaptureError, match="do not make it up"):
        saved(storage, leaves)
    assert storage.stat("checkpoint-10") is None


def change(region: int, **fields):
    """Change fields of the shard in a file; None takes a field out."""

    def changed(body):
        target = body["files"][1 + region]["regions"][1]
        target.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del target[name]

    return changed


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(change(0, offsets=[1, 0]), id="an overlap and a hole"),
        pytest.param(change(0, offsets=[0, 3]), id="the same shard twice"),
        pytest.param(change(0, offsets=[0]), id="other dimensions"),
        pytest.param(change(0, global_shape=[4, 7]), id="shards of two tensors"),
        pytest.param(change(0, offsets=[2**40, 0]), id="far away"),
        pytest.param(change(0, offsets=None, global_shape=None), id="a whole one among shards"),
        pytest.param(change(0, global_shape=None), id="no global shape"),
        pytest.param(change(0, dtype="I16"), id="another type"),
        pytest.param(change(0, offsets=[-1, 0]), id="a negative place"),
    ],
)
def test_a_manifest_with_impossible_shards_is_rejected(spoil, reader):
    body = body_of(reader.manifest)
    spoil(body)
    with pytest.raises(CorruptCheckpointError):
        read(spelled(body))


def test_a_shard_that_is_the_whole_tensor_is_no_shard(storage):
    body = body_of(saved(storage, [leaf(numbers((4, 6)), (0, 0), (4, 6), 0)]).manifest)
    body["files"][1]["regions"][1] |= {"offsets": [0, 0], "global_shape": [4, 6]}
    with pytest.raises(CorruptCheckpointError, match="impossible number of shards"):
        read(spelled(body))


def test_files_that_another_rank_stored_are_adopted(storage):
    first, *rest = cut_at(numbers((4, 6)), [[2], []])
    with CheckpointWriter(storage, step=10, run_id=RUN_ID) as writer:
        writer.write_leaves([first])
        writer.adopt(store_leaves(storage, writer.staging, rest, {"state.rank1.json": b"{}"}))
        writer.commit({})
    reader = CheckpointReader(storage, "checkpoint-10")
    assert reader.read_file("state.rank1.json") == b"{}"
    assert np.array_equal(part_of(reader, (slice(1, 3), slice(0, 6))), numbers((4, 6))[1:3])


def test_files_that_are_not_there_are_not_adopted(storage):
    elsewhere = MemoryStorage()
    elsewhere.make_folder("x")
    files = store_leaves(elsewhere, "x", cut_at(numbers((4, 6)), [[], []]), {})
    with (
        CheckpointWriter(storage, step=10, run_id=RUN_ID) as writer,
        pytest.raises(SaveError, match="no file"),
    ):
        writer.adopt(files)


def test_files_of_another_length_are_not_adopted(storage):
    with CheckpointWriter(storage, step=10, run_id=RUN_ID) as writer:
        files = store_leaves(storage, writer.staging, cut_at(numbers((4, 6)), [[], []]), {})
        storage.append(f"{writer.staging}/{files[0].name}", b"x")
        with pytest.raises(SaveError, match=f"expected {files[0].nbytes} bytes"):
            writer.adopt(files)


def test_digests_cannot_compare_tensors_that_are_cut_in_two_ways(storage, reader):
    other = saved(storage, cut_at(numbers((4, 6)), [[], [1]]), step=11)
    assert [one.kind for one in diff_checkpoints(reader, other).tensors] == ["shards"]
    same = saved(storage, cut_at(numbers((4, 6)), [[2], [3]]), step=12)
    assert diff_checkpoints(reader, same).tensors == ()


@given(drawn=cut_tensors())
def test_an_export_has_the_bytes_of_the_whole(drawn, tmp_path_factory):
    shape, (cuts, _), _ = drawn
    values, folder = numbers(shape), tmp_path_factory.mktemp("export")
    state = json.loads(json.dumps(STATE))
    state["model"]["state"]["w"]["shape"] = list(shape)
    export_weights(saved(MemoryStorage(), cut_at(values, cuts), state=state), folder)
    assert (folder / "model.safetensors").read_bytes().endswith(values.tobytes())
    assert (folder / "config.json").read_bytes() == b"{}"


def test_an_export_of_a_damaged_shard_leaves_nothing(reader, tmp_path):
    flip_last_byte(tmp_path / "checkpoint-10" / "model.rank2.safetensors")
    with pytest.raises(CorruptCheckpointError, match="shard at 2, 0"):
        export_weights(reader, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".staging", "checkpoint-10"]


def test_an_export_never_touches_a_folder_with_something_in_it(reader, tmp_path):
    with pytest.raises(ConfigError, match="is there already"):
        export_weights(reader, tmp_path)


def test_an_export_of_a_model_that_is_not_there_is_refused(reader, tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="'ema'"):
        export_weights(reader, tmp_path / "out", model="ema")


def test_an_export_needs_less_memory_than_one_shard(storage, tmp_path):
    """The file is mapped: what is written there is the kernel's to put on the disk."""
    rows, columns, ranks = 2048, 8192, 2
    values = np.zeros((rows, columns), np.uint16)
    state = json.loads(json.dumps(STATE))
    state["model"]["state"]["w"]["shape"] = [rows, columns]
    reader = saved(storage, cut_at(values, [[], [columns // ranks]]), state=state)
    tracemalloc.start()
    export_weights(reader, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < values.nbytes / ranks / 2
