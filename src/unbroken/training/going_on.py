"""How a Trainer goes on from a checkpoint, and what it writes into each of its own to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR

from unbroken.checkpoint import ResumeReport
from unbroken.errors import DataError
from unbroken.fingerprint import callable_facts, data_facts, qualified_name, source_digest
from unbroken.training.changes import LENGTH, OPTIMIZER_SETTINGS, SCHEDULE_SETTINGS
from unbroken.training.counting import count_steps
from unbroken.training.loss import LossFn
from unbroken.training.progress import Progress
from unbroken.training.schedules import factor_of

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


def run_fingerprint(
    trainer: Trainer, dataset: Any, collate_fn: Callable[..., Any] | None, loss_fn: LossFn | None
) -> dict[str, Any]:
    """Return the facts of a run that its objects do not hold: data, loss, callbacks.

    Raises:
        DataError: If records are not the same twice and `exact_resume` is "require".
    """
    data = {} if dataset is None else data_facts(dataset, collate_fn)
    if data.get("repeatable") is False:
        _tell_of_own_generator(trainer)
    groups = {"data": data, "loss": {} if loss_fn is None else callable_facts(loss_fn)}
    names = sorted(qualified_name(type(callback)) for callback in trainer.callbacks)
    sources = {qualified_name(type(c)): source_digest(c) for c in trainer.callbacks}
    return {**groups, "callbacks": {"names": names, "source": sources}}


def _tell_of_own_generator(trainer: Trainer) -> None:
    what = "sample 0 was not the same twice, read under the same key"
    hint = (
        "it draws from a generator of its own; draw from random, numpy.random or torch, which are "
        "keyed, so that a resumed run sees the same samples"
    )
    if trainer.config.exact_resume == "require":
        raise DataError("train_dataset", what, hint=hint)
    trainer.display.note(f"train_dataset: {what}: {hint}")


def what_to_save(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the values that `go_on` needs, and the facts that the next start compares."""
    progress = asdict(trainer.progress)
    values = {
        "progress": progress,
        "stop_reason": trainer.stop_reason,
        "micro_batch_size": trainer.config.per_forward,
    }
    config = trainer.config.to_dict()
    return values, {"progress": progress, "config": config, "max_steps": trainer.max_steps}


def go_on(trainer: Trainer, report: ResumeReport) -> None:
    """Bring what is derived from the configuration to the place where the run is.

    The length of the run is counted from there (steps so far may have been of another size), and
    named changes of optimizer and schedule take effect.
    """
    values = trainer.checkpointer.values
    trainer.progress = Progress(**values["progress"])
    trainer.stop_reason = values["stop_reason"]
    micro = values.get("micro_batch_size")
    if trainer.portions.is_auto and micro and trainer.config.batch_size % micro == 0:
        trainer.portions.use(micro)
    _settle_length(trainer)
    built = trainer.checkpointer.comparison.built
    changed = {d.path for d in report.differences}
    if changed & OPTIMIZER_SETTINGS:
        built.set_options(trainer.optimizer)
    if changed & {*SCHEDULE_SETTINGS, LENGTH} and trainer.has_own_schedule:
        if isinstance(trainer.scheduler, LambdaLR) and trainer.scheduler.last_epoch == 0:
            trainer.scheduler.last_epoch = trainer.progress.step  # it took the place of another
        built.reschedule(trainer.scheduler)


def _settle_length(trainer: Trainer) -> None:
    steps = count_steps(trainer.config, trainer.source, trainer.progress)
    if steps == trainer.max_steps:
        return
    trainer.max_steps = steps
    if trainer.has_own_schedule and isinstance(trainer.scheduler, LambdaLR):
        factor = factor_of(trainer.config, steps)
        trainer.scheduler.lr_lambdas = [factor] * len(trainer.scheduler.lr_lambdas)
