"""Models that ranks hold in shards: what tells them from others, and which rank stores what."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from unbroken.distributed.group import Group
from unbroken.errors import CaptureError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan, WriteItem
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether a value is a tensor that several ranks hold in shards (a DTensor).

    Example:
        >>> import torch
        >>> is_dtensor(torch.ones(1))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor; it shares its memory."""
    if not is_dtensor(tensor):
        return tensor
    part: Tensor = tensor.to_local()
    return part.detach()


def sharded_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor in the placements of another one: a gradient may still be partial sums."""
    if not is_dtensor(like) or not is_dtensor(tensor) or tensor.placements == like.placements:
        return tensor
    return tensor.redistribute(placements=like.placements)


def with_mesh_of(like: Tensor, part: Tensor) -> Tensor:
    """Return this rank's part as a DTensor like `like`, if that is one."""
    if not is_dtensor(like):
        return part
    mesh, placements = like.device_mesh, like.placements
    return type(like).from_local(
        part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that every rank has as a whole; all ranks that hold it call this."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules inside a model that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def meshes_of(modules: list[FSDPModule]) -> list[DeviceMesh]:
    """Return the meshes over which FSDP shards and replicates, each once."""
    states = [module._get_fsdp_state() for module in modules]  # noqa: SLF001 (not public)
    groups = [
        group
        for state in states
        for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", 0)])
        if group
    ]
    return list(dict.fromkeys(group.mesh_info.mesh for group in groups))


# Which rank stores what: planned by `torch.distributed.checkpoint`, exchanged as JSON.
#
# The planner of torch takes out what several ranks hold and balances who writes it. Its own
# `save` sends the plans to one rank with pickle; here each rank tells its plan to all, and all
# come to the same division.


def divide(group: Group, offered: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """Return the names of the tensors that this rank stores, as far as it holds them.

    Together the ranks store each element of each tensor once. What only one rank offers, or
    only one holds, it stores; of the rest, each goes to the rank that has least to store.

    Args:
        group: The ranks; each calls this.
        offered: By name, the tensors that this rank could store, whole or its part of sharded
            ones. A name stands for the same tensor on all ranks. They are dealt in the order of
            rank 0: most evenly with those first that no other rank has, and then the largest.

    Raises:
        CaptureError: The parts that the ranks hold do not make up a tensor.
        RankError: Another rank failed.

    Example:
        >>> from unbroken.distributed import SingleProcess
        >>> sorted(divide(SingleProcess(), {"w": torch.ones(2), "b": torch.ones(1)}))
        ['b', 'w']
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(offered), is_coordinator=group.rank == 0)
    own = [_as_json(item) for item in planner.create_local_plan().items]
    plans = [_plan(items) for items in group.gather("the plan of a save", own)]
    try:
        global_plan, _ = planner.create_global_plan(plans)
    except ValueError as error:
        hint = "each rank must give its own part of every sharded tensor"
        raise CaptureError("the plan of a save", str(error), hint=hint) from error
    return frozenset(item.index.fqn for item in planner.finish_plan(global_plan[group.rank]).items)


def _as_json(item: WriteItem) -> list[Any]:
    data = item.tensor_data
    if data is None:  # nothing but tensors is offered
        raise TypeError(item.index.fqn)
    dtype = str(data.properties.dtype).removeprefix("torch.")
    chunk = [[*data.chunk.offsets], [*data.chunk.sizes]]
    return [item.index.fqn, item.type.name, dtype, [*data.size], *chunk]


def _plan(items: Any) -> SavePlan:
    from torch.distributed.checkpoint.planner import SavePlan

    return SavePlan([_item(*one) for one in items])


def _item(
    name: str, kind: str, dtype: str, size: list[int], offsets: list[int], sizes: list[int]
) -> WriteItem:
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        MetadataIndex,
        TensorProperties,
    )
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    at = torch.Size(offsets)
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(at, torch.Size(sizes)),
        properties=TensorProperties(dtype=getattr(torch, dtype)),
        size=torch.Size(size),
    )
    return WriteItem(MetadataIndex(name, at), WriteItemType[kind], tensor_data=data)
