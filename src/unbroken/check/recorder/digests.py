"""Digests of tensors: XXH3 with 64 bits over their memory, without a copy where it is possible.

Source: Yann Collet, XXH3, https://github.com/Cyan4973/xxHash
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SAMPLE_FROM = 256 * 1024
BLOCKS = 8
BLOCK = 4096


def _find_hash() -> tuple[str, Callable[[Any], bytes]]:
    try:
        import xxhash
    except ImportError:  # the script's interpreter need not have it; this one is slower

        def blake(data: Any) -> bytes:
            return hashlib.blake2b(data, digest_size=8).digest()

        return "blake2b", blake
    return "xxh3", xxhash.xxh3_64_digest


HASH_NAME, hash_of = _find_hash()


def digest_of(data: Any) -> str:
    """Return the digest of bytes, in hexadecimal.

    Example:
        >>> digest_of(b"") == hash_of(b"").hex()
        True
    """
    return hash_of(data).hex()


@dataclass(frozen=True)
class GroupDigest:
    """The digest of some tensors together, and a short one for each of them.

    Attributes:
        whole: 16 hexadecimal digits.
        each: 8 hexadecimal digits for each tensor, in order, in one text.
    """

    whole: str
    each: str


class TensorDigester:
    """Turns tensors into digests.

    Args:
        sampled: Read of each tensor of more than 256 KiB only 8 blocks of 4 KiB, evenly spread,
            the same ones each time; of smaller ones every byte.

    Example:
        >>> whole = TensorDigester(sampled=False)
        >>> whole.of(torch.zeros(3)) == whole.of(torch.tensor([0.0, 0.0, -0.0]))
        False
    """

    def __init__(self, *, sampled: bool) -> None:
        self.sampled = sampled

    def of(self, tensor: Tensor) -> bytes:
        """Return the digest of a tensor's elements in logical order, as 8 bytes."""
        if not (type(tensor) in _PLAIN and tensor.layout == torch.strided and tensor.is_cpu):
            return self._of_unusual(tensor)
        if self.sampled and tensor.nbytes > SAMPLE_FROM and tensor.is_contiguous():
            return _hash_sample(tensor)
        return _hash_memory(tensor)

    def _of_unusual(self, tensor: Tensor) -> bytes:
        """Return the digest of a tensor that is not simply memory of this process."""
        here = _local(tensor)
        if here.is_sparse:
            here = here.coalesce()
            return hash_of(self.of(here.indices()) + self.of(here.values()))
        if here.device.type == "meta":
            return hash_of(str(tuple(here.shape)).encode())
        if self.sampled and here.nbytes > SAMPLE_FROM:
            here = _sample(here)
        return _hash_memory(here.cpu())

    def of_all(self, tensors: Iterable[Tensor | None]) -> GroupDigest:
        """Return the digest of tensors in their order; None has a digest of its own."""
        each = [_ABSENT if tensor is None else self.of(tensor) for tensor in tensors]
        return GroupDigest(digest_of(b"".join(each)), "".join(one[:4].hex() for one in each))


_ABSENT = b"absent.."
_PLAIN = (Tensor, nn.Parameter)


def _local(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor: of a DTensor its shard."""
    here = tensor.detach()
    if hasattr(here, "to_local"):
        here = here.to_local()
    return here


def _sample(tensor: Tensor) -> Tensor:
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    stride = (raw.numel() - BLOCK) // (BLOCKS - 1)
    return torch.cat((raw.as_strided((BLOCKS - 1, BLOCK), (stride, 1)).flatten(), raw[-BLOCK:]))


def _hash_sample(tensor: Tensor) -> bytes:
    """Return the digest of the blocks, read where they lie."""
    address, stride = tensor.data_ptr(), (tensor.nbytes - BLOCK) // (BLOCKS - 1)
    places = [address + number * stride for number in range(BLOCKS - 1)]
    places.append(address + tensor.nbytes - BLOCK)
    return hash_of(b"".join([hash_of(_BLOCK.from_address(place)) for place in places]))


_BLOCK = ctypes.c_char * BLOCK


def _hash_memory(tensor: Tensor) -> bytes:
    if tensor.is_complex():
        tensor = tensor.resolve_conj()
    here = tensor.contiguous()
    nbytes = here.nbytes
    if nbytes == 0:
        return hash_of(b"")
    return hash_of((ctypes.c_char * nbytes).from_address(here.data_ptr()))
