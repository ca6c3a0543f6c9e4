"""Digests of tensors: XXH3 with 64 bits over their memory, without a copy where it is possible.

Source: Yann Collet, XXH3, https://github.com/Cyan4973/xxHash
"""

from __future__ import annotations

import ctypes
import hashlib
import random
import sys
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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


def sample_of(tensor: Tensor) -> Tensor:
    """Return what a sampling digest reads of a tensor, on its device; a small one is whole."""
    here = _local(tensor)
    return _sample(here) if here.nbytes > SAMPLE_FROM else here


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


# Digests of batches: of the whole, and of each sample in it.


MAX_ROWS = 256
_MAX_DEPTH = 6
_ROW_DIGITS = 12
_NO_MEMORY = ("FakeTensor", "FunctionalTensor")


def batch_digest(batch: Any, digester: TensorDigester) -> list[Any] | None:
    """Return the digest of a batch and those of its samples; None if it holds no data.

    Data are tensors that are no parameters and that no operation with gradients has made, numpy
    arrays, numbers and text, in any nesting of mappings, sequences and dataclasses. The
    samples are the rows of the tensors that are as long as the first one; of more than 256 rows
    none is told apart.
    """
    parts = list(_parts(batch, 0))
    tensors = [part for part in parts if isinstance(part, Tensor)]
    rest = repr([part for part in parts if not isinstance(part, Tensor)]).encode()
    if not tensors and not any(not isinstance(part, Tensor) for part in parts):
        return None
    pieces = [digester.of(tensor) + str(tuple(tensor.shape)).encode() for tensor in tensors]
    return [digest_of(b"".join(pieces) + rest), _rows(tensors, digester)]


def _parts(value: Any, depth: int) -> Iterator[Any]:
    if isinstance(value, Tensor):
        if _is_data(value):
            yield value
    elif isinstance(value, (str, bytes, int, float)):
        yield value
    elif _is_array(value):
        yield torch.from_numpy(value.copy())
    elif depth < _MAX_DEPTH:
        for inner in _inner(value):
            yield from _parts(inner, depth + 1)


def _inner(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        return iter(value.values())
    if isinstance(value, (list, tuple)):
        return iter(value)
    return iter(vars(value).values()) if is_dataclass(type(value)) else iter(())


def _is_data(tensor: Tensor) -> bool:
    if type(tensor).__name__ in _NO_MEMORY or torch._C._functorch.is_functorch_wrapped_tensor(  # noqa: SLF001
        tensor
    ):
        return False
    return tensor.grad_fn is None and not isinstance(tensor, nn.Parameter)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf"


def _rows(tensors: list[Tensor], digester: TensorDigester) -> list[str]:
    tall = [tensor for tensor in tensors if tensor.dim() > 0]
    count = len(tall[0]) if tall else 0
    if not 0 < count <= MAX_ROWS:
        return []
    same = [tensor for tensor in tall if len(tensor) == count]
    per_tensor = [[digester.of(row) for row in tensor] for tensor in same]
    return [hash_of(b"".join(row)).hex()[:_ROW_DIGITS] for row in zip(*per_tensor, strict=True)]


# Digests of the global random generators. Looking at a generator does not draw from it.


def generator_digests(names: Collection[str] | None = None) -> dict[str, str]:
    """Return a digest for each global generator that this process has.

    Args:
        names: Some of "python", "torch" (with those of all CUDA devices) and "numpy"; None: all.

    Example:
        >>> before = generator_digests()
        >>> before == generator_digests()
        True
        >>> _ = torch.rand(1)
        >>> sorted(name for name, digest in generator_digests().items() if digest != before[name])
        ['torch']
    """
    asked = ("python", "torch", "numpy") if names is None else names
    digests = {}
    if "python" in asked:
        digests["python"] = _python()
    if "numpy" in asked and "numpy.random" in sys.modules:
        digests["numpy"] = _numpy()
    if "torch" in asked:
        digests["torch"] = digest_of(torch.get_rng_state().numpy().data)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            for index in range(torch.cuda.device_count()):
                state = torch.cuda.get_rng_state(index)
                digests[f"cuda:{index}"] = digest_of(state.numpy().data)
    return digests


def _python() -> str:
    version, words, next_gauss = random.getstate()
    return digest_of(array("Q", words).tobytes() + f"{version} {next_gauss}".encode())


def _numpy() -> str:
    import numpy as np

    state: Any = np.random.get_state(legacy=True)
    kind, key, position, has_gauss, gauss = state
    return digest_of(key.tobytes() + f"{kind} {position} {has_gauss} {gauss}".encode())


# What an optimizer holds: parameters, gradients, moments, step counts, settings.


_COUNT = "step"


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters, in the order of the groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor | None]:
    """Return the gradient of each parameter, None where there is none."""
    return [parameter.grad for parameter in parameters_of(optimizer)]


def learning_rates_of(optimizer: Optimizer) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group.get("lr", 0.0)) for group in optimizer.param_groups]


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the other settings of each group that are plain values (weight decay, betas, ...)."""
    left_out = ("params", "lr", "initial_lr", "param_names")
    return [
        {name: _plain(value) for name, value in group.items() if name not in left_out}
        for group in optimizer.param_groups
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)


def moments_digest(optimizer: Optimizer, digester: TensorDigester) -> GroupDigest:
    """Return the digest of all tensors of the state but the step counts."""
    return digester.of_all(_moments(optimizer))


def has_moments(optimizer: Optimizer) -> bool:
    """Return whether any tensor of the state but the step counts has an element that is not 0."""
    return any(bool(moment.any()) for moment in _moments(optimizer))


def counts_digest(optimizer: Optimizer) -> str:
    """Return the digest of the step counts and of all other numbers of the state."""
    numbers: list[tuple[str, bool | float | str]] = []
    for state in _states(optimizer):
        for name in sorted(state, key=str):
            value = state[name]
            if isinstance(value, Tensor) and name == _COUNT:
                numbers.append((name, float(value)))
            elif isinstance(value, (bool, int, float, str)):
                numbers.append((name, float(value) if name == _COUNT else value))
    return digest_of(repr(numbers).encode())


def _moments(optimizer: Optimizer) -> Iterator[Tensor]:
    for state in _states(optimizer):
        for name in sorted(state, key=str):
            if isinstance(state[name], Tensor) and name != _COUNT:
                yield state[name]


def _states(optimizer: Optimizer) -> Iterator[dict[Any, Any]]:
    for parameter in parameters_of(optimizer):
        yield optimizer.state.get(parameter, {})  # get: reading a missing one would make it
