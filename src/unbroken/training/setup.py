"""From a configuration to the parts that a Trainer is made of."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from unbroken.capture import capture_rng, restore_rng
from unbroken.checkpoint import ReadAhead, ResumeChoice, read_ahead
from unbroken.checkpoint.resume.selection import may_resume
from unbroken.data import BatchSource, MapSource, batch_source, derive_key
from unbroken.data.keyed_rng import Randomness, seed_ambient
from unbroken.distributed import Group, join
from unbroken.errors import ConfigError
from unbroken.storage import LocalStorage, Storage, storage_at
from unbroken.training.config import LeftOpen, TrainerConfig
from unbroken.training.config_rules import IN_DATA
from unbroken.training.data_parallel import DataParallelLayout, without_ddp
from unbroken.training.display import Display, NoDisplay
from unbroken.training.micro_batches import LossFn, Precision
from unbroken.training.optim import make_optimizer, make_scheduler, refuse_closures
from unbroken.training.run_state import RunState, count_steps

# Making the model: with its first weights, or without where a checkpoint brings all of them.


MakeModel = Callable[[], nn.Module]
"""Makes the model anew, with its first weights drawn from PyTorch's generators."""


class DeferredModel:
    """A model that may have been made without first weights.

    Drawing them is most of what making a large model takes, and a resume overwrites them. Where a
    checkpoint is there, the model is made on PyTorch's meta device, and gets memory that holds
    anything; a checkpoint has all parameters and all buffers. A model that has more than these,
    or that looks at its weights while it is made, is made as usual.

    Args:
        model: The model, or what makes it.
        config: Says whether the run resumes, and where it is.
        storage: Where the run directory is; None: the folder that `config` names.
        reads_ahead: Whether tensors of the checkpoint may be read while the model is made: this
            process reads all of them, and has them in the memory that they are read into.

    Attributes:
        model: The model.
        ahead: What is read of the checkpoint meanwhile, or None.
    """

    def __init__(
        self,
        model: nn.Module | MakeModel,
        config: TrainerConfig,
        storage: Storage | None,
        *,
        reads_ahead: bool,
    ) -> None:
        self._make: MakeModel | None = None
        self.ahead: ReadAhead | None = None
        if isinstance(model, nn.Module):
            self.model = model
            return
        self._rng = capture_rng()
        found = None
        if _resumes(config, storage):
            self.ahead = _begin_to_read(config, storage) if reads_ahead else None
            found = _without_weights(model)
            if self.ahead is not None and not self.ahead.has_paid():
                self._read_no_longer()
        restore_rng(self._rng)
        if found is None:
            self._read_no_longer()
            self.model = model()
        else:
            self.model, self._make = found, model

    def make_room(self, device: torch.device) -> None:
        """Give the model uninitialised memory on a device."""
        if self._make is not None:
            _make_room(self.model, device)

    def has_weights(self) -> None:
        """Note that a checkpoint has brought the weights."""
        self._read_no_longer()
        self._make = None

    def initialise(self) -> None:
        """Give the model the weights that it would have begun with, unless it has weights."""
        self._read_no_longer()
        make, self._make = self._make, None
        if make is None:
            return
        now = capture_rng()
        restore_rng(self._rng)
        first = make()
        restore_rng(now)
        with torch.no_grad():
            for live, initial in zip(_tensors(self.model), _tensors(first), strict=True):
                live.copy_(initial)
        for module, made in zip(self.model.modules(), first.modules(), strict=True):
            module.training = made.training

    def _read_no_longer(self) -> None:
        if self.ahead is not None:
            self.ahead.drop()


def _resumes(config: TrainerConfig, storage: Storage | None) -> bool:
    """Tell whether a checkpoint is likely to bring all weights; a guess that may be wrong."""
    if config.skip or config.branch is not None:
        return False
    if storage is None:
        storage = LocalStorage(config.output_dir) if os.path.isdir(config.output_dir) else None
    return may_resume(storage, ResumeChoice.parse(config.resume_from_checkpoint))


