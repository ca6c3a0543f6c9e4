"""Clipping of gradients, those of sharded parameters included."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from unbroken.distributed.sharding import is_dtensor, local_part, sharded_as, whole


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor | None:
    """Scale the gradients down to a norm, if their own is larger; 0: leave them as they are.

    Returns:
        The norm over all of them, of all ranks that share the parameters, before clipping;
        None where there is no clipping.
    """
    parameters = list(parameters)
    if any(is_dtensor(p.grad) for p in parameters):
        return _clip_shards(parameters, max_norm)
    return clip_grad_norm_(parameters, max_norm) if max_norm > 0 else None


def _clip_shards(parameters: list[Tensor], max_norm: float) -> Tensor | None:
    """As `clip_grad_norm_`, which takes no gradients that lie on different meshes."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = sharded_as(parameter, parameter.grad)
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not max_norm > 0:
        return None
    by_mesh: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        mesh = gradient.device_mesh if is_dtensor(gradient) else None
        by_mesh.setdefault(mesh, []).append(gradient)
    norms = [whole(get_total_norm(of_one_mesh)) for of_one_mesh in by_mesh.values()]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([local_part(gradient) for gradient in gradients], coefficient)
    return norm
