"""What of a Trainer's run the next start compares, and how named changes of it take effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from unbroken.changes.apply import apply_settings
from unbroken.checkpoint import Difference, InitialHyperparameters
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
    OPTIMIZER_OPTIONS,
    SCHEDULE_SETTINGS,
)
from unbroken.training.optim import factor_of
from unbroken.training.per_rank_loaders import gives_own_batches
from unbroken.training.run_state import RunState, count_steps
from unbroken.training.setup import Parts


def run_fingerprint(
    parts: Parts,
    callbacks: Sequence[Callback],
    objects: Mapping[str, object],
    *,
    subclass: object,
    train_dataset: Any,
    eval_dataset: Any,
    chooses: bool = False,
) -> dict[str, Any]:
    """Return the facts of a run that its objects do not hold: data, loss, callbacks, subclass.

    Those of data are functions that wait for their records to be read. Of data that each rank has
    of its own, rank 0 compares its part. `chooses`: evaluations say when the run ends, or which
    weights it ends with.
    """
    loss = {} if parts.loss_fn is None else callable_facts(parts.loss_fn)
    names = sorted(qualified_name(type(callback)) for callback in callbacks)
    facts = {name: _callback_facts(one) for name, one in named(callbacks).items()}
    groups: dict[str, Any] = {"loss": loss, "callbacks": {"names": names, **facts}}
    groups["state"] = _of_own_objects(objects)
    groups["trainer"] = _of_subclass(subclass, parts.scheduler)
    chooses |= any(one.get("stops", False) for one in facts.values())
    own = subclass if chooses and not _steers(parts.scheduler) else None
    groups["eval_data"] = _begin_evaluation_facts(eval_dataset, own)
    if parts.group.rank > 0 and gives_own_batches(parts.source, parts.group):
        return {**groups, "data": None}
    train = None
    if train_dataset is not None:
        train = begin_data_facts(train_dataset, parts.collate_fn)
    return {**groups, "data": {} if train is None else train}


def _begin_evaluation_facts(eval_dataset: Any, subclass: object) -> Any:
    """Begin to take the facts of what evaluations come from, a subclass's own way among them."""
    begun = None if eval_dataset is None else begin_data_facts(eval_dataset)
    others = frozenset(name for base in type(subclass).__mro__ for name in vars(base))
    code = {} if subclass is None else subclass_facts(subclass, leave_out=others - {"evaluate"})
    own = {"trainer": code} if code.get("classes") else {}
    return own if begun is None else lambda: {**begun(), **own}


def _callback_facts(callback: Callback) -> dict[str, Any]:
    stops = any(names_in_class(callback, name) for name in ("stop", "stop_reason"))
    return {**object_facts(callback), **({"stops": True} if stops else {})}


def _of_own_objects(objects: Mapping[str, object]) -> dict[str, Any]:
    """Return the facts of the user's own classes in the state of the run, such as an average."""
    compared_apart = (nn.Module, Optimizer, LRScheduler)
    return {
        name: object_facts(one)
        for name, one in objects.items()
        if is_user_code(type(one)) and not isinstance(one, compared_apart)
    }


def _of_subclass(trainer_of_user: object, scheduler: LRScheduler) -> dict[str, Any]:
    """Return what a user's subclass trains by; evaluations count where they steer the rate."""
    left_out = _BESIDE_TRAINING if _steers(scheduler) else _BESIDE_TRAINING | {"evaluate"}
    return subclass_facts(trainer_of_user, leave_out=left_out)


def _steers(scheduler: LRScheduler) -> bool:
    return isinstance(scheduler, ReduceLROnPlateau)


_BESIDE_TRAINING = frozenset(
    ("__init__", "record", "save_checkpoint", "load_checkpoint", "state_dict", "load_state_dict")
)
"""Methods that a subclass may have in its own way, and the weights do not follow."""


def take_effect(
    parts: Parts, state: RunState, built: InitialHyperparameters, changed: Mapping[str, Difference]
) -> None:
    """Set anew what the settings make; where objects are the user's own they make nothing."""
    is_loaded = "scheduler" not in changed
    apply_settings(
        changed.values(),
        built,
        optimizer=parts.optimizer if parts.config_made_optimizer else None,
        scheduler=parts.scheduler if parts.config_made_schedule and is_loaded else None,
        options=OPTIMIZER_OPTIONS,
        of_schedule=SCHEDULE_SETTINGS,
        step=state.progress.step,
    )


def settle_length(parts: Parts, state: RunState) -> None:
    """Count the length of a run from where it is: steps so far may have been of another size."""
    steps = count_steps(state.config, parts.source, state.progress)
    if steps == state.max_steps:
        return
    state.max_steps = steps
    if parts.config_made_schedule and isinstance(parts.scheduler, LambdaLR):
        factor = factor_of(state.config, steps)
        parts.scheduler.lr_lambdas = [factor] * len(parts.scheduler.lr_lambdas)
