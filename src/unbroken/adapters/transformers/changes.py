"""The host's TrainingArguments of two starts compared: what a difference in each means."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler
from transformers.trainer_callback import ExportableState

from unbroken.adapters.transformers.evaluations import (
    METHODS,
    Decides,
    judged,
    what_evaluations_decide,
)
from unbroken.adapters.transformers.evaluations import RULES as RULES_BY_EVALUATIONS
from unbroken.adapters.transformers.position import Batching, DataPosition
from unbroken.changes.apply import InitialHyperparameters, apply_settings
from unbroken.changes.rules import (
    CADENCE,
    EVALUATING,
    FORWARD,
    KEEPING,
    LENGTH,
    LOADING,
    LOGGING,
    OPTIMIZER,
    RANDOM,
    ROUNDING,
    RUN_LENGTH,
    SCHEDULE,
    STORING,
    UPDATES,
    with_schedule_length,
)
from unbroken.checkpoint import (
    Difference,
    ExactResume,
    ResumeFrom,
    ResumePolicy,
    Rule,
    SaveMode,
    compare,
)
from unbroken.fingerprint import (
    callable_facts,
    data_facts,
    names_in_class,
    object_facts,
    plain_items,
    plain_or_text,
    qualified_name,
    subclass_facts,
)
from unbroken.stored_names import from_stored, stored_class_name, stored_name

_NAMING: Rule = ("harmless", "where things are, or what they are called; the training is the same")
_JUDGING: Rule = ("harmless", "when the run ends, or which checkpoint is the best")
_ORDER: Rule = ("changed", "another order of samples from here on")
_SIZE: Rule = ("changed", "steps of another size from here on; the position is kept in samples")
_CUT: Rule = ("equivalent", "steps of the same size, in other parts: rounded in another order")

_RULED: tuple[tuple[Rule, str], ...] = (
    (CADENCE, "logging_strategy logging_steps logging_first_step eval_strategy eval_steps"),
    (CADENCE, "eval_delay eval_on_start save_strategy save_steps torch_empty_cache_steps"),
    (LOGGING, "log_on_each_node log_level log_level_replica disable_tqdm skip_memory_metrics"),
    (LOGGING, "include_num_input_tokens_seen logging_nan_inf_filter"),
    (EVALUATING, "per_device_eval_batch_size prediction_loss_only eval_do_concat_batches"),
    (EVALUATING, "eval_use_gather_object eval_accumulation_steps include_for_metrics"),
    (EVALUATING, "batch_eval_metrics bf16_full_eval fp16_full_eval"),
    (KEEPING, "save_total_limit"),
    (STORING, "save_on_each_node"),
    (_NAMING, "report_to run_name project trackio_space_id trackio_bucket_id label_names"),
    (_NAMING, "trackio_static_space_id hub_revision hub_always_push push_to_hub hub_model_id"),
    (_NAMING, "hub_private_repo hub_strategy remove_unused_columns length_column_name"),
    (LOADING, "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers"),
    (LOADING, "dataloader_prefetch_factor dataloader_multiprocessing_context"),
    (LOADING, "dataloader_in_order ddp_timeout"),
    (_JUDGING, "load_best_model_at_end metric_for_best_model greater_is_better"),
    (RUN_LENGTH, "max_steps num_train_epochs"),
    (ROUNDING, "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel"),
    (ROUNDING, "liger_kernel_config activation_checkpointing activation_checkpointing_kwargs"),
    (ROUNDING, "gradient_checkpointing gradient_checkpointing_kwargs tf32 full_determinism"),
    (ROUNDING, "use_cpu use_cache parallelism_config"),
    (ROUNDING, "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"),
    (ROUNDING, "ddp_static_graph ddp_backend"),
    (UPDATES, "weight_decay adam_beta1 adam_beta2 adam_epsilon optim_args optim_target_modules"),
    (SCHEDULE, "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio"),
    (FORWARD, "max_grad_norm label_smoothing_factor bf16 fp16 neftune_noise_alpha"),
    (FORWARD, "average_tokens_across_devices"),
    (_ORDER, "data_seed dataloader_drop_last train_sampling_strategy accelerator_config"),
    (_SIZE, "per_device_train_batch_size gradient_accumulation_steps"),
    (RANDOM, "seed"),
    (OPTIMIZER, "optim"),
)
RULES: Mapping[str, Rule] = {name: rule for rule, names in _RULED for name in names.split()}

_OF_THE_START = {
    *("output_dir", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("local_rank", "hub_token", "do_train", "do_eval", "do_predict", "debug"),
    *("enable_jit_checkpoint", "save_only_model", "auto_find_batch_size", "deepspeed"),
    *("fsdp", "fsdp_config", "ignore_data_skip"),
}
"""What says how to start, not what to train; or is refused before anything is compared."""

OPTIMIZER_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}
"""The options of an optimizer that an argument makes."""

SCHEDULE_ARGUMENTS = frozenset(
    {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"}
)
CUT_ARGUMENTS = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})

MEANT = frozenset(
    {
        *(name for name, rule in RULES.items() if rule in (UPDATES, SCHEDULE, FORWARD, RUN_LENGTH)),
        *CUT_ARGUMENTS,
        "schedule",
        "total_batch_size",
    }
)
"""What a caller means who names a checkpoint by its path and gives other arguments than it had."""


def plain_arguments(arguments: Any) -> dict[str, Any]:
    """Return TrainingArguments as plain values, those that a training depends on."""
    values = arguments.to_dict()
    if values.get("data_seed") == values.get("seed"):
        values["data_seed"] = None
    return {k: plain_or_text(v) for k, v in values.items() if k not in _OF_THE_START}


def argument_differences(
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    own_optimizer: bool = False,
    same_size: bool = False,
    evaluations: Decides = "nothing",
) -> tuple[Difference, ...]:
    """Return the arguments that are not what they were, the most severe first.

    Args:
        stored: Those of the checkpoint, as `plain_arguments` gave them.
        now: Those of this start.
        own_optimizer: Whether the optimizer is one of the user's own: no argument makes it.
        same_size: Whether a step has as many samples as it had, on all ranks together.
        evaluations: What they decide.
    """
    rules = {**RULES, **RULES_BY_EVALUATIONS[evaluations]}
    if same_size:
        rules.update(dict.fromkeys(CUT_ARGUMENTS, _CUT))
    if own_optimizer:
        effect = "not used: the optimizer is one of your own"
        rules.update(
            dict.fromkeys({*OPTIMIZER_OPTIONS, "optim", "optim_args"}, ("harmless", effect))
        )
    return compare(stored, now, rules)


# What the user's callbacks have come to, as named state; kept in their own objects.


@stored_name("unbroken.adapters.transformers.callbacks.CallbackState")
class CallbackState:
    """The state of one callback: by `state_dict`, or by the host's `state()`.

    Example:
        >>> from transformers import EarlyStoppingCallback
        >>> patience = EarlyStoppingCallback(early_stopping_patience=3)
        >>> CallbackState(patience).state_dict()
        {'early_stopping_patience_counter': 0}
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def state_dict(self) -> Any:
        """Return the state that training made, without the arguments it was built with."""
        if _has_state_dict(self.callback):
            return self.callback.state_dict()
        return copy.deepcopy(self.callback.state().get("attributes", {}))

    def load_state_dict(self, state: Any) -> None:
        """Put it back into the same object."""
        if _has_state_dict(self.callback):
            self.callback.load_state_dict(state)
            return
        live = self.callback.state().get("attributes", {})
        for name, value in state.items():
            if name not in live or (_is_number(live[name]) and not _is_number(value)):
                raise TypeError(f"{name}={value!r} is none of {live}")
        for name, value in state.items():
            setattr(self.callback, name, value)


