"""Dividing the verification of one checkpoint among several readers of the same files."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from unbroken.store.layout import rank_of
from unbroken.store.manifest import Manifest

_WORTH_IT = 64 << 10  # bytes; what is smaller costs nothing, and may be more than numbers

Regions = frozenset[tuple[str, int]]
"""Regions by the name of their file and their number in it."""


def divided(manifest: Manifest, ranks: Sequence[int]) -> list[Regions]:
    """Return the large tensors of all files in parts of about equally many bytes.

    What a rank stored in a file of its own it gets, if it is there: it most likely needs it.

    What is smaller than 64 KiB, or no tensor, is in no part: every reader verifies it. A
    tensor has one digest and is never cut: a part may be larger by the largest one. All who have
    the manifest get the same parts.

    Source: the largest first, each to the part with the least so far: R. L. Graham, Bounds on
    Multiprocessing Timing Anomalies, 1969, doi.org/10.1137/0117039.

    Args:
        manifest: What the checkpoint consists of.
        ranks: The ranks that read.

    Example:
        >>> from unbroken.store import FileEntry, Region
        >>> sizes = enumerate((500_000, 900_000, 400_000, 8))
        >>> regions = tuple(Region(0, nbytes, "0" * 32, str(at)) for at, nbytes in sizes)
        >>> entry = FileEntry("a.safetensors", 1_800_008, regions)
        >>> manifest = Manifest(1, "a" * 32, "2026-01-31T12:00:00.000+00:00", (entry,), {})
        >>> [sorted(number for _, number in part) for part in divided(manifest, [0, 1])]
        [[1], [0, 2]]
    """
    regions = [
        (region.nbytes, file.name, number)
        for file in manifest.files
        for number, region in enumerate(file.regions)
        if region.path is not None and region.nbytes >= _WORTH_IT
    ]
    taken: list[set[tuple[str, int]]] = [set() for _ in ranks]
    sizes = [0 for _ in ranks]
    rest = []
    for nbytes, name, number in sorted(regions, reverse=True):
        rank = rank_of(name)
        if rank in ranks:
            taken[ranks.index(rank)].add((name, number))
            sizes[ranks.index(rank)] += nbytes
        else:
            rest.append((nbytes, name, number))
    least = [(size, part) for part, size in enumerate(sizes)]
    heapq.heapify(least)
    for nbytes, name, number in rest:
        so_far, part = heapq.heappop(least)
        taken[part].add((name, number))
        heapq.heappush(least, (so_far + nbytes, part))
    return [frozenset(part) for part in taken]
