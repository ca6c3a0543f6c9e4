"""The text of the examples: a play that is installed with unbroken, and a tokenizer for it."""

from __future__ import annotations

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from unbroken.language_model import builtin_text


def learned_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn byte-level merges, as GPT-2 has them, from the text itself."""
    learned = ByteLevelBPETokenizer()
    words = ["<|endoftext|>", "<pad>", "<mask>"]
    learned.train([str(builtin_text())], vocab_size, special_tokens=words, show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=learned._tokenizer,  # noqa: SLF001 (what transformers wraps)
        bos_token=words[0],
        eos_token=words[0],
        pad_token=words[1],
        mask_token=words[2],
    )


def blocks_of(tokenizer: PreTrainedTokenizerFast, length: int) -> list[dict[str, list[int]]]:
    """Return the text as blocks of tokens, each its own label."""
    ids = tokenizer(builtin_text().read_text(encoding="utf-8"), verbose=False)["input_ids"]
    blocks = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return [{"input_ids": block, "labels": block} for block in blocks]
