"""From a configuration to the parts that a Trainer is made of."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from unbroken.capture import Stateful
from unbroken.checkpoint import Checkpointer, ResumePolicy
from unbroken.checkpoint.arguments import check_state
from unbroken.checkpoint.checkpointer import TAKEN
from unbroken.data import BatchSource, batch_source, derive_key
from unbroken.distributed import Group, RankSums, join
from unbroken.distributed.dtensors import is_dtensor
from unbroken.errors import ConfigError
from unbroken.storage import CompressedStorage, LocalStorage, Storage
from unbroken.store import KeepEvery, KeepPolicy
from unbroken.store.run.directory import as_directory_error
from unbroken.training.callback import named, with_state
from unbroken.training.config import LeftOpen, TrainerConfig
from unbroken.training.config_rules import IN_DATA, LENGTH, LENGTH_SETTINGS, Examination
from unbroken.training.display import Display, Silence
from unbroken.training.evaluation import Evaluator
from unbroken.training.gradient_sums.data_parallel import Division
from unbroken.training.gradient_sums.fsdp import FsdpSum
from unbroken.training.gradient_sums.lanes import LaneSum
from unbroken.training.rng import Randomness, seed_ambient
from unbroken.training.step import LossFn, Stepper

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


def joined(config: TrainerConfig | None) -> Group:
    """Return the ranks of torchrun's environment; they are left when this process exits."""
    config = TrainerConfig() if config is None else config
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    name = auto if config.device == "auto" else config.device.partition(":")[0]
    group = join(device_type=name, timeout=config.ddp_timeout)
    atexit.register(group.close)  # a process group that is left to the interpreter may abort it
    return group


def pick_display(display: Display | None, group: Group) -> Display:
    """Return the display; rank 0 alone has one."""
    if group.rank > 0:
        return Silence()
    return Display() if display is None else display


