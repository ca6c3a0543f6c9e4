"""What tells sharded models from others, without importing what only they need."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Return whether a value is a tensor that several ranks hold together.

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
    """Return the tensor of which this rank holds this part, if `like` is one that ranks share."""
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
