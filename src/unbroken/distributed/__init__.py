"""The ranks of a run: how they exchange values, and how one rank's error reaches all."""

from __future__ import annotations

from unbroken.distributed.collectives import ByteStream as ByteStream
from unbroken.distributed.collectives import RankSums as RankSums
from unbroken.distributed.collectives import Tree as Tree
from unbroken.distributed.dtensors import divide as divide
from unbroken.distributed.group import Group as Group
from unbroken.distributed.group import SingleProcess as SingleProcess
from unbroken.distributed.group import join as join
from unbroken.distributed.store_group import StoreGroup as StoreGroup
from unbroken.distributed.store_group import disagreement as disagreement
from unbroken.distributed.store_group import name_ranks as name_ranks

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
