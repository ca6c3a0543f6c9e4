"""Digests of records: what a data set gives, as a number that can be compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash

from unbroken.data import Permutation, derive_key
from unbroken.fingerprint.introspection import attributes_of, safe_call, safe_getattr

_DEPTH = 8
_WHOLE = 1 << 20  # bytes of an array that are all read
_SAMPLE = 4096
_KEY = derive_key(0, "fingerprint")


def record_digest(record: object) -> str:
    """Return a digest of a record: equal for equal bytes, types and shapes.

    Tensors and arrays count by their bytes; texts, bytes and numbers by their value; mappings,
    sequences, sets and objects with attributes or slots by their parts. Of anything else its
    class counts.

    Returns:
        16 hexadecimal digits (xxh3-64).

    Example:
        >>> record_digest({"x": [1, 2]}) == record_digest({"x": [1, 2]})
        True
        >>> record_digest(1) == record_digest(1.0)
        False
    """
    digest = xxhash.xxh3_64()
    _update(digest, record, frozenset())
    return digest.hexdigest()


def array_digest(array: torch.Tensor | np.ndarray) -> str:
    """Return dtype, shape and digest of an array; of one above 1 MiB a sample counts.

    Example:
        >>> array_digest(torch.zeros(2)).partition(":")[0]
        'torch.float32[2]'
    """
    size = array.nbytes if isinstance(array, np.ndarray) else array.numel() * array.element_size()
    name = f"{array.dtype}{[*array.shape]}"
    if size > _WHOLE and getattr(array, "layout", torch.strided) is torch.strided:
        flat: Any = array.reshape(-1)
        at = [*_some_places(len(flat))]
        array = flat[torch.tensor(at)] if isinstance(array, torch.Tensor) else flat[at]
    return f"{name}: {record_digest(array)}"


def some_of(parts: Iterable[Any], length: int) -> list[Any]:
    """Return all of a few parts, of many those at places of a fixed key."""
    if length <= _SAMPLE:
        return list(parts)
    if isinstance(parts, list | tuple):
        return [parts[place] for place in _some_places(length)]
    return list(itertools.islice(parts, _SAMPLE))


def _some_places(length: int) -> list[int]:
    places = Permutation(length, _KEY)(np.arange(min(length, _SAMPLE), dtype=np.uint64))
    return [int(place) for place in places]


def _update(digest: Any, value: object, path: frozenset[int]) -> None:
    digest.update(f"{type(value).__name__}:".encode())
    if isinstance(value, torch.Tensor):
        _update_tensor(digest, value)
    elif isinstance(value, np.ndarray | np.generic):
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes() if value.dtype != object else b"")
    elif isinstance(value, bytes | bytearray | memoryview):
        digest.update(value)
    elif value is None or isinstance(value, str | bool | int | float | complex):
        digest.update(repr(value).encode())
    elif len(path) < _DEPTH and id(value) not in path:  # an object may hold itself
        _update_parts(digest, value, path | {id(value)})


def _update_tensor(digest: Any, tensor: torch.Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}{tensor.layout}".encode())
    if tensor.is_meta:
        return
    for part in _strided(tensor.detach()):
        flat = part.cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)


def _strided(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the arrays that a tensor consists of."""
    if tensor.is_quantized:
        return [tensor.int_repr()]
    if tensor.layout is torch.strided:
        return [tensor.resolve_conj().resolve_neg()]
    if tensor.layout is not torch.sparse_coo:
        tensor = tensor.to_sparse_coo()  # type: ignore[no-untyped-call]
    whole = tensor.coalesce()
    return [whole.indices(), whole.values()]


def _update_parts(digest: Any, value: Any, path: frozenset[int]) -> None:
    if isinstance(value, Mapping):
        parts: list[object] = [part for item in value.items() for part in item]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, set | frozenset):
        parts = [*sorted(record_digest(part) for part in value)]
    elif isinstance(whole := safe_call(value, "tobytes"), bytes):  # a PIL image
        parts = [whole]
    else:
        named = attributes_of(value)
        parts = [part for name in sorted(named) for part in (name, named[name])]
    digest.update(f"{len(parts)};".encode())
    for part in parts:
        _update(digest, part, path)


# What a tokenizer makes of a text, as a digest.


_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map")


def is_tokenizer(thing: object) -> bool:
    """Return whether an object is a tokenizer of Hugging Face, or one with a vocabulary."""
    return callable(safe_getattr(thing, "get_vocab")) and callable(safe_getattr(thing, "encode"))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, rules, special tokens and sides of a tokenizer.

    How it truncated and padded last does not count: each call sets that anew.
    """
    settings = [(name, str(safe_getattr(tokenizer, name))) for name in _SETTINGS]
    text = f"{settings}{_rules(tokenizer)}"
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _rules(tokenizer: Any) -> str:
    backend = safe_getattr(tokenizer, "backend_tokenizer") or tokenizer
    text = safe_call(backend, "to_str")
    if isinstance(text, str):
        head, found, tail = text.partition('"added_tokens":')  # truncation and padding are first
        return tail if found else head
    vocabulary = safe_call(tokenizer, "get_vocab")
    return repr(sorted(vocabulary.items())) if isinstance(vocabulary, dict) else ""
