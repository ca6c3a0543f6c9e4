"""Every kind of damage is found, wherever it is, and told by name."""

from __future__ import annotations

import os
import shutil
import tracemalloc

import pytest

from store.small_runs import PlainLeaf, newest_state, read_leaf, read_state, save, state_of
from unbroken.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    StateMismatchError,
)
from unbroken.storage import LocalStorage
from unbroken.store import Catalog, CheckpointReader, CheckpointWriter, Damage

FILES = ["empty.txt", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
NOT_EMPTY = FILES[1:]


@pytest.fixture
def folder(tmp_path):
    """checkpoint-2 over checkpoint-1; the damage is done to checkpoint-2."""
    storage = LocalStorage(tmp_path)
    save(storage, 1)
    save(storage, 2)
    return tmp_path / "checkpoint-2"


def disk(folder) -> LocalStorage:
    return LocalStorage(folder.parent, create=False)


def is_refused(folder) -> bool:
    """Whether opening it, or reading it whole, is an error."""
    try:
        CheckpointReader(disk(folder), folder.name).check_rest()
    except CorruptCheckpointError:
        return True
    return False


def is_found(folder) -> bool:
    """Whether it is refused, and the run falls back to the older one."""
    newest = newest_state(disk(folder))
    return is_refused(folder) and newest == state_of("state at 1")


def damage_of(folder) -> list[tuple[str, str, str | None]]:
    reader = CheckpointReader(disk(folder), folder.name)
    return [(damage.file, damage.kind, damage.path) for damage in reader.verify()]


def test_an_intact_checkpoint_has_no_damage(folder):
    assert not is_refused(folder)
    assert damage_of(folder) == []


@pytest.mark.parametrize("name", NOT_EMPTY)
def test_a_flip_of_any_byte_is_found(folder, name):
    file = folder / name
    intact = file.read_bytes()
    for place in range(len(intact)):
        flipped = bytearray(intact)
        flipped[place] ^= 1 << place % 8
        file.write_bytes(flipped)
        assert is_refused(folder), place
    assert is_found(folder)
    file.write_bytes(intact)
    assert not is_refused(folder)


@pytest.mark.parametrize("name", NOT_EMPTY)
def test_a_truncation_anywhere_is_found(folder, name):
    intact = (folder / name).read_bytes()
    for length in range(0, len(intact), 7):
        (folder / name).write_bytes(intact[:length])
        assert is_refused(folder), length


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("tail", [b"\0", b"\n", b" ", b"{}"])
def test_an_extension_is_found(folder, name, tail):
    with (folder / name).open("ab") as file:
        file.write(tail)
    assert is_found(folder)


@pytest.mark.parametrize("name", NOT_EMPTY)
def test_a_file_of_zeros_of_the_right_size_is_found(folder, name):
    (folder / name).write_bytes(bytes((folder / name).stat().st_size))
    assert is_found(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_deleted_file_is_found(folder, name):
    (folder / name).unlink()
    assert is_found(folder)


@pytest.mark.parametrize("name", NOT_EMPTY)
def test_a_file_from_another_checkpoint_is_found(folder, name):
    shutil.copy(folder.with_name("checkpoint-1") / name, folder / name)
    if name != "manifest.json":
        assert is_found(folder)
    with pytest.raises(CorruptCheckpointError):
        Catalog(disk(folder)).open(2).check_rest()


@pytest.mark.parametrize("name", FILES)
def test_a_link_in_place_of_a_file_is_refused(folder, name):
    elsewhere = shutil.move(folder / name, folder.parent / "elsewhere")
    (folder / name).symlink_to(elsewhere)
    assert is_found(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_named_pipe_in_place_of_a_file_does_not_hang(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert is_found(folder)


def test_a_folder_in_place_of_a_file_is_found(folder):
    (folder / "state.json").unlink()
    (folder / "state.json").mkdir()
    assert is_found(folder)


def test_an_unknown_file_is_told_but_harms_no_reading(folder):
    (folder / "notes.txt").write_text("mine")
    assert damage_of(folder) == [("notes.txt", "stray", None)]
    assert not is_refused(folder)


def test_a_pin_is_not_an_unknown_file(folder):
    (folder / "pinned").touch()
    assert damage_of(folder) == []


def test_verify_lists_all_damage_and_not_only_the_first(folder):
    (folder / "state.json").unlink()
    model = bytearray((folder / "model.safetensors").read_bytes())
    model[20] ^= 1
    model[-1] ^= 1
    (folder / "model.safetensors").write_bytes(model)
    reader_of_damaged = open_before(folder, "state.json")
    assert [(d.file, d.kind, d.path) for d in reader_of_damaged] == [
        ("model.safetensors", "digest", None),
        ("model.safetensors", "digest", "model.mask"),
        ("state.json", "missing", None),
    ]


def open_before(folder, name) -> list[Damage]:
    """Open while the file is there, take it away, and verify."""
    (folder / name).write_bytes(b'{"of":"state at 2"}')
    reader = CheckpointReader(disk(folder), folder.name)
    (folder / name).unlink()
    return reader.verify()


def test_the_error_names_the_tensor_and_both_digests(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    reader = CheckpointReader(disk(folder), folder.name)
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint-2: model\.mask: is damaged") as e:
        read_leaf(reader, "model.mask")
    assert e.value.expected == f"digest {reader.manifest.tensors['model.mask'].digest}"
    assert e.value.found.startswith("digest ")


def test_a_file_that_shrinks_under_a_reader_is_an_error_and_not_a_crash(folder):
    """Reading through a memory map would end the process with SIGBUS here."""
    reader = CheckpointReader(disk(folder), folder.name)
    os.truncate(folder / "model.safetensors", 0)
    with pytest.raises(CorruptCheckpointError, match="ends too early"):
        read_leaf(reader, "model.embed.weight")


def test_every_way_of_reading_gives_what_was_saved(folder):
    reader = CheckpointReader(disk(folder), folder.name)
    assert read_state(reader) == state_of("state at 2")
    reader.check_rest()


def test_check_rest_reads_only_what_nobody_has_read(folder):
    reader = CheckpointReader(disk(folder), folder.name)
    read_leaf(reader, "optimizer.step")
    damage_bytes_of(reader, folder, "optimizer.step")
    reader.check_rest()  # that tensor was checked when it was read
    with pytest.raises(CorruptCheckpointError, match=r"optimizer\.step"):
        CheckpointReader(disk(folder), folder.name).check_rest()


def damage_bytes_of(reader, folder, path) -> None:
    shard = reader.manifest.tensors[path].shards[0]
    file = next(file for file in reader.manifest.files if file.name == shard.file)
    region = file.regions[shard.number]
    with (folder / shard.file).open("r+b") as file:
        file.seek(region.offset)
        file.write(bytes(region.nbytes))


def test_a_buffer_of_another_length_is_refused(folder):
    reader = CheckpointReader(disk(folder), folder.name)
    with pytest.raises(StateMismatchError, match="expected 8 bytes"):
        reader.read_leaf_into("optimizer.step", memoryview(bytearray(9)))


def test_an_unknown_path_or_file_is_not_found(folder):
    reader = CheckpointReader(disk(folder), folder.name)
    for read in (lambda: read_into_nothing(reader), lambda: reader.read_file("missing")):
        with pytest.raises(CheckpointNotFoundError):
            read()


def read_into_nothing(reader) -> None:
    reader.read_leaf_into("missing", memoryview(bytearray(1)))


def test_reading_takes_no_memory_that_grows_with_the_tensor(tmp_path):
    big = PlainLeaf("p", "f.safetensors", "n", "U8", (32 << 20,), bytes(32 << 20), 1 << 20)
    with CheckpointWriter(LocalStorage(tmp_path), step=1, run_id="r") as writer:
        writer.write_leaves([big])
        writer.commit({})
    buffer = memoryview(bytearray(32 << 20))
    tracemalloc.start()
    reader = CheckpointReader(LocalStorage(tmp_path), "checkpoint-1")
    reader.read_leaf_into("p", buffer)
    reader.verify()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 << 20
