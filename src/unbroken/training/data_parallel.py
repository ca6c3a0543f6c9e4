"""How ranks divide each step's data, and in which order they sum its gradients."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from unbroken.capture.tensors import is_dense
from unbroken.distributed import Group, RankSums, Tree
from unbroken.distributed.dtensors import (
    fsdp_modules,
    is_dtensor,
    local_part,
    meshes_of,
    sharded_as,
    with_mesh_of,
)
from unbroken.errors import ConfigError
from unbroken.training.config import TrainerConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class DataParallelLayout:
    """Which ranks take which part of a step's data.

    Ranks that hold one model together by tensor parallelism take the same part; for sums over
    the data the first of them is the leader.

    Attributes:
        group: The ranks.
        part: The part of this rank.
        parts: How many parts there are.
        takes: Which part each rank takes.
        replicas: The ranks that hold what this one holds, and have other parts; None: all.
        by_fsdp: Whether FSDP sums the gradients.
        is_sharded: Whether ranks hold a model together, by FSDP or tensor parallelism.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> DataParallelLayout.of(nn.Linear(1, 1), SingleProcess()).parts
        1
    """

    group: Group
    part: int
    parts: int
    takes: tuple[int, ...]
    replicas: dist.ProcessGroup | None = None
    by_fsdp: bool = False
    is_sharded: bool = False

    @classmethod
    def of(cls, model: nn.Module, group: Group) -> DataParallelLayout:
        """Return how the ranks share a model, as its meshes tell.

        Raises:
            ConfigError: If the model is sharded in part, or its mesh does not hold all ranks.
        """
        sharded = fsdp_modules(model)
        if sharded:
            _refuse_unsharded_parts(model)
            mesh = _only(meshes_of(sharded), "fully_shard")
            _refuse_other_ranks(mesh, group)
            return _along(mesh, group, by_fsdp=True)
        meshes = dict.fromkeys(p.device_mesh for p in model.parameters() if is_dtensor(p))
        if meshes:
            mesh = _only(list(meshes), "parallelize_module")
            _refuse_other_ranks(mesh, group)
            return _with_group(mesh, group)
        ranks = group.world_size
        return cls(group, group.rank, ranks, tuple(range(ranks)))

    @property
    def leaders(self) -> list[int]:
        """The representative rank of each part."""
        return [self.takes.index(part) for part in range(self.parts)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Let the group name the rank, where an exchange inside of a sharded model fails.

        Raises:
            RankError: `ranks` have left the group, or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            if self.is_sharded and (isinstance(error, dist.DistError) or "gloo" in str(error)):
                self.group.gather("a step", None)
            raise

    def gather(self, what: str, value: Any) -> list[Any]:
        """Return the value of each part, in the order of the parts, on all ranks."""
        values = self.group.gather(what, value)
        return [values[leader] for leader in self.leaders]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the parts, as float64, added in the order of the parts."""
        if self.parts == 1:
            return [float(value) for value in values]
        rows = self.gather("sum", [float(value) for value in values])
        return [reduce(add, column) for column in zip(*rows, strict=True)]

    def agree_on_the_beginning(self, model: nn.Module, max_steps: int) -> None:
        """Raise unless all ranks begin with the same weights and buffers, and take as many steps.

        Raises:
            RankError: Naming the ranks whose model is another one, or whose data are longer.
        """
        if self.group.world_size == 1:
            return
        self.group.agree("the number of steps (max_steps gives it)", max_steps)
        digest = xxhash.xxh3_128()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if isinstance(tensor, torch.Tensor):
                digest.update(f"{name} {tensor.requires_grad}".encode())
                digest.update(b"" if is_dtensor(tensor) else _raw(tensor))
        what = "the weights to begin with (seed before the model is built)"
        self.group.agree(what, digest.hexdigest())

    def agree_on_buffers(self, model: nn.Module) -> None:
        """Raise where forward passes made a buffer different on some rank: only one is saved.

        Raises:
            RankError: Naming the buffer, and the ranks on which it is another one.
        """
        if self.parts == 1:
            return
        buffers = {
            name: xxhash.xxh3_128(_raw(buffer)).hexdigest()
            for name, buffer in model.named_buffers()
            if not is_dtensor(buffer)
        }
        self.group.agree("model", buffers)


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data if tensor.numel() else memoryview(b"")


