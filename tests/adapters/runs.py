"""Small runs of the host's Trainer and of ours, each in a fresh process forked from a server.

An order names a case, and changes its settings; the child trains, and writes down what came out.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType
from transformers import EarlyStoppingCallback, GPT2Config, GPT2LMHeadModel, TrainingArguments

from adapters.callbacks import (
    Counting,
    KilledAt,
    KilledBeside,
    Levels,
    Raises,
    Raising,
    Seen,
    SeenBeside,
    StoppedInAWindow,
    digest_of,
    keeping,
    kept_by,
)
from adapters.data_sets import (
    BLOCK,
    SAMPLES,
    Augmented,
    CountingSampler,
    LossWeighted,
    Noisy,
    OfARank,
    OfAWrongLength,
    OfTheProcess,
    OfTheProcessOnRank1,
    OwnOrder,
    OwnSampler,
    Ragged,
    Stream,
    StreamWithState,
    Text,
    masked,
    own_loader,
    padded,
)
from adapters.faults import (
    hold_commit_until,
    kill_at_storage_step,
    kill_before_write,
    kill_when_rotated,
    sabotage,
)
from fresh import free_port

OPTIONS = ("betas", "eps", "weight_decay")


def model_of(order: dict) -> GPT2LMHeadModel:
    torch.manual_seed(order.get("model_seed", 0))
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 257, "n_positions": BLOCK}
    ends = {"bos_token_id": 256, "eos_token_id": 256}
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **ends, **order.get("model", {})}))
    if order.get("reordered"):
        reorder(model.transformer.h[0])
    return with_adapter(model, order["lora"]) if order.get("lora") else model


def with_adapter(model: GPT2LMHeadModel, how: bool | str) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    if how == "in the model":
        model.add_adapter(lora)
        return model
    return get_peft_model(model, lora)


def reorder(block: torch.nn.Module) -> None:
    """Exchange the places of two parts whose parameters have the same shapes."""
    parts = dict(block._modules)
    block._modules.clear()
    swapped = {"ln_1": "ln_2", "ln_2": "ln_1"}
    for place in parts:
        name = swapped.get(place, place)
        block._modules[name] = parts[name]


def data_of(order: dict) -> Any:
    kinds = {"augmented": Augmented, "noisy": Noisy, "ragged": Ragged}
    make = kinds.get(order.get("data", ""), Text)
    rows = make(order["cache"], order.get("samples", SAMPLES), order.get("changed_data", False))
    if order.get("data", "").startswith("stream"):
        kinds = {"stream with state": StreamWithState, "stream of its own order": OwnOrder}
        kind = kinds.get(order["data"], Stream)
        return kind(rows, order["data"] == "stream shuffled")
    return rows


def trainer_class(order: dict) -> type:
    from unbroken.adapters.transformers import Trainer

    base = transformers.Trainer if order["trainer"] == "stock" else Trainer
    if "keeps" in order:
        return keeping(base, order["keeps"])
    if "overrides" in order:
        return with_own_way(base, order["overrides"])
    if "loader" in order:
        return with_own_loader(base, order["loader"])
    kinds = {"own": OwnSampler, "counting": CountingSampler, "by loss": LossWeighted}
    kinds |= {"of the process": OfTheProcess, "of the process on rank 1": OfTheProcessOnRank1}
    kinds["of a wrong length"] = lambda length: OfAWrongLength(length, **order["length"])
    if (kind := kinds.get(order.get("sampler"))) is None:
        return base

    class WithSampler(base):
        def _get_train_sampler(self, train_dataset=None):
            return kind(len(self.train_dataset))

    return WithSampler


def with_own_loader(base: type, kind: str) -> type:
    """Return a subclass that makes the training loader itself."""

    class WithLoader(base):
        def get_train_dataloader(self):
            return own_loader(self, kind, super().get_train_dataloader)

    return WithLoader


def with_own_way(base: type, name: str) -> type:
    """Return a subclass with a method that does more than the host's."""
    hosts = getattr(base, name)

    def own(self, *arguments, **options):
        result = hosts(self, *arguments, **options)
        if name == "_save_checkpoint":
            step = self.state.global_step
            Path(f"{self.args.output_dir}/checkpoint-{step}/of-mine.txt").write_text(str(step))
        return result

    own.__qualname__ = f"OwnWay.{name}"
    return type("OwnWay", (base,), {name: own})


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
    sharded = {"fsdp": True, "fsdp_config": order["fsdp"]} if "fsdp" in order else {}
    arguments = TrainingArguments(**{**defaults, **sharded, **order.get("args", {})})
    if sharded:
        shard_on_the_cpu(arguments)
    return arguments


