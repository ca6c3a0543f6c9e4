"""How the ranks of a run divide each step's data, and who sums the gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unbroken.distributed import Group
from unbroken.distributed.dtensors import fsdp_modules, is_dtensor, meshes_of
from unbroken.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class DataParallelLayout:
    """Which ranks take which part of a step's data.

    Ranks that hold one model together by tensor parallelism take the same part; for sums over
    the data the first of them speaks for all.

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
    def speakers(self) -> list[int]:
        """The rank that speaks for each part."""
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
        return [values[speaker] for speaker in self.speakers]

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
        """Raise where forward passes changed a buffer otherwise on some rank: one is saved.

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
