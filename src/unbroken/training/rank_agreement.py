"""What the ranks of a run decide together, between two steps and when they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import xxhash

from unbroken.distributed import Group
from unbroken.distributed.dtensors import is_dtensor

if TYPE_CHECKING:
    from unbroken.training.trainer import Trainer


def agree_on_wishes(trainer: Trainer) -> None:
    """Let a stop or a save that one rank's callback asked for be that of all."""
    group = trainer.group
    if group.world_size == 1 or not group.any(
        trainer.stop_reason is not None or trainer.save_wanted
    ):
        return
    wishes: Any = group.gather(
        "what callbacks asked for", [trainer.stop_reason, trainer.save_wanted]
    )
    trainer.stop_reason = next((reason for reason, _ in wishes if reason is not None), None)
    trainer.save_wanted = any(wanted for _, wanted in wishes)


def is_in_shared_window(trainer: Trainer) -> bool:
    """Return whether an accumulation window is open that lanes or ranks share.

    What they have gathered so far is not summed up yet: a save has to wait for the step.
    """
    shared = trainer.group.world_size > 1 or trainer.config.lanes is not None
    return shared and trainer.progress.pending > 0


def agree_on_the_beginning(trainer: Trainer) -> None:
    """Raise unless all ranks begin with the same weights and buffers, and take as many steps.

    Raises:
        RankError: Naming the ranks whose model is another one, or whose data are longer.
    """
    if trainer.group.world_size == 1:
        return
    trainer.group.agree("the number of steps (max_steps gives it)", trainer.max_steps)
    digest = xxhash.xxh3_128()
    for name, tensor in trainer.model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.requires_grad}".encode())
            digest.update(b"" if is_dtensor(tensor) else _raw(tensor))
    what = "the weights to begin with (seed before the model is built)"
    trainer.group.agree(what, digest.hexdigest())


def agree_on_buffers(trainer: Trainer) -> None:
    """Raise where forward passes have changed a buffer otherwise on some rank: one is saved.

    Raises:
        RankError: Naming the buffer, and the ranks on which it is another one.
    """
    if trainer.division.parts == 1:
        return
    buffers = {
        name: xxhash.xxh3_128(_raw(buffer)).hexdigest()
        for name, buffer in trainer.model.named_buffers()
        if not is_dtensor(buffer)
    }
    trainer.group.agree("model", buffers)


def _raw(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data if tensor.numel() else memoryview(b"")


def shared_metrics(group: Group, metrics: dict[str, float]) -> dict[str, float]:
    """Return rank 0's metrics, bit for bit."""
    if group.world_size == 1:
        return metrics
    said: Any = group.share("metrics", {name: value.hex() for name, value in metrics.items()})
    return {name: float.fromhex(value) for name, value in said.items()}
