"""What two starts of the host's Trainer have in common, what differs, and what then happens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler
from transformers.trainer_callback import ExportableState

from unbroken.adapters.transformers.arguments import (
    CUT_ARGUMENTS,
    MEANT,
    OPTIMIZER_OPTIONS,
    SCHEDULE_ARGUMENTS,
    argument_differences,
    plain_arguments,
)
from unbroken.adapters.transformers.callbacks import named
from unbroken.adapters.transformers.reaching import Cut
from unbroken.checkpoint import Difference, Policy, ratio
from unbroken.fingerprint import (
    callable_facts,
    data_facts,
    names_in_class,
    object_facts,
    plain_items,
    qualified_name,
)
from unbroken.training.changes import (
    LENGTH,
    LENGTH_SETTINGS,
    is_another_schedule,
    tell_length,
)

if TYPE_CHECKING:
    from unbroken.adapters.transformers.run import Run
    from unbroken.adapters.transformers.trainer import Trainer


def policy_of(trainer: Trainer, *, is_named: bool) -> Policy:
    """Return which differences a start accepts.

    Args:
        trainer: The trainer, with what its caller allowed.
        is_named: Whether the caller named one checkpoint: who does that and gives other
            hyperparameters means them.
    """
    start = trainer.start
    meant = MEANT if is_named and start.exact_resume == "prefer" else ()
    follows = () if start.exact_resume == "require" else (LENGTH, "ignore_data_skip")
    follows = (*follows, *(LENGTH_SETTINGS if LENGTH in start.allow else ()))
    parts = {"fp16": "scaler", "lr_scheduler_type": "scheduler", "optim": "optimizer"}
    return Policy((*start.allow, *meant, *follows), start.skip, start.exact_resume, parts)


def run_fingerprint(trainer: Trainer, own_loader: Any = None) -> dict[str, Any]:
    """Return the facts of a run that its arguments and objects do not hold.

    Args:
        trainer: The trainer.
        own_loader: The loader of the training data, if the host did not make it.
    """
    collate, loss = trainer.data_collator, trainer.compute_loss_func
    data = (trainer.train_dataset, collate) if own_loader is None else (own_loader,)
    return {
        "data": data_facts(*data),
        "loss": {} if loss is None else callable_facts(loss),
        "callbacks": facts_of_callbacks(trainer),
    }


def facts_of_callbacks(trainer: Trainer) -> dict[str, Any]:
    """Return what callbacks are; of the host's own, those that keep a state."""
    all_of_them = named(trainer.callback_handler.callbacks).items()
    kept = {n: one for n, one in all_of_them if not _is_of_host(one) or _arguments(one)}
    names = sorted(qualified_name(type(one)) for one in kept.values() if not _is_of_host(one))
    return {"names": names, **{name: _callback_facts(one) for name, one in kept.items()}}


def _callback_facts(callback: Any) -> dict[str, Any]:
    facts = {"args": _arguments(callback)} if _is_of_host(callback) else object_facts(callback)
    stops = names_in_class(callback, "should_training_stop")
    return {**facts, **({"stops": True} if stops else {})}


def _arguments(callback: Any) -> dict[str, Any]:
    """Return what a callback of the host that keeps a state was built with."""
    if not isinstance(callback, ExportableState):
        return {}
    return plain_items(callback.state().get("args", {}))


def _is_of_host(callback: Any) -> bool:
    return type(callback).__module__.partition(".")[0] in ("transformers", "unbroken")


def run_facts(run: Run) -> dict[str, Any]:
    """Return what the next start compares, and needs to know before it has built anything."""
    trainer = run.trainer
    state, control = trainer.state, trainer.control
    stopped = control.should_training_stop and state.global_step < state.max_steps
    return {
        "arguments": plain_arguments(trainer.args),
        "cut": asdict(run.cut),
        "host": "transformers",
        "max_steps": state.max_steps,
        "place": asdict(run.follower.place),
        "shift": run.shift,
        "stopped": [bool(stopped), bool(control.should_epoch_stop)],
    }


