"""What the demo trains, and when it kills."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

Kind = Literal["starting", "training", "saving"]


@dataclass(frozen=True)
class Moment:
    """When one kill is to come.

    Attributes:
        kind: "starting": after `fraction` of the time that a start takes; "training": after
            `step` was logged and `fraction` of a step more; "saving": inside the first save
            that begins after `step` was logged.
        step: The step to wait for.
        fraction: A random number from 0 to 1.
    """

    kind: Kind
    step: int
    fraction: float


def plan_kills(*, kills: int, steps: int, seed: int) -> list[Moment]:
    """Return random moments: one inside a save; of three or more, one while starting.

    Example:
        >>> [moment.kind for moment in plan_kills(kills=1, steps=60, seed=5)]
        ['saving']
        >>> sorted(moment.kind for moment in plan_kills(kills=4, steps=60, seed=5))
        ['saving', 'starting', 'training', 'training']
    """
    draw = random.Random(seed)  # noqa: S311 (no secret)
    kinds: list[Kind] = ["saving"]
    if kills >= 3:
        kinds.append("starting")
    kinds += ["training"] * (kills - len(kinds))
    draw.shuffle(kinds)
    # Not at the end: a kill inside a save may need several saves until it wins the race.
    targets = sorted(draw.choices(range(1, steps - 2 * save_steps_for(steps)), k=kills))
    return [Moment(kind, step, draw.random()) for kind, step in zip(kinds, targets, strict=True)]


def save_steps_for(steps: int) -> int:
    """Return how often the demo saves: a handful of times, and not at the end of an epoch."""
    return max(2, steps // 9)


def config_text(*, steps: int) -> str:
    """Return the YAML file of the demo's run.

    Example:
        >>> "max_steps: 60" in config_text(steps=60)
        True
    """
    return f"""\
# A small GPT-2 on real text, with everything that makes resuming hard:
# dropout, shuffling, gradient accumulation, worker processes, a schedule, clipping, evaluation.
max_steps: {steps}
batch_size: 16
micro_batch_size: 8
dataloader_num_workers: 2
learning_rate: 2e-3
lr_scheduler_type: cosine
warmup_steps: {max(1, steps // 10)}
weight_decay: 0.1
max_grad_norm: 1.0
eval_steps: {max(2, steps // 4)}
save_steps: {save_steps_for(steps)}
logging_steps: 1
log_data_digest: true
seed: 42
model:
  model_type: gpt2
  n_layer: 4
  n_head: 4
  n_embd: 128
  n_positions: 64
  resid_pdrop: 0.1
  embd_pdrop: 0.1
  attn_pdrop: 0.1
data:
  train: builtin
  eval_fraction: 0.05
  tokenizer: bpe
  vocab_size: 1024
  block_size: 64
  cache: tokens
"""
