"""What the host's evaluations decide of a run, and what they come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import EarlyStoppingCallback, TrainerCallback

from unbroken.changes.rules import SCHEDULE
from unbroken.checkpoint import Difference, Rule
from unbroken.fingerprint import begin_data_facts, callable_facts, subclass_facts

Decides = Literal["the rate", "the choice", "nothing"]
"""The learning rate; or which checkpoint is the best, and when the run ends; or neither."""

METHODS = frozenset(
    (
        *("evaluate", "evaluation_loop", "prediction_step", "_evaluate"),
        *("get_eval_dataloader", "_get_eval_sampler", "compute_metrics"),
    )
)
"""What a subclass evaluates by."""

_CHOICE: Rule = (
    "equivalent",
    "other evaluations from here on choose the best checkpoint, or when the run ends",
)
_STEERING = (
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size"),
    *("prediction_loss_only", "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
    *("metric_for_best_model", "greater_is_better"),
)
RULES: Mapping[Decides, Mapping[str, Rule]] = {
    "the rate": dict.fromkeys(_STEERING, SCHEDULE),
    "the choice": {},
    "nothing": {},
}
"""Rules of arguments that hold in place of the others, by what evaluations decide."""


def what_evaluations_decide(host: Any) -> Decides:
    """Return what the evaluations of a run decide."""
    schedule = getattr(host.lr_scheduler, "scheduler", host.lr_scheduler)  # of the user's own
    is_named = host.args.lr_scheduler_type == "reduce_lr_on_plateau"
    if is_named or isinstance(schedule, ReduceLROnPlateau):
        return "the rate"
    chooses = host.args.metric_for_best_model is not None or host.args.load_best_model_at_end
    listens = any(_acts_on_evaluations(one) for one in host.callback_handler.callbacks)
    return "the choice" if chooses or listens else "nothing"


def _acts_on_evaluations(callback: Any) -> bool:
    kind = type(callback)
    if kind.__module__.partition(".")[0] == "transformers":
        return isinstance(callback, EarlyStoppingCallback)
    listens = getattr(kind, "on_evaluate", None)
    return listens is not None and listens is not TrainerCallback.on_evaluate


def begin_evaluation_facts(host: Any) -> Callable[[], dict[str, Any]] | dict[str, Any]:
    """Begin to take the facts of what evaluations come from, where they decide something.

    Returns:
        What waits for the facts; or none at all.
    """
    decides = what_evaluations_decide(host)
    if decides == "nothing":
        return {}
    data, collate = host.eval_dataset, host.data_collator
    sets = data if isinstance(data, dict) else {"": data}
    begun = {n: begin_data_facts(one, collate) for n, one in sets.items() if one is not None}
    called = {"metrics": host.compute_metrics, "logits": host.preprocess_logits_for_metrics}
    facts = {name: callable_facts(one) for name, one in called.items() if one is not None}
    if decides == "the choice":  # else it stands with what the subclass trains by
        own = subclass_facts(host, leave_out=_all_names(type(host)) - METHODS)
        facts |= {"trainer": own} if own["classes"] else {}

    def complete() -> dict[str, Any]:
        found = {name: read() for name, read in begun.items()}
        return {**(found if isinstance(data, dict) else found.get("", {})), **facts}

    return complete


def _all_names(kind: type) -> frozenset[str]:
    return frozenset(name for base in kind.__mro__ for name in vars(base))


def judged(found: tuple[Difference, ...], decides: Decides) -> tuple[Difference, ...]:
    """Return differences, those of evaluations by what these decide."""
    if decides != "the choice":
        return found
    verdict, effect = _CHOICE
    return tuple(
        replace(one, verdict=verdict, effect=effect)
        if one.path.startswith("eval_data.") and one.verdict == "changed"
        else one
        for one in found
    )
