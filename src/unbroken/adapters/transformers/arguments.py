"""The host's TrainingArguments of two starts compared: what a difference in each means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unbroken.checkpoint import Difference, Rule, compare
from unbroken.fingerprint import plain_or_text

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
