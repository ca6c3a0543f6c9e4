"""How a Trainer goes on from a checkpoint, and what of its run the next start compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.checkpoint import Difference, ResumeReport, may_go_on, ratio
from unbroken.errors import CorruptCheckpointError
from unbroken.fingerprint import (
    begin_data_facts,
    callable_facts,
    is_user_code,
    names_in_class,
    object_facts,
    qualified_name,
    subclass_facts,
)
from unbroken.training.callback import Callback, named
from unbroken.training.config_rules import (
    JUDGING_SETTINGS,
    METRIC_SETTINGS,
    OPTIMIZER_OPTIONS,
    SCHEDULE_SETTINGS,
    is_another_schedule,
)
from unbroken.training.optim import factor_of
from unbroken.training.per_rank_loaders import gives_own_batches
from unbroken.training.progress import Progress, count_steps
from unbroken.training.step import LossFn

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


def run_fingerprint(
    trainer: Trainer, dataset: Any, collate_fn: Callable[..., Any] | None, loss_fn: LossFn | None
) -> dict[str, Any]:
    """Return the facts of a run that its objects do not hold: data, loss, callbacks, subclass.

    Those of data are functions that wait for their records to be read. Of data that each rank has
    of its own, rank 0 compares its part.
    """
    loss = {} if loss_fn is None else callable_facts(loss_fn)
    names = sorted(qualified_name(type(callback)) for callback in trainer.callbacks)
    facts = {name: _callback_facts(one) for name, one in named(trainer.callbacks).items()}
    callbacks = {"names": names, **facts}
    groups: dict[str, Any] = {"loss": loss, "callbacks": callbacks}
    groups["state"] = _of_own_objects(trainer)
    groups["trainer"] = _of_subclass(trainer)
    evaluation = None if trainer.eval_dataset is None else begin_data_facts(trainer.eval_dataset)
    groups["eval_data"] = {} if evaluation is None else evaluation
    if trainer.group.rank > 0 and gives_own_batches(trainer.source, trainer.group):
        return {**groups, "data": None}
    read = None if dataset is None else begin_data_facts(dataset, collate_fn)
    return {**groups, "data": {} if read is None else read}


def _ended_otherwise(trainer: Trainer) -> bool:
    """Return whether what may have ended the run is not what it was."""
    now = trainer.checkpointer.comparison.facts["fingerprint"]["callbacks"]
    return may_go_on(trainer.checkpointer.resumed_facts, now)


def _callback_facts(callback: Callback) -> dict[str, Any]:
    stops = any(names_in_class(callback, name) for name in ("stop", "stop_reason"))
    return {**object_facts(callback), **({"stops": True} if stops else {})}


def _of_own_objects(trainer: Trainer) -> dict[str, Any]:
    """Return the facts of the user's own classes in the state of the run, such as an average."""
    checkpointer, told = trainer.checkpointer, (nn.Module, Optimizer, LRScheduler)  # told apart
    return {
        name: object_facts(one)
        for name, one in {**checkpointer.objects, **checkpointer.attributes.bare}.items()
        if is_user_code(type(one)) and not isinstance(one, told) and one is not trainer
    }


def _of_subclass(trainer: Trainer) -> dict[str, Any]:
    """Return what a user's subclass trains by; evaluations count where they steer the rate."""
    steers = isinstance(trainer.scheduler, ReduceLROnPlateau)
    return subclass_facts(
        trainer, leave_out=_BESIDE_TRAINING if steers else _BESIDE_TRAINING | {"evaluate"}
    )


_BESIDE_TRAINING = frozenset(
    ("__init__", "record", "save_checkpoint", "load_checkpoint", "state_dict", "load_state_dict")
)
"""Methods that a subclass may have in its own way, and the weights do not follow."""


def go_on(trainer: Trainer, report: ResumeReport) -> None:
    """Bring what is derived from the configuration to the place where the run is.

    The length of the run is counted from there (steps so far may have been of another size), and
    named changes of optimizer and schedule take effect.
    """
    values = trainer.checkpointer.values
    changed = {difference.path for difference in report.differences}
    if not isinstance(values, dict) or not isinstance(values.get("stop_reason"), str | None):
        raise CorruptCheckpointError("values", "are not those of a run", found=repr(values)[:80])
    trainer.progress = Progress.of(values.get("progress"))
    again = changed & JUDGING_SETTINGS
    stopped = values.get("stop_reason")
    trainer.stop_reason = None if again or _ended_otherwise(trainer) else stopped
    if changed & METRIC_SETTINGS:
        trainer.statistics.forget_best()
    micro = values.get("micro_batch_size")
    is_size = isinstance(micro, int) and micro > 0 and trainer.config.batch_size % micro == 0
    if trainer.portions.is_auto and isinstance(micro, int) and is_size:
        trainer.portions.use(micro)
    _settle_length(trainer)
    _take_effect(trainer, {difference.path: difference for difference in report.differences})


def already_over(trainer: Trainer) -> str:
    """Return the line that a start of a run shows that has come to its end before."""
    place = f"at step {trainer.progress.step} of {trainer.max_steps} already"
    if trainer.progress.step >= trainer.max_steps:
        return f"finished {place}; nothing to do"
    return f"stopped {place} ({trainer.stop_reason}); nothing to do"


def _take_effect(trainer: Trainer, changed: Mapping[str, Difference]) -> None:
    """Set anew what the settings make; where objects are the user's own they make nothing."""
    built = trainer.checkpointer.comparison.built
    if trainer.has_own_optimizer:
        options = [option for name in changed for option in OPTIMIZER_OPTIONS.get(name, ())]
        built.set_options(trainer.optimizer, options)
    anew = changed.keys() & {*SCHEDULE_SETTINGS, "optim"}
    anew |= {path for path, one in changed.items() if is_another_schedule(one)}
    if not anew or not trainer.has_own_schedule or "scheduler" in changed:
        return
    if isinstance(trainer.scheduler, LambdaLR) and trainer.scheduler.last_epoch == 0:
        trainer.scheduler.last_epoch = trainer.progress.step  # it took the place of another
    rate = changed.get("learning_rate")
    built.reschedule(trainer.scheduler, scale=1.0 if rate is None else ratio(rate))


def _settle_length(trainer: Trainer) -> None:
    steps = count_steps(trainer.config, trainer.source, trainer.progress)
    if steps == trainer.max_steps:
        return
    trainer.max_steps = steps
    if trainer.has_own_schedule and isinstance(trainer.scheduler, LambdaLR):
        factor = factor_of(trainer.config, steps)
        trainer.scheduler.lr_lambdas = [factor] * len(trainer.scheduler.lr_lambdas)