def _refuse_unsharded_parts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_dtensor(parameter):
            raise ConfigError(
                f"model.{name}",
                "is not sharded, though other parameters are: nobody would sum its gradient",
                hint="call fully_shard(model) after fully_shard of its parts",
            )


def _only(meshes: list[DeviceMesh], by: str) -> DeviceMesh:
    if len(meshes) > 1:
        found = ", ".join(map(str, meshes))
        raise ConfigError("model", f"{by} was called with several meshes", found=found)
    return meshes[0]


def _along(mesh: DeviceMesh, group: Group, *, by_fsdp: bool) -> DataParallelLayout:
    """Return the division along a mesh: each of its ranks takes a part of its own."""
    part = mesh.mesh.flatten().tolist().index(group.rank)
    replicas = None
    if not by_fsdp:
        replicas = (mesh if mesh.ndim == 1 else mesh._flatten()).get_group()  # noqa: SLF001
    takes = _taken(group, part)
    return DataParallelLayout(group, part, mesh.size(), takes, replicas, by_fsdp, is_sharded=True)


def _with_group(mesh: DeviceMesh, group: Group) -> DataParallelLayout:
    """Return the division along the dimensions that tensor parallelism left over."""
    root = mesh._get_root_mesh()  # noqa: SLF001 (not public)
    over = tuple(n for n in root.mesh_dim_names or () if n not in (mesh.mesh_dim_names or ()))
    if over:
        return _along(root[over], group, by_fsdp=False)
    return DataParallelLayout(group, 0, 1, _taken(group, 0), is_sharded=True)


def _refuse_other_ranks(mesh: DeviceMesh, group: Group) -> None:
    root = mesh._get_root_mesh()  # noqa: SLF001 (not public)
    if root.size() != group.world_size:
        raise ConfigError(
            "model",
            "its device mesh must hold all ranks",
            expected=f"{group.world_size} ranks",
            found=f"{root.size()}: {root}",
            hint="shard along the dimensions of one mesh: init_device_mesh(device, (2, 2), "
            'mesh_dim_names=("data", "tensor"))',
        )


def _taken(group: Group, part: int) -> tuple[int, ...]:
    parts: list[Any] = group.gather("the part of the data", part)
    return tuple(parts)


# A model that comes in `DistributedDataParallel`: the Trainer exchanges gradients itself.


def without_ddp(model: nn.Module, group: Group) -> nn.Module:
    """Return the model itself; its parameters are the ones that an optimizer already has.

    What the wrapper was told beyond exchanging gradients would be lost, and is refused.

    Raises:
        ConfigError: If it has a communication hook, mixed precision, ignored parameters or
            a process group of its own; or is inside another module.
    """
    if not isinstance(model, DistributedDataParallel):
        inner = [
            name for name, m in model.named_modules() if isinstance(m, DistributedDataParallel)
        ]
        if inner:
            raise ConfigError(
                "model",
                f"has DistributedDataParallel inside: {inner[0]}",
                hint="give the module itself; TrainerConfig(torch_compile=True) compiles it",
            )
        return model
    special = {
        "a communication hook": bool(model._comm_hooks),  # noqa: SLF001 (torch has no public name)
        "mixed precision": model.mixed_precision is not None,
        "ignored parameters": bool(model.parameters_to_ignore),
        "a process group of its own": model.process_group.size() != group.world_size,
    }
    found = [what for what, is_there in special.items() if is_there]
    if found:
        raise ConfigError(
            "model",
            f"its DistributedDataParallel has {found[0]}, which would be ignored",
            hint="give the module itself: the Trainer exchanges gradients",
        )
    return model.module  # type: ignore[no-any-return]