def _begin_to_read(config: TrainerConfig, storage: Storage | None) -> ReadAhead | None:
    """Start reading the checkpoint for the model and its optimizer."""
    if storage is None:
        if not os.path.isdir(config.output_dir):
            return None
        storage = storage_at(config.output_dir)
    selection = ResumeChoice.parse(config.resume_from_checkpoint)
    return read_ahead(storage, selection, ("model", "optimizer"))


def _without_weights(make: MakeModel) -> nn.Module | None:
    """Return the model on the meta device; None if it is not one that a checkpoint completes."""
    try:
        with torch.device("meta"), _without_collection():
            model = make()
    except (RuntimeError, TypeError, ValueError):  # it looks at its weights; as usual, then
        return None
    return model if _is_complete(model) else None


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause the garbage collector during a first import: that takes a third less time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _is_complete(model: nn.Module) -> bool:
    """Tell whether all of a model's tensors are parameters and buffers with memory of their own."""
    own = list(_tensors(model))
    memory = {tensor.untyped_storage()._cdata for tensor in own}  # noqa: SLF001 (no address on meta)
    others = (value for module in model.modules() for value in _values(vars(module)))
    plain = all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in own)
    return plain and len(memory) == len(own) and not any(map(torch.is_tensor, others))


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield all parameters and buffers, each once."""
    yield from model.parameters()
    yield from model.buffers()


def _values(attributes: dict[str, object]) -> Iterator[object]:
    """Yield what a module holds besides parameters, buffers and modules, also in containers."""
    for name, value in attributes.items():
        if name in ("_parameters", "_buffers", "_modules"):
            continue
        todo: list[object] = [value]
        while todo:
            one = todo.pop()
            yield one
            if isinstance(one, list | tuple | set):
                todo.extend(one)
            elif isinstance(one, dict):
                todo.extend(one.values())


def _make_room(model: nn.Module, device: torch.device) -> None:
    """Replace the memory of tensors; they stay the same objects, so ties are kept."""
    for tensor in list(_tensors(model)):
        if not tensor.is_meta:
            continue
        empty = torch.empty_strided(
            tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device=device
        )
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        vars(empty).update(vars(tensor))  # marks that libraries leave on parameters
        torch.utils.swap_tensors(tensor, empty)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Given:
    """What a user gives a Trainer to train, besides settings; the Trainer's docstring says more."""

    model: nn.Module | MakeModel
    train_dataset: Any
    optimizer: Optimizer | None
    scheduler: LRScheduler | None
    collate_fn: Callable[[list[Any]], Any] | None
    loss_fn: LossFn | None
    storage: Storage | None


@dataclass(frozen=True)
class Parts:
    """What a Trainer is made of: made once, in the order of `build_parts`, and never exchanged.

    Attributes:
        group: The ranks.
        division: How they share each step.
        device: Where the model is.
        construction: How the model got its first weights, or will.
        model: Without DistributedDataParallel around it.
        forward: The model, or its compiled form.
        precision: Autocast, scaling, clipping.
        source: The training batches; None: there is nothing to train on.
        optimizer: Takes the steps.
        scheduler: Stepped with it, unless it follows a metric.
        config_made_optimizer: Whether the configuration made it, and not the user.
        config_made_schedule: Likewise.
        may_halve: Whether a step that does not fit is tried again in smaller micro-batches.
        randomness: The global generators.
        loss_fn: As `compute_loss` takes it.
        collate_fn: Makes a batch of samples; None: PyTorch's default.
    """

    group: Group
    division: DataParallelLayout
    device: torch.device
    construction: DeferredModel
    model: nn.Module
    forward: nn.Module
    precision: Precision
    source: BatchSource | None
    optimizer: Optimizer
    scheduler: LRScheduler
    config_made_optimizer: bool
    config_made_schedule: bool
    may_halve: bool
    randomness: Randomness
    loss_fn: LossFn | None
    collate_fn: Callable[[list[Any]], Any] | None

    @property
    def batches(self) -> BatchSource:
        """The training batches.

        Raises:
            ConfigError: There are none.
        """
        if self.source is None:
            raise ConfigError("train_dataset", "is needed for training")
        return self.source

    def begin_fresh(self, seed: int) -> None:
        """Put the model and the ambient generators into the state that a fresh run begins in."""
        # A model in evaluation mode as a whole was only loaded that way; one with some frozen
        # parts in evaluation mode was put so on purpose.
        if not self.model.training:
            self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        seed_ambient(derive_key(seed, "ambient"))


