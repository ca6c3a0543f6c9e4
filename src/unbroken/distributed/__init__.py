"""The ranks of a run: how they exchange values, and how one rank's error reaches all."""

from __future__ import annotations

from unbroken.distributed.all_reduce import RankSums as RankSums
from unbroken.distributed.all_reduce import Tree as Tree
from unbroken.distributed.broadcast import ByteStream as ByteStream
from unbroken.distributed.group import Group as Group
from unbroken.distributed.group import SingleProcess as SingleProcess
from unbroken.distributed.save_plan import divide as divide
from unbroken.distributed.store_group import StoreGroup as StoreGroup
from unbroken.distributed.store_group import disagreement as disagreement
from unbroken.distributed.store_group import name_ranks as name_ranks
from unbroken.distributed.torchrun import join as join

__all__ = [
    "ByteStream",
    "Group",
    "RankSums",
    "SingleProcess",
    "StoreGroup",
    "Tree",
    "disagreement",
    "divide",
    "join",
    "name_ranks",
]
