"""Configurations of the host's Trainer in which runs are killed."""

from __future__ import annotations

WORKERS = {"dataloader_num_workers": 2}
GROUPED = {"train_sampling_strategy": "group_by_length"}
STREAM = {"max_steps": 30}
PATIENCE = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_steps": 4,
    "learning_rate": 0.05,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "warmup_steps": 0,
}

# Runs in which the host draws nothing at random from its generators while it reads data.
PLAIN = {
    "shuffled": {},
    "in order": {"args": {"train_sampling_strategy": "sequential"}},
    "accumulation with a remainder": {"args": {"gradient_accumulation_steps": 5, "save_steps": 2}},
    "two workers": {"args": WORKERS},
    "lengths grouped": {"data": "ragged", "collator": "padded", "args": GROUPED},
    "a sampler of its own": {"sampler": "own"},
    "an adapter in the model itself": {"lora": "in the model"},
    "a loader of its own": {"loader": "plain"},
    "a loader of its own, two workers": {"loader": "plain", "args": WORKERS},
    "a loader that accelerate prepared": {"loader": "prepared"},
    "a list of batches": {"loader": "a list"},
    "two counters of one class": {"callbacks": "two counters"},
    "a stream that wraps": {"data": "stream", "args": STREAM},
    "evaluation at epoch ends": {"args": {"eval_strategy": "epoch", "save_steps": 12}},
    "saves at epoch ends": {"args": {"save_strategy": "epoch"}},
    "patience, and the best at the end": {"callbacks": "patience", "args": PATIENCE},
}
RANDOM = {
    "random masks": {"collator": "masked"},
    "random masks, two workers": {"collator": "masked", "args": WORKERS},
    "augmentation": {"data": "augmented"},
    "augmentation in a loader of its own": {"loader": "plain", "data": "augmented"},
    "the host's loader in another": {"loader": "wrapped"},
    "batches of no loader": {"loader": "batches"},
    "batches with a generator of their own": {"loader": "batches with a generator"},
    "batches of other sizes": {"loader": "uneven"},
    "batches of no loader, accumulated": {
        "loader": "batches",
        "args": {"gradient_accumulation_steps": 5, "save_steps": 2},
    },
    "augmentation, two workers": {"data": "augmented", "args": WORKERS},
    "a shuffled stream": {"data": "stream shuffled", "args": STREAM},
    "a shuffled stream, two workers": {"data": "stream shuffled", "args": {**STREAM, **WORKERS}},
}
CASES = {**PLAIN, **RANDOM}
