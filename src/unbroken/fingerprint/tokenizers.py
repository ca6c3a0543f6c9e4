"""What a tokenizer makes of a text, as a digest."""

from __future__ import annotations

from typing import Any

import xxhash

from unbroken.fingerprint.asking import answer, asked

_SETTINGS = ("padding_side", "truncation_side", "model_max_length", "special_tokens_map")


def is_tokenizer(thing: object) -> bool:
    """Return whether an object is a tokenizer of Hugging Face, or one with a vocabulary."""
    return callable(asked(thing, "get_vocab")) and callable(asked(thing, "encode"))


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of the vocabulary, rules, special tokens and sides of a tokenizer.

    How it truncated and padded last does not count: each call sets that anew.
    """
    settings = [(name, str(asked(tokenizer, name))) for name in _SETTINGS]
    text = f"{settings}{_rules(tokenizer)}"
    return xxhash.xxh3_128(text.encode()).hexdigest()


def _rules(tokenizer: Any) -> str:
    backend = asked(tokenizer, "backend_tokenizer") or tokenizer
    text = answer(backend, "to_str")
    if isinstance(text, str):
        head, found, tail = text.partition('"added_tokens":')  # truncation and padding are first
        return tail if found else head
    vocabulary = answer(tokenizer, "get_vocab")
    return repr(sorted(vocabulary.items())) if isinstance(vocabulary, dict) else ""