# Lanes: gradients summed in one fixed order, on however many ranks they are computed.
#
# A step's micro-batches are dealt to L lanes in equal, contiguous parts, and ranks take whole
# lanes. Each lane's gradient is computed by itself, and the lanes are added in one binary tree:
# neighbours first, then neighbours of these. What a rank holds of the tree is a whole branch of
# it, so the sums are the same additions in the same order on 1, 2, 4, ... L ranks, and their bits
# are the same.
#
# All this happens while the last backward pass of a lane runs: as soon as all gradients of a
# bucket are there, they are taken into the tree, and in the last lane its sum is sent to the
# other ranks.


# Gradients of many parameters as few flat tensors, which ranks exchange quickly.


_BYTES = 8 << 20  # of a bucket: a larger one is sent later, smaller ones cost more messages


def in_buckets(parameters: Iterable[nn.Parameter], padded: Callable[[int], int]) -> list[Bucket]:
    """Deal parameters to buckets, the last one first: its gradient is there first.

    The buckets are the same in each step and each process, unlike those of
    `DistributedDataParallel`, which follow the order in which gradients came in the first step.

    Args:
        parameters: In the order of the model.
        padded: From a number of elements to the length of a bucket's flat tensor.
    """
    buckets: list[list[nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for parameter in reversed(list(parameters)):
        bucket = open_buckets.get((parameter.dtype, parameter.device), [])
        if not bucket or _bytes([*bucket, parameter]) > _BYTES:
            buckets.append(bucket := [])
            open_buckets[parameter.dtype, parameter.device] = bucket
        bucket.append(parameter)
    return [Bucket(bucket, padded) for bucket in buckets]


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(part.numel() * part.element_size() for part in map(local_part, parameters))


class Bucket:
    """Some parameters of one dtype and device, and the sum of their gradients over the lanes.

    Of a parameter that ranks hold together it is the part of this rank.

    Attributes:
        parameters: As given.
        tree: Adds the lanes of this rank.
        with_gradient: Those that had a gradient in any lane of the step, by id.
        is_taken: Whether the gradients of the present lane are in the tree.
    """

    def __init__(self, parameters: list[nn.Parameter], padded: Callable[[int], int]) -> None:
        self.parameters = parameters
        self.tree = Tree()
        self.with_gradient: set[int] = set()
        self.is_taken = True
        self._parts = [local_part(p) for p in parameters]
        self._sizes = [part.numel() for part in self._parts]
        self._used = sum(self._sizes)
        self._numel = padded(self._used)
        self._missing: set[int] = set()

    def begin_step(self) -> None:
        """Forget what was taken."""
        self.tree.clear()
        self.with_gradient.clear()

    def expect_all(self) -> None:
        """Begin the last backward pass of a lane."""
        self.is_taken, self._missing = False, {id(p) for p in self.parameters}

    def arrived(self, parameter: Tensor) -> None:
        """Take note that a gradient is there."""
        self._missing.discard(id(parameter))

    @property
    def is_complete(self) -> bool:
        """Whether all gradients of the lane are there."""
        return not self._missing

    def take(self) -> None:
        """Add the gradients to the tree; the parameters have none after it."""
        self.is_taken = True
        flat = self._parts[0].detach().new_empty(self._numel)
        flat[self._used :].zero_()
        into, gradients = [], []
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            if parameter.grad is None:
                view.zero_()
                continue
            into.append(view)
            gradients.append(local_part(sharded_as(parameter, parameter.grad)))
            self.with_gradient.add(id(parameter))
            parameter.grad = None
        if gradients:
            torch._foreach_copy_(into, gradients)
        self.tree.add(flat)

    def give(self, flat: Tensor, absent: Container[int]) -> None:
        """Give the parameters their parts of a sum as gradients; those in `absent` have none."""
        for parameter, view in zip(self.parameters, self._views(flat), strict=True):
            parameter.grad = None if id(parameter) in absent else with_mesh_of(parameter, view)

    def _views(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat[: self._used], self._sizes)
        return [_shaped_as(p, part) for p, part in zip(self._parts, parts, strict=True)]


def _shaped_as(parameter: Tensor, part: Tensor) -> Tensor:
    """Return a flat part in the shape of a parameter, in memory alike, as autograd has it."""
    if parameter.is_contiguous() or not is_dense(tuple(parameter.shape), parameter.stride()):
        return part.view(parameter.shape)
    return part.as_strided(parameter.shape, parameter.stride())


class LaneReducer:
    """Sums the gradients and the loss of one step, lane by lane, and then over the ranks.

    A parameter without a gradient in a lane counts as zeros there; one that has none in any lane
    has none in the end.
    """

    def __init__(self, model: nn.Module, lanes: int, group: Group, sums: RankSums) -> None:
        self.lanes = lanes
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self._group, self._sums = group, sums
        self._buckets: list[Bucket] = []
        self._hooks: list[RemovableHandle] = []
        self._losses = Tree()
        self._lanes_taken = self._buckets_taken = 0
        self._is_ending = False

    def begin_step(self) -> None:
        """Begin a step, whatever became of the one before."""
        trainable = [parameter for parameter in self._names if parameter.requires_grad]
        laid_out = {id(p) for bucket in self._buckets for p in bucket.parameters}
        if {id(parameter) for parameter in trainable} != laid_out:
            self._lay_out(trainable)
        for bucket in self._buckets:
            bucket.begin_step()
        self._sums.clear()
        self._losses.clear()
        self._lanes_taken, self._is_ending = 0, False

    def _lay_out(self, trainable: list[nn.Parameter]) -> None:
        for hook in self._hooks:
            hook.remove()
        self._buckets = in_buckets(trainable, self._sums.padded)
        notify = partial(partial, _on_gradient_ready, ref(self))
        hooks = [(notify(number), bucket) for number, bucket in enumerate(self._buckets)]
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for hook, bucket in hooks
            for parameter in bucket.parameters
        ]

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Take the gradients of a lane during its last backward pass; none is left after it."""
        self._buckets_taken, self._is_ending = 0, True
        for bucket in self._buckets:
            bucket.expect_all()
        try:
            yield
        finally:
            self._is_ending = False
        for bucket in self._buckets[self._buckets_taken :]:
            self._take(bucket)
        self._lanes_taken += 1

    def on_gradient(self, number: int, parameter: Tensor) -> None:
        """Take the buckets that are complete, in the one order that all ranks have."""
        if not self._is_ending:
            return
        bucket = self._buckets[number]
        if bucket.is_taken:
            raise self._twice(parameter)
        bucket.arrived(parameter)
        while self._buckets_taken < len(self._buckets):
            if not self._buckets[self._buckets_taken].is_complete:
                break
            self._take(self._buckets[self._buckets_taken])

    def _take(self, bucket: Bucket) -> None:
        bucket.take()
        self._buckets_taken += 1
        if self._lanes_taken == self.lanes - 1:
            self._sums.begin(bucket.tree.total())

    def add_loss(self, loss: Tensor) -> None:
        """Count the loss of a lane; it travels as float64, the same bits on all ranks."""
        self._losses.add(loss.detach().double())

    def finish(self) -> Tensor:
        """Give the parameters the sum over all lanes of all ranks; return that of the losses."""
        loss = self._losses.total()
        self._sums.begin(torch.nn.functional.pad(loss.view(1), (0, self._sums.padded(1) - 1)))
        absent = self._absent_on_all()
        *flats, losses = self._sums.finish()
        for bucket, flat in zip(self._buckets, flats, strict=True):
            bucket.give(flat, absent)
        return losses[0].float()

    def _absent_on_all(self) -> set[int]:
        """Return the ids of the parameters that had no gradient in any lane of any rank."""
        had = {one for bucket in self._buckets for one in bucket.with_gradient}
        own = [index for index, p in enumerate(self._names) if p.requires_grad and id(p) not in had]
        ranks: Any = self._group.gather("parameters without a gradient", own)
        parameters = list(self._names)
        return {id(parameters[index]) for index in set(ranks[0]).intersection(*ranks[1:])}

    def _twice(self, parameter: Tensor) -> ConfigError:
        name = next(name for p, name in self._names.items() if p is parameter)
        return ConfigError(
            f"model.{name}",
            "had a second gradient in one backward pass, after the first was sent",
            hint="gradient checkpointing: use_reentrant=False",
        )


def _on_gradient_ready(reducer: ref[LaneReducer], bucket: int, parameter: Tensor) -> None:
    """Pass a gradient on; weakly, as the garbage collector does not see what a hook holds."""
    if (there := reducer()) is not None:
        there.on_gradient(bucket, parameter)


# What an optimizer step asks of whoever sums its gradients over lanes and ranks.


class GradientSync(Protocol):
    """Sums the gradients and the loss of one step over lanes and ranks."""

    lanes: int
    """How many lanes this rank has: equal, contiguous parts of its micro-batches."""

    def begin_step(self) -> None:
        """Begin a step, whatever became of the one before."""

    def last_backward(self) -> AbstractContextManager[None]:
        """Take the gradients of a lane during its last backward pass."""

    def add_loss(self, loss: Tensor) -> Tensor | None:
        """Take the loss of a lane; return it where it is to stay in the window."""

    def finish(self) -> Tensor | None:
        """Finish the sums; return the loss of the step, unless it stayed in the window."""


class NoSync:
    """One rank without lanes: gradients gather in the parameters, and the loss in the window."""

    lanes = 1

    def begin_step(self) -> None:
        """Do nothing."""

    def last_backward(self) -> AbstractContextManager[None]:
        """Do nothing: gradients stay where autograd adds them."""
        return nullcontext()

    def add_loss(self, loss: Tensor) -> Tensor | None:
        """Leave the loss in the window."""
        return loss

    def finish(self) -> Tensor | None:
        """Do nothing: the loss is in the window."""
        return None


class FsdpReducer:
    """Lets FSDP exchange gradients in the last backward pass of a step alone.

    The losses are already shares of the step's mean, so gradients are summed, not averaged.

    Attributes:
        lanes: 1: FSDP adds gradients in its own order.
    """

    def __init__(self, model: nn.Module, division: DataParallelLayout) -> None:
        self.lanes = 1
        self._modules = fsdp_modules(model)
        self._division = division
        self._loss: Tensor | None = None
        for module in self._modules:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale what it sums

    def begin_step(self) -> None:
        """Begin a step: gradients gather on each rank."""
        self._exchange(False)
        self._loss = None

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Exchange the gradients of the step during its last backward pass."""
        self._exchange(True)
        yield

    def add_loss(self, loss: Tensor) -> None:
        """Take the loss of this rank's part of the step."""
        self._loss = loss

    def finish(self) -> Tensor:
        """Return the loss of the whole step, the same bits on all ranks."""
        loss = torch.as_tensor(0.0) if self._loss is None else self._loss
        return loss.new_tensor(self._division.sum([float(loss)])[0])

    def _exchange(self, now: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(now, recurse=False)


def gradient_sync_for(
    model: nn.Module, config: TrainerConfig, division: DataParallelLayout
) -> GradientSync:
    """Return what sums the gradients of a model as it is shared.

    Raises:
        ConfigError: If the model has batch statistics, which would be those of each portion;
            or if sharded gradients were to be scaled.
    """
    if config.fp16 and any(is_dtensor(p) for p in model.parameters()):
        hint = "use bf16, which needs no gradient scaling"
        raise ConfigError("fp16", "is not for models that are sharded over ranks", hint=hint)
    lanes = config.lanes or division.parts
    if lanes == 1 and not division.by_fsdp:
        return NoSync()
    _refuse_batch_statistics(model)
    if division.by_fsdp:
        return FsdpReducer(model, division)
    sums = RankSums(division.group, division.replicas)
    return LaneReducer(model, lanes // division.parts, division.group, sums)


def _refuse_batch_statistics(model: nn.Module) -> None:
    normal = nn.modules.batchnorm._BatchNorm  # noqa: SLF001 (the base of all of them)
    found = [name for name, m in model.named_modules() if isinstance(m, normal)]
    if found:
        raise ConfigError(
            f"model.{found[0]}",
            "its statistics would be those of each rank's or lane's samples",
            hint="use another normalisation (GroupNorm, LayerNorm), or one rank without lanes",
        )