def shard_on_the_cpu(arguments: TrainingArguments) -> None:
    """Tell accelerate that the ranks are GPUs: on CPUs it does not look at `fsdp`."""
    assert arguments.device.type == "cpu"  # found by now, and not looked for again
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def callbacks_of(order: dict) -> list:
    made = {
        "two counters": lambda: [Counting(1), Counting(10)],
        "patience": lambda: [EarlyStoppingCallback(3)],
    }
    if isinstance(order.get("callbacks"), dict):
        given = order["callbacks"].items()
        made["given"] = lambda: [MADE[name](*values) for name, values in given]
        order = {**order, "callbacks": "given"}
    kill = [(KilledBeside if order.get("beside") else KilledAt).by({"kill_at": 0, **order})]
    return [*(made[order["callbacks"]]() if order.get("callbacks") else []), *kill]


MADE = {"patience": EarlyStoppingCallback, "counter": Counting, "level": Raises, "data": Levels}


def train(order: dict) -> None:
    """Do what an order says, and write what came out to its "result"."""
    torch.set_num_threads(1)
    if "before_write" in order:
        kill_before_write(order["before_write"])
    if order.get("kill") == "when rotated":
        kill_when_rotated()
    if "at_storage_step" in order and os.environ.get("RANK", "0") == str(order.get("on_rank", 0)):
        kill_at_storage_step(order["at_storage_step"])
    if "hold_commit_until" in order:
        hold_commit_until(order["hold_commit_until"])
    if "sabotage" in order:
        sabotage(order["sabotage"])
    data = data_of(order)
    seen = (SeenBeside if order.get("beside") else Seen)(order.get("looks", False))
    collators = {"masked": masked, "padded": padded}
    collators["of a rank"] = OfARank(int(os.environ.get("RANK", "0")))
    callbacks = callbacks_of(order)
    options = {"resume_from_checkpoint": order["start"]} if "start" in order else {}
    options |= {
        key: order[key]
        for key in ("allow", "skip", "exact_resume", "save_mode", "confirm_stops")
        if key in order
    }
    trainer = trainer_class(order)(
        model_of(order),
        arguments_of(order),
        train_dataset=data,
        eval_dataset=Text(order["cache"], 8, changed=True),
        data_collator=collators.get(order.get("collator", "")),
        callbacks=[seen, *callbacks],
        **options,
    )
    if "reseed" in order:
        torch.manual_seed(order["reseed"])
    if "stop_in_window_after" in order:
        trainer.add_callback(StoppedInAWindow(order["stop_in_window_after"], trainer))
    if "raises_at" in order:
        trainer.add_callback(Raising(order["raises_at"]))
        with suppress(RuntimeError):
            trainer.train()
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
        "states": seen.states,
        "begun_at_epoch": seen.begun_at_epoch,
        "options": {k: trainer.optimizer.param_groups[0].get(k) for k in OPTIONS},
        "flos": trainer.state.total_flos,
        "best": trainer.state.best_model_checkpoint
        and Path(trainer.state.best_model_checkpoint).name,
        "first_step": min(seen.rates, default=None),
        "read": getattr(data, "read", []),
        "kept": kept_by(trainer),
        "report": trainer.resume_report.lines() if order["trainer"] == "ours" else [],
    }
    Path(order["result"]).write_text(json.dumps(result))


def train_on_ranks(order: dict) -> None:
    """Train on several ranks; when one dies the others are killed, as torchrun does."""
    port = free_port()
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
    signal.alarm(order["seconds"])
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"], "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    status = 1
    try:
        own = order.get("of_rank", {}).get(str(rank), {})
        train({**order, **own, "result": f"{order['result']}{'' if rank == 0 else rank}"})
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
