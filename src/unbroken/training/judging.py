"""Evaluations in the middle of a run, and what follows from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from unbroken.data import derive_key
from unbroken.errors import DeviceMemoryError
from unbroken.training.out_of_memory import is_out_of_memory
from unbroken.training.ranks import shared_metrics

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


def place_of(trainer: Trainer) -> dict[str, Any]:
    """Return where the run is, for a line of statistics."""
    return {"step": trainer.progress.step, "epoch": round(trainer.progress.epoch, 6)}


def eval_is_due(trainer: Trainer) -> bool:
    """Return whether to evaluate now; the ranks need not see the same time."""
    due = trainer.eval_timer.due(trainer.progress.step)
    return due if trainer.config.eval_minutes is None else trainer.group.any(due)


def evaluate_and_judge(trainer: Trainer) -> bool:
    """Evaluate, and do what follows from it; return whether the model is the best so far."""
    config, step = trainer.config, trainer.progress.step
    trainer.randomness.seed(derive_key(config.seed, "evaluate", step))
    own = {name: float(value) for name, value in _evaluated(trainer).items()}
    metrics = shared_metrics(trainer.group, own)
    trainer.eval_timer.done()
    trainer.record({**place_of(trainer), **metrics})
    best = trainer.statistics.consider(metrics, step, config)
    if isinstance(trainer.scheduler, ReduceLROnPlateau):
        trainer.scheduler.step(metrics[config.metric_for_best_model])
    patience = config.early_stopping_patience
    if patience is not None and trainer.statistics.evaluations_without_gain >= patience:
        trainer.stop(f"early stopping: {patience} evaluations without a better metric")
    trainer.call("on_evaluate", metrics)
    return best


def _evaluated(trainer: Trainer) -> dict[str, float]:
    """Return the metrics.

    Raises:
        DeviceMemoryError: If there is not memory enough for it.
    """
    try:
        return trainer.evaluate()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = trainer.config.eval_batch_size or trainer.config.per_forward
        raise DeviceMemoryError(
            f"evaluation after step {trainer.progress.step}",
            f"does not fit into the memory of {trainer.device}",
            found=f"eval_batch_size {size}: {error}",
            hint=f"choose a smaller portion: eval_batch_size={max(1, size // 2)}",
        ) from error


def load_best(trainer: Trainer) -> bool:
    """Put the best weights into the model, if asked for; return whether they are there now."""
    best = trainer.statistics.best_step
    if not trainer.config.load_best_model_at_end or best is None:
        return False
    trainer.checkpointer.load(best, ["model"])
    return True
