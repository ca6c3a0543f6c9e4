"""The host's TrainingArguments of two starts compared: what a difference in each means."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler
from transformers.trainer_callback import ExportableState

from unbroken.adapters.transformers.position import Cut
from unbroken.checkpoint import Difference, ResumePolicy, Rule, compare, ratio
from unbroken.fingerprint import (
    callable_facts,
    data_facts,
    is_users_own,
    names_in_class,
    object_facts,
    own_attributes,
    plain_items,
    plain_or_text,
    qualified_name,
    source_digest,
)
from unbroken.fingerprint.source_code import functions_of
from unbroken.fingerprint.values import facts_of_items, names_used_by, values_around
from unbroken.stored_names import from_stored, stored_class_name, stored_name, to_stored
from unbroken.training.config_rules import LENGTH, LENGTH_SETTINGS, is_another_schedule, tell_length

if TYPE_CHECKING:
    from unbroken.adapters.transformers.session import Run
    from unbroken.adapters.transformers.trainer import Trainer


_CADENCE: Rule = ("harmless", "something happens at other steps; the training is the same")
_NAMING: Rule = ("harmless", "where things are, or what they are called; the training is the same")
_LOADING: Rule = ("harmless", "how data are read; the order and the samples are the same")
_JUDGING: Rule = ("harmless", "when the run ends, or which checkpoint is the best")
_LENGTH: Rule = ("harmless", "the run ends elsewhere")
_ROUNDING: Rule = ("equivalent", "the same sums, rounded in another order")
_UPDATES: Rule = ("changed", "other updates from here on; the optimizer's moments are kept")
_SCHEDULE: Rule = ("changed", "another learning rate from here on, at the same step")
_FORWARD: Rule = ("changed", "other gradients from here on")
_ORDER: Rule = ("changed", "another order of samples from here on")
_SIZE: Rule = ("changed", "steps of another size from here on; the position is kept in samples")
_CUT: Rule = ("equivalent", "steps of the same size, in other parts: rounded in another order")
_RANDOM: Rule = ("changed", "other random numbers, and another order, from here on")
_OPTIMIZER: Rule = ("refused", 'the state of one means nothing to another; skip=["optimizer"]')

_RULED: tuple[tuple[Rule, str], ...] = (
    (_CADENCE, "logging_strategy logging_steps logging_first_step log_on_each_node log_level"),
    (_CADENCE, "log_level_replica disable_tqdm include_num_input_tokens_seen eval_strategy"),
    (_CADENCE, "eval_steps eval_delay per_device_eval_batch_size prediction_loss_only"),
    (_CADENCE, "eval_on_start eval_do_concat_batches eval_use_gather_object"),
    (_CADENCE, "eval_accumulation_steps include_for_metrics batch_eval_metrics save_strategy"),
    (_CADENCE, "save_steps save_on_each_node save_total_limit skip_memory_metrics"),
    (_CADENCE, "logging_nan_inf_filter bf16_full_eval fp16_full_eval torch_empty_cache_steps"),
    (_NAMING, "report_to run_name project trackio_space_id trackio_bucket_id label_names"),
    (_NAMING, "trackio_static_space_id hub_revision hub_always_push push_to_hub hub_model_id"),
    (_NAMING, "hub_private_repo hub_strategy remove_unused_columns length_column_name"),
    (_LOADING, "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers"),
    (_LOADING, "dataloader_prefetch_factor dataloader_multiprocessing_context"),
    (_LOADING, "dataloader_in_order ddp_timeout"),
    (_JUDGING, "load_best_model_at_end metric_for_best_model greater_is_better"),
    (_LENGTH, "max_steps num_train_epochs"),
    (_ROUNDING, "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel"),
    (_ROUNDING, "liger_kernel_config activation_checkpointing activation_checkpointing_kwargs"),
    (_ROUNDING, "gradient_checkpointing gradient_checkpointing_kwargs tf32 full_determinism"),
    (_ROUNDING, "use_cpu use_cache parallelism_config"),
    (_ROUNDING, "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers"),
    (_ROUNDING, "ddp_static_graph ddp_backend"),
    (_UPDATES, "weight_decay adam_beta1 adam_beta2 adam_epsilon optim_args optim_target_modules"),
    (_SCHEDULE, "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio"),
    (_FORWARD, "max_grad_norm label_smoothing_factor bf16 fp16 neftune_noise_alpha"),
    (_FORWARD, "average_tokens_across_devices"),
    (_ORDER, "data_seed dataloader_drop_last train_sampling_strategy accelerator_config"),
    (_SIZE, "per_device_train_batch_size gradient_accumulation_steps"),
    (_RANDOM, "seed"),
    (_OPTIMIZER, "optim"),
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
        *(name for name, rule in RULES.items() if rule in (_UPDATES, _SCHEDULE, _FORWARD, _LENGTH)),
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
) -> tuple[Difference, ...]:
    """Return the arguments that are not what they were, the gravest first.

    Args:
        stored: Those of the checkpoint, as `plain_arguments` gave them.
        now: Those of this start.
        own_optimizer: Whether the optimizer is one of the user's own: no argument makes it.
        same_size: Whether a step has as many samples as it had, on all ranks together.
    """
    rules = dict(RULES)
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

    Args:
        callback: It has one of the two.

    Example:
        >>> from transformers import EarlyStoppingCallback
        >>> patience = EarlyStoppingCallback(early_stopping_patience=3)
        >>> CallbackState(patience).state_dict()
        {'early_stopping_patience_counter': 0}
    """

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def state_dict(self) -> Any:
        """Return what training has made of it; not what it was built with."""
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


