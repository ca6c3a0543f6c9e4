"""The model of the benchmarks: GPT-2 with 124 million parameters, or a tiny one."""

from __future__ import annotations

TINY = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 128}


def gpt2(*, quick: bool = False):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(**(TINY if quick else {}), bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)
