"""Small runs of the host's Trainer and of ours, each in a fresh process forked from a server.

An order names a case, and changes its settings; the child trains, and writes down what came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, TrainingArguments

from unbroken.data import ByteTokenizer, TokenDataset, builtin_text

BLOCK = 16
SAMPLES = 48


class Text(torch.utils.data.Dataset):
    """Windows of a real text, and the indices that were read."""

    def __init__(self, cache: str, samples: int = SAMPLES, changed: bool = False) -> None:
        tokens = TokenDataset.from_files(
            builtin_text(), block_size=BLOCK, cache=cache, tokenizer=ByteTokenizer()
        )
        start = 100 if changed else 0
        self.rows = [tokens[i]["input_ids"] for i in range(start, start + samples)]
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        self.read.append(int(index))
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Augmented(Text):
    """Replaces bytes at random, from all three global generators."""

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index].clone()
        row[random.randrange(BLOCK)] = np.random.randint(256)
        row[int(torch.randint(BLOCK, ()))] = 32
        return {"input_ids": row, "labels": row}


class Ragged(Text):
    def __getitem__(self, index: int) -> dict:
        row = self.rows[index][: 4 + (index * 7) % 12]
        return {"input_ids": row, "labels": row}


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows: Text, shuffled: bool) -> None:
        self.rows, self.shuffled = rows, shuffled

    def __iter__(self):
        order = torch.randperm(len(self.rows)) if self.shuffled else range(len(self.rows))
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.rows[int(i)] for i in list(order)[first::step])


def masked(samples: list[dict]) -> dict:
    ids = torch.stack([sample["input_ids"] for sample in samples])
    return {"input_ids": torch.where(torch.rand(ids.shape) < 0.15, 0, ids), "labels": ids}


def padded(samples: list[dict]) -> dict:
    rows = [
        torch.nn.functional.pad(s["input_ids"], (0, BLOCK - len(s["input_ids"]))) for s in samples
    ]
    return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}


class OwnSampler(torch.utils.data.Sampler):
    """Another order in each epoch, if it is told the epoch."""

    def __init__(self, length: int) -> None:
        self.length, self.epoch = length, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(100 + self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


class Counting(transformers.TrainerCallback, transformers.trainer_callback.ExportableState):
    """Counts steps, and draws a random number at each."""

    def __init__(self, by: int = 1) -> None:
        self.by, self.count = by, 0

    def on_step_end(self, args, state, control, **more):
        self.count += self.by

    def state(self) -> dict:
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


class KilledAt(transformers.TrainerCallback):
    """Ends the process with a signal after a step; kill -9 by default."""

    def __init__(self, order: dict) -> None:
        self.step, self.number = order["kill_at"], order.get("signal", signal.SIGKILL)
        self.after_save = order.get("after_save", False)
        self.is_here = os.environ.get("RANK", "0") == str(order.get("on_rank", 0))

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step and not self.after_save and self.is_here:
            os.kill(os.getpid(), self.number)

    def on_save(self, args, state, control, **more):
        if state.global_step == self.step and self.after_save:
            os.kill(os.getpid(), self.number)


class Seen(transformers.TrainerCallback):
    """Takes the weights' digest after each step, and what the learning rate was."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_step_end(self, args, state, control, lr_scheduler=None, **more):
        self.rates[state.global_step] = lr_scheduler.get_last_lr()[0]


def model_of(order: dict) -> GPT2LMHeadModel:
    torch.manual_seed(order.get("model_seed", 0))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "n_positions": BLOCK}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **order.get("model", {})}))
    if order.get("reordered"):
        reorder(model.transformer.h[0])
    return model


def reorder(block: torch.nn.Module) -> None:
    """Exchange the places of two parts whose parameters have the same shapes."""
    parts = dict(block._modules)
    block._modules.clear()
    swapped = {"ln_1": "ln_2", "ln_2": "ln_1"}
    for place in parts:
        name = swapped.get(place, place)
        block._modules[name] = parts[name]


def data_of(order: dict) -> Any:
    kinds = {"augmented": Augmented, "ragged": Ragged}
    make = kinds.get(order.get("data", ""), Text)
    rows = make(order["cache"], order.get("samples", SAMPLES), order.get("changed_data", False))
    if order.get("data", "").startswith("stream"):
        return Stream(rows, order["data"] == "stream shuffled")
    return rows


def trainer_class(order: dict) -> type:
    from unbroken.adapters.transformers import Trainer

    base = transformers.Trainer if order["trainer"] == "stock" else Trainer
    if order.get("sampler") != "own":
        return base

    class WithSampler(base):
        def _get_train_sampler(self, train_dataset=None):
            return OwnSampler(len(self.train_dataset))

    return WithSampler