def compared(
    run: Run, stored: Mapping[str, Any], found: tuple[Difference, ...]
) -> tuple[Difference, ...]:
    """Return all differences from the checkpoint with these facts."""
    trainer = run.trainer
    before = stored.get("arguments")
    if not isinstance(before, Mapping):
        return found
    own, size = trainer.own_optimizers, _of_size(run, stored)
    arguments = argument_differences(
        before, plain_arguments(trainer.args), own_optimizer=own[0], same_size=not size
    )
    changed = {difference.path for difference in arguments}
    if changed & CUT_ARGUMENTS:
        size = ()  # the arguments tell it
    found = (*_of_data_skip(run), *found)
    if not own[1]:
        arguments = _with_length(trainer, stored, arguments, (*size, *found))
    return (*arguments, *size, *found)


def _of_size(run: Run, stored: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Tell of steps with more or fewer samples than they had, on all ranks together."""
    if not isinstance(stored.get("cut"), Mapping):
        return ()
    was, now = Cut(**stored["cut"]).samples_in_step, run.cut.samples_in_step
    if was == now:
        return ()
    effect = "steps of another size from here on; the position is kept in samples"
    kept_by, rest = divmod(was, run.cut.batch * run.cut.world_size)
    if not rest:
        effect = f"{effect} (gradient_accumulation_steps={kept_by} keeps the size)"
    return (Difference("total_batch_size", was, now, effect, "changed"),)


def _of_data_skip(run: Run) -> tuple[Difference, ...]:
    """Tell of an epoch that is begun anew because `ignore_data_skip` asks for that."""
    if run.given_up is None:
        return ()
    was = f"{run.given_up.samples} samples into epoch {run.given_up.epoch}"
    effect = "they come again in this epoch, and as many at the end of the run never come"
    return (Difference("ignore_data_skip", was, "its beginning", effect, "changed"),)


def _with_length(
    trainer: Trainer,
    stored: Mapping[str, Any],
    arguments: tuple[Difference, ...],
    others: tuple[Difference, ...],
) -> tuple[Difference, ...]:
    """Tell what a run of another length does to a schedule that falls to its end."""
    was, now, step = stored.get("max_steps"), trainer.state.max_steps, trainer.state.global_step
    if not isinstance(was, int) or was == now or not isinstance(trainer.lr_scheduler, LambdaLR):
        return arguments
    if now <= step:
        return arguments
    before, after = _factor(trainer, was), _factor(trainer, now)
    stop = min(was, now)
    for at in sorted({step, *(step + (stop - step) * i // 1000 for i in range(1001))}):
        rates = trainer.args.learning_rate * before(at), trainer.args.learning_rate * after(at)
        if rates[0] != rates[1]:
            by_schedule = SCHEDULE_ARGUMENTS & {one.path for one in arguments}
            told = tell_length(arguments, others, (was, now), at, rates)
            return arguments if by_schedule and told[-1].path == LENGTH else told
    return arguments


def _factor(trainer: Trainer, max_steps: int) -> Any:
    """Return the function from step to factor that the host's schedule of this length has."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    scheduler = get_scheduler(
        trainer.args.lr_scheduler_type,
        optimizer=torch.optim.SGD([parameter], lr=trainer.args.learning_rate),
        num_warmup_steps=trainer.args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=trainer.args.lr_scheduler_kwargs,
    )
    return scheduler.lr_lambdas[0]


def take_effect(run: Run, differences: tuple[Difference, ...]) -> None:
    """Set anew what arguments make, over the state that was restored; moments are kept."""
    changed = {difference.path: difference for difference in differences}
    objects, built = run.checkpointer.objects, run.checkpointer.comparison.built
    optimizer, scheduler = objects["optimizer"], objects["scheduler"]
    own_optimizer, own_scheduler = run.trainer.own_optimizers
    if not own_optimizer and isinstance(optimizer, Optimizer):
        options = [option for name in changed for option in OPTIMIZER_OPTIONS.get(name, ())]
        built.set_options(optimizer, options)
    anew = changed.keys() & {*SCHEDULE_ARGUMENTS, "optim"}
    anew |= {one.path for one in differences if is_another_schedule(one)}
    if not anew or own_scheduler or not isinstance(scheduler, LRScheduler):
        return
    if isinstance(scheduler, LambdaLR) and scheduler.last_epoch == 0:
        scheduler.last_epoch = run.trainer.state.global_step  # it took the place of another
    rate = changed.get("learning_rate")
    built.reschedule(scheduler, scale=1.0 if rate is None else ratio(rate))
