"""The ranks of a run: what they tell each other, and how one rank's trouble reaches all."""

from __future__ import annotations

from unbroken.distributed.alone import Alone as Alone
from unbroken.distributed.group import Group as Group
from unbroken.distributed.joining import join as join
from unbroken.distributed.ranks import Ranks as Ranks
from unbroken.distributed.tensors import ByteStream as ByteStream
from unbroken.distributed.tensors import gather_tensors as gather_tensors

__all__ = ["Alone", "ByteStream", "Group", "Ranks", "gather_tensors", "join"]
