"""The manifest is read strictly: what no writer wrote is refused before it costs memory."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from store.small_runs import RUN_ID, save
from unbroken.errors import CorruptCheckpointError, NewerFormatError
from unbroken.storage import LocalStorage, MemoryStorage
from unbroken.store import CheckpointReader, FileEntry, Manifest, Region

DIGEST = "0" * 32


def envelope(body: bytes) -> bytes:
    """What an attacker, or a newer version, would write around any body."""
    return b'{"digest":"%s","manifest":%s}\n' % (xxhash.xxh3_128_hexdigest(body).encode(), body)


def body_of(manifest: Manifest) -> dict:
    return json.loads(manifest.to_bytes())["manifest"]


def spelled(body: dict) -> bytes:
    return envelope(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


@pytest.fixture
def manifest():
    return save(MemoryStorage(), 10, "x")


def read(raw: bytes) -> Manifest:
    return Manifest.from_bytes(raw, "manifest.json")


def test_a_manifest_comes_back_the_same(manifest):
    assert read(manifest.to_bytes()) == manifest


def test_the_test_spells_a_manifest_as_the_writer_does(manifest):
    assert spelled(body_of(manifest)) == manifest.to_bytes()


def test_a_newer_format_is_not_called_damage(manifest):
    newer = spelled({**body_of(manifest), "version": 2, "new": "field"})
    with pytest.raises(NewerFormatError, match="at most version 1, found 2") as caught:
        read(newer)
    assert "upgrade" in caught.value.hint


def test_a_flipped_version_is_damage_and_not_a_newer_format(manifest):
    raw = manifest.to_bytes().replace(b'"version":1', b'"version":3')
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        read(raw)


def change(path: str, value: object):
    """Return a function that puts `value` at a dotted path of the body."""

    def apply(body: dict) -> dict:
        at = body
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            at = at[part]
        at[last] = value
        return body

    return apply


@pytest.mark.parametrize(
    "hostile",
    [
        pytest.param(change("format", "something else"), id="another format"),
        pytest.param(change("version", 0), id="version zero"),
        pytest.param(change("version", True), id="a version that is true"),
        pytest.param(change("version", "1"), id="a version as text"),
        pytest.param(change("step", -1), id="a negative step"),
        pytest.param(change("step", 10**18), id="an absurd step"),
        pytest.param(change("step", 1.0), id="a step with a point"),
        pytest.param(change("run_id", ""), id="no run id"),
        pytest.param(change("run_id", "x" * 5000), id="a huge run id"),
        pytest.param(change("facts", []), id="facts that are a list"),
        pytest.param(change("files", {}), id="files that are an object"),
        pytest.param(change("extra", 1), id="an unknown field"),
        pytest.param(change("state_digest", "Z" * 32), id="no digest"),
        pytest.param(change("files.0.name", "../../etc/passwd"), id="a path outside"),
        pytest.param(change("files.0.name", "/etc/passwd"), id="an absolute path"),
        pytest.param(change("files.0.name", "a/b"), id="a path with a folder"),
        pytest.param(change("files.0.name", "a\\b"), id="a path of another system"),
        pytest.param(change("files.0.name", ".."), id="the parent"),
        pytest.param(change("files.0.name", "a\0b"), id="a name with a zero byte"),
        pytest.param(change("files.0.name", "manifest.json"), id="the manifest itself"),
        pytest.param(change("files.0.name", "z"), id="files out of order"),
        pytest.param(change("files.0.name", "model.safetensors"), id="a file twice"),
        pytest.param(change("files.0.nbytes", 2**63), id="an absurd file"),
        pytest.param(change("files.0.nbytes", 1), id="a tail that no digest covers"),
        pytest.param(change("files.0.regions", []), id="no regions"),
        pytest.param(change("files.0.extra", 1), id="an unknown field of a file"),
        pytest.param(change("files.1.regions.1.offset", 1), id="an overlap"),
        pytest.param(change("files.1.regions.1.extra", 1), id="an unknown field of a region"),
        pytest.param(change("files.1.regions.1.nbytes", 2**62), id="an absurd tensor"),
        pytest.param(change("files.1.regions.1.shape", [2**62, 4]), id="an absurd shape"),
        pytest.param(change("files.1.regions.1.shape", [1] * 65), id="too many dimensions"),
        pytest.param(change("files.1.regions.1.shape", [-5, -7]), id="a negative shape"),
        pytest.param(change("files.1.regions.1.dtype", "F33"), id="an unknown type"),
        pytest.param(change("files.1.regions.1.dtype", "F64"), id="a type that does not fit"),
        pytest.param(change("files.1.regions.1.path", "model.bias"), id="a tensor twice"),
        pytest.param(change("files.1.regions.1.path", None), id="a path that is null"),
        pytest.param(change("files.1.regions.1.digest", DIGEST.upper() + "F"), id="a long digest"),
    ],
)
def test_a_hostile_manifest_is_refused(manifest, hostile):
    with pytest.raises(CorruptCheckpointError, match=r"^manifest\.json: ") as caught:
        read(spelled(hostile(body_of(manifest))))
    assert "spelled" not in caught.value.what  # the last check of all, which would catch it too


def test_a_state_digest_of_another_state_is_refused(manifest):
    with pytest.raises(CorruptCheckpointError, match="not spelled as the format asks"):
        read(spelled(change("state_digest", DIGEST)(body_of(manifest))))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"[]", id="no object"),
        pytest.param(b"[" * 100_000, id="a hundred thousand brackets"),
        pytest.param(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, id="deep objects"),
        pytest.param(b'{"format":NaN}', id="NaN"),
        pytest.param(b'{"step":' + b"9" * 10_000 + b"}", id="a number of ten thousand digits"),
        pytest.param(b'{"step":1e999}', id="an infinite number"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_hostile_json_is_refused(body):
    with pytest.raises(CorruptCheckpointError):
        read(envelope(body))


def test_a_key_given_twice_is_refused(manifest):
    body = json.dumps(body_of(manifest), sort_keys=True, separators=(",", ":")).encode()
    twice = body[:-1] + b',"step":11}'
    with pytest.raises(CorruptCheckpointError, match="gives a key twice: found 'step'"):
        read(envelope(twice))


def test_another_spelling_of_the_same_manifest_is_refused(manifest):
    for spelling in ({"indent": 1}, {"sort_keys": False}, {"separators": (", ", ": ")}):
        body = dict(reversed(body_of(manifest).items()))
        with pytest.raises(CorruptCheckpointError):
            read(envelope(json.dumps(body, **spelling).encode()))


@given(st.binary(max_size=200))
def test_no_bytes_at_all_are_taken_for_a_manifest(raw):
    for attempt in (raw, envelope(raw)):
        with pytest.raises(CorruptCheckpointError):
            read(attempt)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)  # fmt: skip


@given(st.dictionaries(st.text(), JSON, max_size=4))
def test_any_facts_come_back_the_same(facts):
    manifest = Manifest(1, RUN_ID, "now", (), facts)
    assert read(manifest.to_bytes()).to_bytes() == manifest.to_bytes()
    assert repr(read(manifest.to_bytes()).facts) == repr(
        json.loads(json.dumps(facts, sort_keys=True))
    )


def test_a_manifest_that_promises_absurd_files_costs_no_memory(manifest):
    """The sizes on disk are looked at before anything of such a size is allocated."""
    storage = MemoryStorage()
    storage.make_folder("checkpoint-10")
    huge = FileEntry("a", 2**62, (Region(0, 2**62, DIGEST),))
    storage.append("checkpoint-10/manifest.json", replace(manifest, files=(huge,)).to_bytes())
    storage.append("checkpoint-10/a", b"small")
    with pytest.raises(CorruptCheckpointError, match=f"expected {2**62} bytes, found 5 bytes"):
        CheckpointReader(storage, "checkpoint-10")


def test_a_manifest_of_an_absurd_size_is_refused_unread(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: takes no room
    with pytest.raises(CorruptCheckpointError, match="is too large"):
        CheckpointReader(LocalStorage(tmp_path), "checkpoint-1")


def test_a_sparse_file_is_not_read_into_memory_whole(tmp_path, manifest):
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    huge = FileEntry("state.json", 1 << 40, (Region(0, 1 << 40, DIGEST),))
    (folder / "manifest.json").write_bytes(replace(manifest, files=(huge,)).to_bytes())
    with (folder / "state.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CorruptCheckpointError, match="too large to read whole"):
        CheckpointReader(LocalStorage(tmp_path), "checkpoint-10").read_file("state.json")