def named(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return callbacks by the names of their classes: the second of a class is "Name#2".

    Example:
        >>> from transformers import EarlyStoppingCallback
        >>> list(named([EarlyStoppingCallback(), EarlyStoppingCallback()]))
        ['EarlyStoppingCallback', 'EarlyStoppingCallback#2']
    """
    found: dict[str, Any] = {}
    for callback in callbacks:
        name = plain = stored_class_name(type(callback))
        number = 1
        while name in found:
            number += 1
            name = f"{plain}#{number}"
        found[name] = callback
    return found


def callback_states(callbacks: Iterable[Any]) -> dict[str, CallbackState]:
    """Return all callbacks that have a state, by their names.

    Example:
        >>> from transformers import EarlyStoppingCallback, ProgressCallback
        >>> list(callback_states([ProgressCallback(), EarlyStoppingCallback()]))
        ['EarlyStoppingCallback']
    """
    return {
        name: CallbackState(callback)
        for name, callback in named(callbacks).items()
        if _has_state_dict(callback) or isinstance(callback, ExportableState)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _has_state_dict(callback: Any) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


# What two starts of the host's Trainer have in common, what differs, and what then happens.


@dataclass(frozen=True)
class UserChoices:
    """What the caller of a trainer said about resuming, and which objects he made himself.

    Attributes:
        has_optimizer: Whether the optimizer is one that he gave: no argument makes it.
        has_scheduler: The same of the scheduler.
    """

    resume_from_checkpoint: ResumeFrom = None
    allow: Sequence[str] = ()
    skip: Sequence[str] = ()
    exact_resume: ExactResume = "prefer"
    save_mode: SaveMode = "async"
    confirm_stops: bool = False
    verify_steps: int | None = None
    has_optimizer: bool = False
    has_scheduler: bool = False

    def policy(self, *, is_named: bool) -> ResumePolicy:
        """Return which differences a start accepts.

        Args:
            is_named: Whether the caller named one checkpoint: who does that and gives other
                hyperparameters means them.
        """
        follows = (*(MEANT if is_named else ()), LENGTH, "ignore_data_skip")
        return ResumePolicy.of_trainer(self.allow, self.skip, self.exact_resume, follows=follows)

    @property
    def made_by_arguments(self) -> list[str]:
        """The names of the objects that the host makes, as its arguments say."""
        given = {"optimizer": self.has_optimizer, "scheduler": self.has_scheduler}
        return [name for name, is_given in given.items() if not is_given]


def run_fingerprint(data: Iterable[Any], loss: Any, callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return the facts of a run that its arguments and objects do not hold.

    Args:
        data: The data set and its collator; or the user's own loader.
        loss: What computes the loss in place of the model; None: nothing does.
        callbacks: All callbacks.
    """
    return {
        "data": data_facts(*data),
        "loss": {} if loss is None else callable_facts(loss),
        "callbacks": facts_of_callbacks(callbacks),
    }


def facts_of_subclass(host: object) -> dict[str, Any]:
    """Return what a user's subclass does in a step: its code, and the settings that this uses."""
    steers = what_evaluations_decide(host) == "the rate"
    leave_out = _NOT_IN_A_STEP if steers else _NOT_IN_A_STEP | METHODS
    return subclass_facts(host, leave_out=leave_out)


_NOT_IN_A_STEP = frozenset(
    (
        *("__init__", "predict", "get_test_dataloader"),
        *("log", "log_metrics", "save_metrics", "save_state", "save_model", "_save"),
        *("_save_checkpoint", "push_to_hub", "create_model_card", "floating_point_ops"),
        *("state_dict", "load_state_dict", "is_world_process_zero"),
    )
)
"""Methods of the host that a subclass may have in its own way, and the weights do not follow."""


def facts_of_callbacks(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Return what callbacks are; of the host's own, those that keep a state."""
    all_of_them = named(callbacks).items()
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


@dataclass(frozen=True)
class CurrentSettings:
    """What this start trains with, to be compared with what a checkpoint was trained with.

    Attributes:
        arguments: The host's TrainingArguments.
        choices: What the user chose.
        batching: How this start cuts an epoch into steps.
        scheduler: The scheduler, as the host has built it.
        step: Optimizer steps that the checkpoint has.
        max_steps: The last step of this start.
        evaluations: What they decide.
        restarted: The position in an epoch that is begun again; None: none is.
    """

    arguments: Any
    choices: UserChoices
    batching: Batching
    scheduler: Any
    step: int
    max_steps: int
    evaluations: Decides
    restarted: DataPosition | None = None

    def differences(
        self, stored: Mapping[str, Any], found: tuple[Difference, ...]
    ) -> tuple[Difference, ...]:
        """Return all differences from the checkpoint with these facts.

        Args:
            stored: Its facts.
            found: What differs besides arguments.
        """
        before, found = stored.get("arguments"), judged(found, self.evaluations)
        if not isinstance(before, Mapping):
            return found
        size = self._of_size(stored)
        arguments = argument_differences(
            before,
            plain_arguments(self.arguments),
            own_optimizer=self.choices.has_optimizer,
            same_size=not size,
            evaluations=self.evaluations,
        )
        changed = {difference.path for difference in arguments}
        if changed & CUT_ARGUMENTS:
            size = ()  # the arguments tell it
        found = (*self._of_data_skip(), *found)
        if not self.choices.has_scheduler:
            arguments = self._with_length(stored, arguments, (*size, *found))
        return (*arguments, *size, *found)

    def _of_size(self, stored: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Tell of steps with more or fewer samples than they had, on all ranks together."""
        if not isinstance(stored.get("cut"), Mapping):
            return ()
        was, now = (
            from_stored(Batching, stored["cut"]).samples_in_step,
            self.batching.samples_in_step,
        )
        if was == now:
            return ()
        effect = "steps of another size from here on; the position is kept in samples"
        kept_by, rest = divmod(was, self.batching.batch * self.batching.world_size)
        if not rest:
            effect = f"{effect} (gradient_accumulation_steps={kept_by} keeps the size)"
        return (Difference("total_batch_size", was, now, effect, "changed"),)

    def _of_data_skip(self) -> tuple[Difference, ...]:
        """Tell of an epoch that is begun again because `ignore_data_skip` asks for that."""
        if self.restarted is None:
            return ()
        was = f"{self.restarted.samples} samples into epoch {self.restarted.epoch}"
        effect = "they come again in this epoch, and as many at the end of the run never come"
        return (Difference("ignore_data_skip", was, "its beginning", effect, "changed"),)

    def _with_length(
        self,
        stored: Mapping[str, Any],
        arguments: tuple[Difference, ...],
        others: tuple[Difference, ...],
    ) -> tuple[Difference, ...]:
        """Tell what a run of another length does to a schedule that falls to its end."""
        was = stored.get("max_steps")
        if not isinstance(was, int) or not isinstance(self.scheduler, LambdaLR):
            return arguments
        return with_schedule_length(
            arguments,
            others,
            lengths=(was, self.max_steps),
            step=self.step,
            learning_rate=self.arguments.learning_rate,
            factor_of=self._factor,
            of_schedule=SCHEDULE_ARGUMENTS,
        )

    def _factor(self, max_steps: int) -> Any:
        """Return the function from step to factor that the host's schedule of this length has."""
        parameter = torch.nn.Parameter(torch.zeros(()))
        scheduler = get_scheduler(
            self.arguments.lr_scheduler_type,
            optimizer=torch.optim.SGD([parameter], lr=self.arguments.learning_rate),
            num_warmup_steps=self.arguments.get_warmup_steps(max_steps),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=self.arguments.lr_scheduler_kwargs,
        )
        return scheduler.lr_lambdas[0]

    def apply(
        self,
        differences: tuple[Difference, ...],
        objects: Mapping[str, object],
        built: InitialHyperparameters,
    ) -> None:
        """Set again what arguments make, over the state that was restored; moments are kept.

        Args:
            differences: Those from the checkpoint that was loaded.
            objects: "optimizer" and "scheduler".
            built: What this start had built before the load.
        """
        choices = self.choices
        apply_settings(
            differences,
            built,
            optimizer=None if choices.has_optimizer else objects["optimizer"],
            scheduler=None if choices.has_scheduler else objects["scheduler"],
            options=OPTIMIZER_OPTIONS,
            of_schedule=SCHEDULE_ARGUMENTS,
            step=self.step,
        )