def build_parts(
    given: Given, config: TrainerConfig, group: Group, on_skip: Callable[[int, int, float], None]
) -> tuple[Parts, RunState]:
    """Return the parts of a Trainer, and the state that its run begins in.

    The order matters. A model that was made without weights gets memory only where the ranks
    share it as the layout has found, and an optimizer takes parameters that are on the device.

    Raises:
        ConfigError: If settings and arguments do not fit together.
        DataError: If the data set is empty or shorter than a batch.
    """
    device = pick_device(config.device, group)
    in_place = device.type == "cpu" and group.world_size == 1
    construction = DeferredModel(given.model, config, given.storage, reads_ahead=in_place)
    model, data = without_ddp(construction.model, group), given.train_dataset
    division = DataParallelLayout.of(model, group)
    config = for_ranks(for_loader(config, data, division), division)
    construction.make_room(device)
    model = model.to(device)
    precision = Precision(config, device)
    source = None
    if data is not None:
        source = make_source(data, config, given.collate_fn, on_skip, division)
    max_steps = count_steps(config, source)
    optimizer = make_optimizer(model, config) if given.optimizer is None else given.optimizer
    refuse_closures(optimizer)
    scheduler = given.scheduler
    if scheduler is None:
        scheduler = make_scheduler(optimizer, config, max_steps)
    may_halve = _may_halve(config, source)
    parts = Parts(
        group,
        division,
        device,
        construction,
        model,
        prepared_for_forward(model, config),
        precision,
        source,
        optimizer,
        scheduler,
        config_made_optimizer=given.optimizer is None,
        config_made_schedule=given.scheduler is None,
        may_halve=may_halve,
        randomness=Randomness(cuda=device.type == "cuda"),
        loss_fn=given.loss_fn,
        collate_fn=given.collate_fn,
    )
    return parts, RunState(config, max_steps)


def _may_halve(config: TrainerConfig, source: BatchSource | None) -> bool:
    """Return whether `micro_batch_size="auto"` is asked for.

    Raises:
        ConfigError: If it is asked for data whose batches are not cut here.
    """
    if config.micro_batch_size != "auto":
        return False
    if source is not None and not isinstance(source, MapSource):
        raise ConfigError(
            "micro_batch_size",
            '"auto" needs a map-style data set: a loader makes its batches itself',
            found=type(source).__name__,
        )
    return True


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
        return NoDisplay()
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


def for_ranks(config: TrainerConfig, division: DataParallelLayout) -> TrainerConfig:
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


def for_loader(config: TrainerConfig, data: Any, division: DataParallelLayout) -> TrainerConfig:
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
    division: DataParallelLayout,
) -> BatchSource:
    """Return the source of training batches; `on_skip` is called with the progress of skipping."""
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


# Deterministic kernels for the length of a run, the user's settings put back after it.


@contextmanager
def deterministic_kernels(enabled: bool, device: torch.device) -> Iterator[None]:
    """Use only kernels that give the same bits each time; put the settings back on leaving.

    Args:
        enabled: False leaves everything as it is.
        device: On "cuda" the cuBLAS workspace is fixed too, unless the environment already
            says how (https://docs.nvidia.com/cuda/cublas/#results-reproducibility).

    Example:
        >>> with deterministic_kernels(True, torch.device("cpu")):
        ...     torch.are_deterministic_algorithms_enabled()
        True
    """
    if not enabled:
        yield
        return
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    # Filling only hides reads of uninitialised memory; it costs time and no result depends on it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
