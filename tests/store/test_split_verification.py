"""Several readers of one checkpoint divide its verification: nothing is left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from store.small_runs import PlainLeaf, noise
from unbroken.errors import CorruptCheckpointError
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, CheckpointWriter, split_verification

SIZES = [70_000, 300_000, 65_536, 131_072, 90_000, 65_535, 16]


def leaf(place: int) -> PlainLeaf:
    size, file = SIZES[place], f"{place % 2}.safetensors"
    data = noise(str(place), size)
    return PlainLeaf(f"{place}.weight", file, f"{place}", "U8", (size,), data, size)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of tensors of many sizes in two files."""
    with CheckpointWriter(LocalStorage(tmp_path), step=1, run_id="a" * 32) as writer:
        writer.write_leaves(leaf(place) for place in range(len(SIZES)))
        writer.write_file("state.json", b"{}" * 50_000)
        writer.commit({})
    return tmp_path / "checkpoint-1"


def reader(folder, part: int, parts: int) -> CheckpointReader:
    made = CheckpointReader(LocalStorage(folder.parent, create=False), folder.name)
    division = split_verification(made.manifest, range(parts))
    made.leave_to_others(frozenset().union(*division) - division[part])
    return made


def nbytes(manifest, part) -> int:
    regions = {
        (file.name, n): region.nbytes
        for file in manifest.files
        for n, region in enumerate(file.regions)
    }
    return sum(regions[one] for one in part)


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_each_large_tensor_is_in_one_part(folder, parts):
    manifest = reader(folder, 0, 1).manifest
    division = split_verification(manifest, range(parts))
    all_of_them = [one for part in division for one in part]
    assert len(set(all_of_them)) == len(all_of_them) == len([s for s in SIZES if s >= 65_536])


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_differ_by_one_tensor_at_most(folder, parts):
    manifest = reader(folder, 0, 1).manifest
    weights = [nbytes(manifest, part) for part in split_verification(manifest, range(parts))]
    assert max(weights) - min(weights) <= max(SIZES)


def test_a_rank_gets_what_it_stored_in_a_file_of_its_own(tmp_path):
    with CheckpointWriter(LocalStorage(tmp_path), step=1, run_id="a" * 32) as writer:
        writer.write_leaves(
            replace(leaf(place), file=f"a.rank{place % 3}.safetensors") for place in range(6)
        )
        manifest = writer.commit({})
    parts = split_verification(manifest, [2, 1])
    assert {name for name, _ in parts[1]} >= {"a.rank1.safetensors"}
    assert "a.rank1.safetensors" not in {name for name, _ in parts[0]}


def finders(folder, parts: int) -> list[int]:
    """Return which of the readers find damage."""
    found = []
    for part in range(parts):
        try:
            reader(folder, part, parts).check_rest()
        except CorruptCheckpointError:
            found.append(part)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_damage_is_found_by_the_reader_whose_part_it_is_and_small_parts_by_all(folder, size):
    place = SIZES.index(size)
    manifest = reader(folder, 0, 1).manifest
    (shard,) = manifest.tensors[f"{place}.weight"].shards
    (file,) = (file for file in manifest.files if file.name == shard.file)
    raw = bytearray((folder / file.name).read_bytes())
    raw[file.regions[shard.number].offset + size // 2] ^= 1
    (folder / file.name).write_bytes(raw)
    assert len(finders(folder, 3)) == (1 if size >= 65_536 else 3)


def test_a_whole_file_is_verified_by_all(folder):
    (folder / "state.json").write_bytes(b"[]" + b"{}" * 49_999)
    assert finders(folder, 3) == [0, 1, 2]


def test_a_tensor_that_is_left_to_others_is_read_as_it_is(folder):
    path = "1.weight"
    buffers = []
    for part in (0, 1):
        buffers.append(bytearray(300_000))
        reader(folder, part, 2).read_leaf_into(path, memoryview(buffers[-1]))
    assert buffers[0] == buffers[1] == leaf(1).data
