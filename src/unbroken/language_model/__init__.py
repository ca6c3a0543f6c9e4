"""Training of language models on text files: the texts, their tokens, the model, the command.

A product of its own beside the core, which never imports it.
"""

from __future__ import annotations

from unbroken.language_model.corpus import TokenDataset as TokenDataset
from unbroken.language_model.corpus import builtin_text as builtin_text
from unbroken.language_model.tokenizer import BpeTokenizer as BpeTokenizer
from unbroken.language_model.tokenizer import ByteTokenizer as ByteTokenizer
from unbroken.language_model.tokenizer import Tokenizer as Tokenizer
from unbroken.language_model.tokenizer import gpt2_tokenizer as gpt2_tokenizer
from unbroken.language_model.tokenizer import learned_bpe as learned_bpe

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "TokenDataset",
    "Tokenizer",
    "builtin_text",
    "gpt2_tokenizer",
    "learned_bpe",
]
