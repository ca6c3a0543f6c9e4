"""What the ranks of a run decide together, between two steps and when they begin."""

from __future__ import annotations

from typing import Any

import torch
import xxhash
from torch import nn

from unbroken.distributed import Group
from unbroken.distributed.dtensors import is_dtensor
from unbroken.training.gradient_sums.data_parallel import DataParallelLayout
from unbroken.training.run_state import RunState


def agree_on_requests(group: Group, state: RunState) -> None:
    """Let a stop or a save that one rank's callback asked for be that of all."""
    has_request = state.stop_reason is not None or state.save_requested
    if group.world_size == 1 or not group.any(has_request):
        return
    own = [state.stop_reason, state.save_requested]
    requests: Any = group.gather("what callbacks asked for", own)
    state.stop_reason = next((reason for reason, _ in requests if reason is not None), None)
    state.save_requested = any(requested for _, requested in requests)


def agree_on_the_beginning(group: Group, model: nn.Module, max_steps: int) -> None:
    """Raise unless all ranks begin with the same weights and buffers, and take as many steps.

    Raises:
        RankError: Naming the ranks whose model is another one, or whose data are longer.
    """
    if group.world_size == 1:
        return
    group.agree("the number of steps (max_steps gives it)", max_steps)
    digest = xxhash.xxh3_128()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.requires_grad}".encode())
            digest.update(b"" if is_dtensor(tensor) else _raw(tensor))
    what = "the weights to begin with (seed before the model is built)"
    group.agree(what, digest.hexdigest())


def agree_on_buffers(division: DataParallelLayout, model: nn.Module) -> None:
    """Raise where forward passes have changed a buffer otherwise on some rank: one is saved.

    Raises:
        RankError: Naming the buffer, and the ranks on which it is another one.
    """
    if division.parts == 1:
        return
    buffers = {
        name: xxhash.xxh3_128(_raw(buffer)).hexdigest()
        for name, buffer in model.named_buffers()
        if not is_dtensor(buffer)
    }
    division.group.agree("model", buffers)


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data if tensor.numel() else memoryview(b"")


def shared_metrics(group: Group, metrics: dict[str, float]) -> dict[str, float]:
    """Return rank 0's metrics, bit for bit."""
    if group.world_size == 1:
        return metrics
    said: Any = group.share("metrics", {name: value.hex() for name, value in metrics.items()})
    return {name: float.fromhex(value) for name, value in said.items()}
