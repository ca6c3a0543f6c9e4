"""The bytes on disk: read by a second reader and by safetensors, and the same for ever."""

from __future__ import annotations

import json
import struct

import pytest

from store.plain_reader import read_checkpoint, state_digest
from store.small_runs import PlainLeaf, leaves_of, save, state_of
from unbroken.errors import CaptureError
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, CheckpointWriter


@pytest.fixture
def storage(tmp_path):
    return LocalStorage(tmp_path)


def test_a_reader_written_from_the_document_reads_every_byte(storage, tmp_path):
    save(storage, 10, "x")
    manifest, state = read_checkpoint(tmp_path / "checkpoint-10")
    assert state == state_of("x")
    assert (manifest["step"], manifest["facts"]) == (10, {"content": "x"})
    assert manifest["state_digest"] == state_digest(manifest)


def test_the_bytes_of_a_checkpoint_are_pinned(storage, tmp_path):
    """A change here is a new version of the format; see docs/format.md."""
    manifest = save(storage, 10, "x")
    raw = (tmp_path / "checkpoint-10/manifest.json").read_bytes()
    assert manifest.state_digest == "8a0e44f644aca8a7920f530de2cc74e6"
    assert raw.startswith(
        b'{"digest":"aef0c1c91f8a4b4a1a944a77ee475ecd","manifest":{"created":"1970-'
    )


def test_the_safetensors_library_reads_the_tensors(storage, tmp_path):
    import torch
    from safetensors.torch import load_file

    save(storage, 10, "x")
    tensors = load_file(tmp_path / "checkpoint-10/model.safetensors")
    expected = {leaf.name: leaf for leaf in leaves_of("x") if leaf.file == "model.safetensors"}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        name: leaf.shape for name, leaf in expected.items()
    }
    for name, tensor in tensors.items():
        assert bytes(tensor.reshape(-1).view(torch.uint8).tolist()) == expected[name].data


def test_tensors_start_aligned_and_the_widest_types_come_first(storage, tmp_path):
    save(storage, 10, "x")
    data = (tmp_path / "checkpoint-10/model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    assert (8 + length) % 64 == 0
    assert list(header) == ["embed.weight", "empty", "bias", "mask"]


def test_the_order_in_which_leaves_are_given_does_not_matter(storage):
    digests = []
    for step, leaves in enumerate([leaves_of("x"), leaves_of("x")[::-1]]):
        writer = CheckpointWriter(storage, step=step, run_id="r")
        writer.write_leaves(leaves)
        digests.append([file.regions for file in writer.commit({}).files])
    assert digests[0] == digests[1]


def test_the_state_digest_ignores_date_facts_and_files_but_no_byte(storage):
    moved = [
        PlainLeaf(x.path, "one.safetensors", x.path, x.dtype, x.shape, x.data)
        for x in leaves_of("x")
    ]
    changed = [
        *moved[1:],
        PlainLeaf("model.embed.weight", "one.safetensors", "w", "F32", (5, 7), b"\1" * 140),
    ]
    digests = []
    for step, leaves in enumerate([leaves_of("x"), moved, changed]):
        writer = CheckpointWriter(storage, step=step, run_id="r", clock=lambda step=step: step)
        writer.write_leaves(leaves)
        digests.append(writer.commit({"step": step}).state_digest)
    assert digests[0] == digests[1] != digests[2]


def leaf(**changes):
    plain = {"path": "p", "file": "f.safetensors", "name": "n", "dtype": "F32", "shape": (2,)}
    return PlainLeaf(**{**plain, "data": b"01234567", **changes})


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        pytest.param([leaf(), leaf(name="m")], "two leaves have this path", id="a path twice"),
        pytest.param([leaf(), leaf(path="q")], "cannot hold another 'n'", id="a name twice"),
        pytest.param([leaf(name="__metadata__")], "cannot hold another", id="a reserved name"),
        pytest.param([leaf(name="")], "cannot hold another", id="no name"),
        pytest.param([leaf(shape=(3,))], "expected 12, found 8", id="another length"),
        pytest.param([leaf(dtype="F33")], "do not fit dtype F33", id="an unknown type"),
        pytest.param([leaf(shape=(1,) * 65)], "do not fit", id="too many dimensions"),
        pytest.param([leaf(file="../f")], "not a name", id="a file outside"),
        pytest.param([leaf(file="manifest.json")], "not a name", id="the manifest"),
        pytest.param([leaf(file="Pinned")], "not a name", id="the pin"),
        pytest.param([leaf(file="A"), leaf(file="a", path="q")], "already", id="two cases"),
    ],
)  # fmt: skip
def test_an_impossible_leaf_is_refused_and_nothing_is_left(storage, leaves, message):
    writer = CheckpointWriter(storage, step=1, run_id="r")
    with pytest.raises(CaptureError, match=message):
        writer.write_leaves(leaves)
    assert storage.list(".staging") == []


class Liar(PlainLeaf):
    def chunks(self):
        yield memoryview(b"0123")


def test_a_leaf_that_gives_fewer_bytes_than_it_said_is_refused(storage):
    writer = CheckpointWriter(storage, step=1, run_id="r")
    with pytest.raises(CaptureError, match="expected 8, found 4"):
        writer.write_leaves([Liar("p", "f.safetensors", "n", "F32", (2,), b"01234567")])
    assert storage.list(".staging") == []


@pytest.mark.parametrize("facts", [{"a": float("nan")}, {"a": {1: 2}}, {"a": b""}, {"a": {1, 2}}])
def test_facts_that_json_would_bend_are_refused(storage, facts):
    with pytest.raises(CaptureError, match=r"facts\.a"):
        CheckpointWriter(storage, step=1, run_id="r").commit(facts)
    assert storage.list("") == [".staging"]


def test_a_writer_that_is_left_without_commit_leaves_nothing(storage):
    with CheckpointWriter(storage, step=1, run_id="r") as writer:
        writer.write_file("state.json", b"{}")
    assert storage.list(".staging") == []


def test_several_writers_of_one_step_do_not_meet(storage):
    first = CheckpointWriter(storage, step=1, run_id="r")
    second = CheckpointWriter(storage, step=1, run_id="r")
    first.write_file("a", b"first")
    second.write_file("a", b"second")
    second.commit({})
    first.abandon()
    assert CheckpointReader(storage, "checkpoint-1").read_file("a") == b"second"