def policy_of(trainer: Trainer, *, is_named: bool) -> ResumePolicy:
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
    return ResumePolicy((*start.allow, *meant, *follows), start.skip, start.exact_resume, parts)


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
        "trainer": _facts_of_subclass(trainer),
    }


def _facts_of_subclass(trainer: Trainer) -> dict[str, Any]:
    """Return what a user's subclass does in a step: its code, and the settings that this uses.

    They are those of the first call: what training has made of attributes since is no setting.
    """
    if trainer.subclass is None:
        kinds = [one for one in type(trainer).__mro__ if functions_of(one, _NOT_IN_A_STEP)]
        named = {qualified_name(one): one for one in kinds}
        around = {name: values_around(one, _NOT_IN_A_STEP) for name, one in named.items()}
        used = names_used_by(*kinds, leave_out=_NOT_IN_A_STEP) if kinds else set()
        own = own_attributes(trainer).items()
        values = {n: value for n, value in own if n in used and _is_setting(value)}
        trainer.subclass = {
            "classes": [*named],
            "source": {n: source_digest(k, leave_out=_NOT_IN_A_STEP) for n, k in named.items()},
            "globals": {name: values for name, values in around.items() if values},
            "values": facts_of_items(values, used=used),
        }
    return trainer.subclass


def _is_setting(value: Any) -> bool:
    """Return whether a value is no object of a library, such as a writer, and no network."""
    if isinstance(value, torch.nn.Module):
        return next(value.parameters(), None) is None
    plain = (bool, int, float, str, list, tuple, set, dict, torch.Tensor, torch.dtype)
    return isinstance(value, plain) or callable(value) or is_users_own(type(value))


_NOT_IN_A_STEP = frozenset(
    (
        *("__init__", "evaluate", "predict", "evaluation_loop", "prediction_step", "_evaluate"),
        *("get_eval_dataloader", "get_test_dataloader", "_get_eval_sampler", "compute_metrics"),
        *("log", "log_metrics", "save_metrics", "save_state", "save_model", "_save"),
        *("_save_checkpoint", "push_to_hub", "create_model_card", "floating_point_ops"),
        *("state_dict", "load_state_dict", "is_world_process_zero"),
    )
)
"""Methods of the host that a subclass may have in its own way, and the weights do not follow."""


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
        "cut": to_stored(run.cut),
        "host": "transformers",
        "max_steps": state.max_steps,
        "place": to_stored(run.follower.place),
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
    was, now = from_stored(Cut, stored["cut"]).samples_in_step, run.cut.samples_in_step
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