def digest_of(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def arguments_of(order: dict) -> TrainingArguments:
    defaults = {
        "output_dir": order["out"],
        "per_device_train_batch_size": 4,
        "num_train_epochs": 3,
        "save_steps": 5,
        "logging_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 4,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**{**defaults, **order.get("args", {})})


def callbacks_of(order: dict) -> list:
    made = {
        "two counters": lambda: [Counting(1), Counting(10)],
        "patience": lambda: [EarlyStoppingCallback(3)],
    }
    kill = [KilledAt({"kill_at": 0, **order})]
    return [*(made[order["callbacks"]]() if order.get("callbacks") else []), *kill]


def train(order: dict) -> None:
    """Do what an order says, and write what came out to its "result"."""
    torch.set_num_threads(1)
    if "before_write" in order:
        kill_before_write(order["before_write"])
    if "at_storage_step" in order:
        kill_at_storage_step(order["at_storage_step"])
    if "sabotage" in order:
        sabotage(order["sabotage"])
    data, seen = data_of(order), Seen()
    collators = {"masked": masked, "padded": padded}
    callbacks = callbacks_of(order)
    options = {"resume_from_checkpoint": order["start"]} if "start" in order else {}
    options |= {key: order[key] for key in ("allow", "exact_resume") if key in order}
    trainer = trainer_class(order)(
        model_of(order),
        arguments_of(order),
        train_dataset=data,
        eval_dataset=Text(order["cache"], 8, changed=True),
        data_collator=collators.get(order.get("collator", "")),
        callbacks=[seen, *callbacks],
        **options,
    )
    output = trainer.train(
        **({"resume_from_checkpoint": order["resume"]} if "resume" in order else {})
    )
    counters = [one.count for one in trainer.callback_handler.callbacks if type(one) is Counting]
    timed = ("runtime", "per_second")
    log = [
        {k: v for k, v in line.items() if not any(word in k for word in timed)}
        for line in trainer.state.log_history
    ]
    result = {
        "step": output.global_step,
        "train_loss": output.training_loss,
        "digest": digest_of(trainer.model),
        "log": log,
        "counters": counters,
        "rates": seen.rates,
        "flos": trainer.state.total_flos,
        "best": trainer.state.best_model_checkpoint
        and Path(trainer.state.best_model_checkpoint).name,
        "first_step": min(seen.rates, default=None),
        "read": getattr(data, "read", []),
        "report": trainer.resume_report.lines() if order["trainer"] == "ours" else [],
    }
    Path(order["result"]).write_text(json.dumps(result))


def sabotage(part: str) -> None:
    """Take one part out of the adapter, so that the tests must fail."""
    from unbroken.adapters.transformers import batches, callbacks, losses, place, run
    from unbroken.data import KeyedRandom

    def nothing(*_: Any, **__: Any) -> None: ...

    targets = {
        "random states": (run.Run, "restore_random_states"),
        "losses": (losses.Losses, "bring_back"),
        "callbacks": (callbacks.CallbackState, "load_state_dict"),
        "order": (batches.IndexBatches, "_draw_from"),
        "keys": (KeyedRandom, "seed"),
        "place": (place.Follower, "on_substep_end"),
    }
    setattr(*targets[part], nothing)


def train_on_ranks(order: dict) -> None:
    """Train on several ranks; when one dies the others are killed, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {rank_process(order, rank, port): rank for rank in range(order["ranks"])}
    while ranks:
        ended, status = os.wait()
        ranks.pop(ended)
        if status:
            for other in ranks:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            code = os.waitstatus_to_exitcode(status)
            os.kill(os.getpid(), -code) if code < 0 else os._exit(code)


def rank_process(order: dict, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    status = 1
    try:
        train({**order, "result": f"{order['result']}{'' if rank == 0 else rank}"})
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_before_write(name: str) -> None:
    """End the process with kill -9 before the host writes a file of checkpoint-10."""

    def killing(write: Any, path_of: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            path = str(path_of(*arguments))
            if "checkpoint-10" in path and name in f"{path}/save_pretrained":
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*arguments, **options)

        return wrapped

    state = transformers.trainer_callback.TrainerState
    if name == "save_pretrained":
        model = transformers.PreTrainedModel
        model.save_pretrained = killing(model.save_pretrained, lambda _, path: path)
    elif name == "trainer_state.json":
        state.save_to_json = killing(state.save_to_json, lambda _, path: path)
    else:
        torch.save = killing(torch.save, lambda _, path: path)


def kill_at_storage_step(step: int) -> None:
    """End the process with kill -9 at a step of what our Trainer does to the disk."""
    from unbroken.store import run_directory
    from unbroken.testing import KillingStorage

    class Killing(KillingStorage):
        def __init__(self, root: str, *, create: bool = True) -> None:
            super().__init__(root, kill_at=step)

    run_directory.LocalStorage = Killing
