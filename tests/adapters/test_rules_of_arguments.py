"""A difference in any argument of the host's is seen, and told with what it means."""

from __future__ import annotations

from dataclasses import fields
from enum import Enum
from typing import Any

import pytest
from transformers import TrainingArguments

from unbroken.adapters.transformers.changes import (
    _OF_THE_START,
    argument_differences,
    plain_arguments,
)

HARMLESS = """
logging_strategy logging_steps logging_first_step log_on_each_node log_level log_level_replica
disable_tqdm include_num_input_tokens_seen eval_strategy eval_steps eval_delay
per_device_eval_batch_size prediction_loss_only eval_on_start eval_do_concat_batches
eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics save_strategy
save_steps save_on_each_node save_total_limit skip_memory_metrics logging_nan_inf_filter
bf16_full_eval fp16_full_eval torch_empty_cache_steps report_to run_name project trackio_space_id
trackio_bucket_id label_names trackio_static_space_id hub_revision hub_always_push push_to_hub
hub_model_id hub_private_repo hub_strategy remove_unused_columns length_column_name
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order ddp_timeout
load_best_model_at_end metric_for_best_model greater_is_better max_steps num_train_epochs
"""
EQUIVALENT = """
torch_compile torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config
activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
gradient_checkpointing_kwargs tf32 full_determinism use_cpu use_cache parallelism_config
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
"""
CHANGED = """
weight_decay adam_beta1 adam_beta2 adam_epsilon optim_args optim_target_modules learning_rate
lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio max_grad_norm
label_smoothing_factor bf16 fp16 neftune_noise_alpha average_tokens_across_devices data_seed
dataloader_drop_last train_sampling_strategy accelerator_config per_device_train_batch_size
gradient_accumulation_steps seed
"""
OF_VERDICT = {
    "harmless": HARMLESS,
    "equivalent": EQUIVALENT,
    "changed": CHANGED,
    "refused": "optim",
}
VERDICTS = {name: verdict for verdict, names in OF_VERDICT.items() for name in names.split()}
NAMES = sorted({field.name for field in fields(TrainingArguments) if field.init} - _OF_THE_START)


def arguments(folder) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to="none")


class Given:
    """Stands for an object of accelerate's, which says what it is in JSON."""

    def to_json(self) -> dict[str, int]:
        return {"tp_size": 2}


def another(value: Any) -> Any:
    """Return another value of the same kind."""
    if isinstance(value, Enum):
        return next(one for one in type(value) if one != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 7
    return {"a": 1} if isinstance(value, dict) else "another"


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_any_one_argument_is_told_with_what_it_means(name, tmp_path):
    before, after = arguments(tmp_path), arguments(tmp_path)
    value = another(getattr(before, name))
    setattr(after, name, Given() if name == "parallelism_config" else value)
    stored, now = plain_arguments(before), plain_arguments(after)
    found = argument_differences(stored, now)
    # An argument that came with a later version of the host is taken for one that matters.
    assert [(one.path, one.verdict) for one in found] == [(name, VERDICTS.get(name, "changed"))]
    assert argument_differences(stored, stored) == ()


def test_what_says_how_to_start_is_not_compared():
    """Each name that is left out here is left out on purpose: this list is the whole of it."""
    assert sorted(_OF_THE_START) == [
        "auto_find_batch_size", "debug", "deepspeed", "do_eval", "do_predict", "do_train",
        "enable_jit_checkpoint", "fsdp", "fsdp_config", "hub_token", "ignore_data_skip",
        "local_rank", "output_dir", "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint", "save_only_model",
    ]  # fmt: skip
