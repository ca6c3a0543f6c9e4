"""The ranks of a run: what they tell each other, and how one rank's trouble reaches all."""

from __future__ import annotations

from unbroken.distributed.alone import Alone as Alone
from unbroken.distributed.disagreement import disagreement as disagreement
from unbroken.distributed.disagreement import name_ranks as name_ranks
from unbroken.distributed.group import Group as Group
from unbroken.distributed.joining import join as join
from unbroken.distributed.planning import divide as divide
from unbroken.distributed.ranks import Ranks as Ranks
from unbroken.distributed.sums import RankSums as RankSums
from unbroken.distributed.tensors import ByteStream as ByteStream
from unbroken.distributed.tree import Tree as Tree

__all__ = [
    "Alone",
    "ByteStream",
    "Group",
    "RankSums",
    "Ranks",
    "Tree",
    "disagreement",
    "divide",
    "join",
    "name_ranks",
]