def pick_device(name: str, group: Group) -> torch.device:
    """Return the device that `TrainerConfig.device` names; on several ranks each its own GPU.

    Raises:
        ConfigError: If PyTorch knows no such device, or it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", expected='"auto" or a torch.device', found=name) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", "there is no CUDA device here", found=name)
    if name == "cuda" and group.world_size > 1:
        return torch.device("cuda", group.local_rank)
    return device


def for_ranks(config: TrainerConfig, division: Division) -> TrainerConfig:
    """Return the configuration with what follows from the number of ranks; check that it fits.

    Raises:
        ConfigError: If the ranks cannot share the work as it is cut.
    """
    parts, is_sharded = division.parts, division.by_fsdp
    if division.group.world_size == 1:
        return config
    if config.micro_batch_size == "auto":
        ranks = f"{division.group.world_size} ranks"
        raise ConfigError("micro_batch_size", '"auto" is for one rank', found=ranks)
    if config.lanes is not None and is_sharded:
        hint = "lanes are for models that each rank holds as a whole"
        raise ConfigError("lanes", "FSDP adds gradients in its own order", hint=hint)
    if config.lanes is not None and config.lanes % parts:
        raise ConfigError("lanes", expected=f"a multiple of {parts} ranks", found=config.lanes)
    if config.micro_batch_size is None and config.lanes is None:
        if config.batch_size % parts:
            expected = f"a multiple of {parts} ranks"
            raise ConfigError("batch_size", expected=expected, found=config.batch_size)
        return config.replace(micro_batch_size=config.batch_size // parts)
    return config


def for_loader(config: TrainerConfig, data: Any, division: Division) -> TrainerConfig:
    """Return the configuration with the batch size of a `DataLoader`, if it was left open.

    Raises:
        ConfigError: If the loader gives batches of another size than the configuration says.
    """
    size = _size_in_loader(data)
    micro, batch = config.micro_batch_size, config.batch_size
    share = division.parts if config.lanes is None else config.lanes
    if size is None or size == micro:
        return config
    if isinstance(batch, LeftOpen) and not isinstance(micro, int):
        return config.replace(batch_size=size * share)
    if not isinstance(micro, int) and batch == size * share:
        return config
    hint = "give the loader this size, or its data set, which is cut here"
    if batch % (size * share) == 0:
        hint = f"micro_batch_size={size} accumulates its batches; or {hint}"
    of_all = "" if share == 1 else f", {share} of which are a step"
    where, expected, found = "batch_size", size * share, batch
    if isinstance(micro, int):
        where, expected, found = "micro_batch_size", size, micro
    raise ConfigError(
        where,
        "is not that of the DataLoader",
        expected=f"{expected} (it gives batches of {size}{of_all})",
        found=found,
        hint=hint,
    )


def _size_in_loader(data: Any) -> int | None:
    """Return how many samples the batches of a `DataLoader` have, where it says so."""
    if not isinstance(data, DataLoader):
        return None
    sampler = data.batch_sampler
    size = getattr(sampler, "batch_size", data.batch_size)
    is_shared = any(getattr(one, "split_batches", False) for one in (data, sampler))
    return size if isinstance(size, int) and not is_shared else None  # of accelerate, by ranks


def make_source(
    dataset: Any,
    config: TrainerConfig,
    collate_fn: Callable[[list[Any]], Any] | None,
    on_skip: Callable[[int, int, float], None],
    division: Division,
) -> BatchSource:
    """Return the source of training batches; `on_skip` is told what skipping costs."""
    return batch_source(
        dataset,
        seed=config.seed if config.data_seed is None else config.data_seed,
        global_batch_size=int(config.batch_size),
        micro_batch_size=config.per_forward,
        shuffle=config.shuffle,
        drop_last=config.dataloader_drop_last,
        epoch_size=config.samples_per_epoch,
        collate_fn=collate_fn,
        num_workers=config.dataloader_num_workers,
        pin_memory=config.dataloader_pin_memory,
        prefetch_factor=config.dataloader_prefetch_factor,
        on_skip=on_skip,
        may_change=[fact for name in config.allow for fact in IN_DATA.get(name, ())],
        rank=division.part,
        world_size=division.parts,
    )


def place_of_run(config: TrainerConfig, storage: Storage | None, group: Group) -> str | Storage:
    """Return where the run directory is.

    Raises:
        ConfigError: Checkpoints are to be compressed, but the library for it is not installed.
        RunDirectoryError: They are, and the directory cannot be made.
    """
    if not config.save_compressed:
        return config.output_dir if storage is None else storage
    with as_directory_error(config.output_dir):
        if storage is None:
            storage = LocalStorage(config.output_dir, create=group.rank == 0)
        return CompressedStorage(storage)


def make_checkpointer(
    trainer: Trainer,
    place: str | Storage,
    state: Mapping[str, object],
    settings: Mapping[str, Mapping[str, Any]] | None,
    types: Sequence[type],
    fingerprint: Callable[[], Mapping[str, Any]],
    loss_fn: LossFn | None,
    clock: Callable[[], float],
    wall_clock: Callable[[], float],
) -> Checkpointer:
    """Return what saves and resumes the run of a trainer."""
    config = trainer.config
    checkpointer = Checkpointer(
        place,
        branch=config.branch,
        save_steps=config.save_steps,
        save_minutes=config.save_minutes,
        max_lost_minutes=config.max_lost_minutes,
        mtbf_hours=config.mtbf_hours,
        keep=_keep_policy(config),
        types=types,
        clock=clock,
        wall_clock=wall_clock,
        settings=settings,
        policy=_resume_policy(config),
        fingerprint=fingerprint,
        examine=Examination(trainer, own_optimizer=trainer.has_own_optimizer),
        told=_made_by_settings(trainer),
        group=trainer.group,
        read_from=config.read_from,
        per_rank=(),  # all is derived: the ranks have the same
        save_mode=config.save_mode,
        tell=trainer.display.note,
        **_named_objects(trainer, state),
    )
    checkpointer.apart = ("callbacks", "scheduler", "trainer", *state)  # the user's own
    checkpointer.attributes.more = partial(_followers, trainer, loss_fn)
    checkpointer.attributes.reads_ahead = config.dataloader_num_workers > 0
    return checkpointer


def _followers(trainer: Trainer, loss_fn: LossFn | None) -> dict[str, object]:
    """Return what else may remember something of a run, besides what is registered."""
    callbacks = {f"callbacks.{name}": one for name, one in named(trainer.callbacks).items()}
    return {"trainer": trainer, "loss": loss_fn, **callbacks}


def _made_by_settings(trainer: Trainer) -> list[str]:
    """Return the objects that the configuration made, and so tells enough of."""
    made = {"optimizer": trainer.has_own_optimizer, "scheduler": trainer.has_own_schedule}
    return [name for name, is_own in made.items() if is_own]


def _resume_policy(config: TrainerConfig) -> ResumePolicy:
    """Return which differences a run accepts: those it names, and what follows from them."""
    follows = () if config.exact_resume == "require" else (LENGTH,)
    follows = (*follows, *(LENGTH_SETTINGS if LENGTH in config.allow else ()))
    parts = {"fp16": "scaler", "lr_scheduler_type": "scheduler", "optim": "optimizer"}
    return ResumePolicy((*config.allow, *follows), config.skip, config.exact_resume, parts)


def _named_objects(trainer: Trainer, more: Mapping[str, object]) -> dict[str, object]:
    """Return all that a checkpoint of a run holds, by name.

    Raises:
        ConfigError: If `more` uses a name that is taken, or holds what cannot be saved.
    """
    callbacks = with_state(trainer.callbacks)
    own = {
        "model": trainer.model,
        "optimizer": trainer.optimizer,
        "scheduler": trainer.scheduler,
        "scaler": trainer.precision.scaler,
        "data": trainer.source,
        "statistics": trainer.statistics,
        "callbacks": callbacks,
        "gradients": trainer.window,
        "trainer": trainer if isinstance(trainer, Stateful) else None,
    }
    known = [name for name, value in own.items() if name != "trainer" or value is not None]
    check_state(more, [*known, *TAKEN])
    return {n: value for n, value in {**own, **more}.items() if value is not None}


def refuse_missing_evaluation_data(trainer: Trainer) -> None:
    """Raise before the first step, and not at the first evaluation hours later.

    Raises:
        ConfigError: If evaluation is asked for, has no data, and is not the user's own.
    """
    evaluate = getattr(trainer.evaluate, "__qualname__", "")
    if trainer.config.evaluates and trainer.eval_dataset is None and evaluate == "Trainer.evaluate":
        raise ConfigError("eval_dataset", "is needed for eval_steps or eval_minutes")


def refuse_to_save(*, best_is_loaded: bool) -> None:
    """Raise where what is in memory is not the whole state of the run.

    Raises:
        ConfigError: If the model holds its best weights.
    """
    if best_is_loaded:
        raise ConfigError("save_checkpoint", "the model holds its best weights, not its last")


def make_lanes(trainer: Trainer) -> LaneSum | FsdpSum | None:
    """Return what sums gradients over lanes and ranks; None where there is one of both.

    Raises:
        ConfigError: If the model has batch statistics, which would be those of each portion;
            or if sharded gradients were to be scaled.
    """
    division, model = trainer.division, trainer.model
    if trainer.config.fp16 and any(is_dtensor(p) for p in model.parameters()):
        hint = "use bf16, which needs no gradient scaling"
        raise ConfigError("fp16", "is not for models that are sharded over ranks", hint=hint)
    lanes = trainer.config.lanes or division.parts
    if lanes == 1 and not division.by_fsdp:
        return None
    normal = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 (the base of all of them)
    found = [name for name, m in model.named_modules() if isinstance(m, normal)]
    if found:
        raise ConfigError(
            f"model.{found[0]}",
            "its statistics would be those of each rank's or lane's samples",
            hint="use another normalisation (GroupNorm, LayerNorm), or one rank without lanes",
        )
    if division.by_fsdp:
        return FsdpSum(model, division)
    sums = RankSums(trainer.group, division.replicas)
    return LaneSum(model, lanes // division.parts, trainer.group, sums)


def make_stepper(
    trainer: Trainer, forward: nn.Module, loss_fn: LossFn | None, randomness: Randomness
) -> Stepper:
    """Return what takes the optimizer steps of a trainer."""
    return Stepper(
        forward,
        trainer.optimizer,
        trainer.scheduler,
        precision=trainer.precision,
        window=trainer.window,
        loss_fn=loss_fn,
        device=trainer.device,
        division=trainer.division,
        lanes=make_lanes(trainer),
        randomness=randomness,
        seed=trainer.config.seed,
    )


def make_ready(trainer: Trainer) -> None:
    """Put the model and the ambient generators into the state that a fresh run begins in."""
    # A model in evaluation mode as a whole was only loaded that way; one with some frozen
    # parts in evaluation mode was put so on purpose.
    if not trainer.model.training:
        trainer.model.train()
    trainer.optimizer.zero_grad(set_to_none=True)
    seed_ambient(derive_key(trainer.config.seed, "ambient"))


def make_evaluator(
    trainer: Trainer,
    forward: nn.Module,
    collate_fn: Callable[[list[Any]], Any] | None,
    loss_fn: LossFn | None,
) -> Evaluator:
    """Return what computes the loss of evaluation data."""
    return Evaluator(
        forward,
        trainer.config,
        collate_fn,
        loss_fn,
        precision=trainer.precision,
        device=trainer.device,
        division=trainer.division,
    )


def _keep_policy(config: TrainerConfig) -> KeepPolicy:
    """Return which checkpoints stay."""
    every = config.keep_every_n_steps
    return KeepPolicy(
        last=config.save_total_limit,
        every=() if every is None else (KeepEvery(every),),
    )


def prepared_for_forward(model: nn.Module, config: TrainerConfig) -> nn.Module:
    """Return what the loop calls: the model itself, or its compiled form.

    Raises:
        ConfigError: If gradient checkpointing is asked of a model that has none.
    """
    if config.gradient_checkpointing:
        enable = getattr(model, "gradient_checkpointing_enable", None)
        if enable is None:
            raise ConfigError(
                "gradient_checkpointing",
                "the model has no gradient_checkpointing_enable()",
                found=type(model).__name__,
            )
        enable()
    return torch.compile(model) if config.torch_compile else model  # type: ignore[return-value]
