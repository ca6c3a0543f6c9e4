"""Leaves whose bytes lie copied in one memory: the files are the same as without the copy."""

from __future__ import annotations

from dataclasses import replace

import pytest

from store.small_runs import PlainLeaf, noise
from unbroken.storage import MemoryStorage
from unbroken.store.checkpoint.writer import plan_files, write_plan
from unbroken.store.format.canonical_json import digest_of
from unbroken.store.format.safetensors_file import Copied

SIZES = (5000, 4096, 1, 0, 70_000)


def leaves() -> list[PlainLeaf]:
    names = [f"w{number}" for number in range(len(SIZES))]
    data = [noise(name, size) for name, size in zip(names, SIZES, strict=True)]
    shapes = [(size,) for size in SIZES]
    rows = zip(names, shapes, data, strict=True)
    return [PlainLeaf(f"m.{name}", "f", name, "U8", shape, data) for name, shape, data in rows]


def copied(leaves, gap) -> list[PlainLeaf]:
    """Return the leaves with copies that lie in the order of the file, so far from each other."""
    ordered = plan_files(leaves)[0].leaves
    memory, end, copies = memoryview(bytearray(100_000)), 0, {}
    for leaf in ordered:
        memory[end : end + leaf.nbytes] = leaf.data
        copies[leaf.path] = Copied(memory, end, digest_of(leaf.data))
        end += leaf.nbytes + gap
    return [replace(leaf, copied=copies[leaf.path], data=bytes(leaf.nbytes)) for leaf in leaves]


def written(leaves):
    storage = MemoryStorage()
    storage.make_folder("s")
    entry = write_plan(storage, "s", plan_files(leaves)[0])
    content = bytearray(entry.nbytes)
    with storage.open("s/f") as file:
        file.read_into(0, memoryview(content))
    return entry, bytes(content)


@pytest.mark.parametrize("gap", [0, 7])
def test_copies_make_the_same_file_as_the_leaves(gap):
    assert written(copied(leaves(), gap)) == written(leaves())


def test_copies_and_leaves_without_one_may_take_turns():
    mixed = [
        a if n % 2 else b
        for n, (a, b) in enumerate(zip(copied(leaves(), 0), leaves(), strict=True))
    ]
    assert written(mixed) == written(leaves())


def test_copies_in_several_memories_make_the_same_file():
    one, other = copied(leaves(), 0), copied(leaves(), 0)
    assert written([*one[:2], *other[2:]]) == written(leaves())


def test_copies_that_adjoin_are_written_at_once():
    storage = CountsWrites()
    storage.make_folder("s")
    write_plan(storage, "s", plan_files(copied(leaves(), 0))[0])
    assert [one for one in storage.lengths if one][1:] == [sum(SIZES)]  # after the header


class CountsWrites(MemoryStorage):
    def __init__(self) -> None:
        super().__init__()
        self.lengths = []

    def create(self, path, nbytes=0):
        file = super().create(path, nbytes)
        write = file.write
        file.write = lambda data: [self.lengths.append(len(data)), write(data)]
        return file
