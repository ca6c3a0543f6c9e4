"""A model that comes in `DistributedDataParallel`: the Trainer exchanges gradients itself."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unbroken.distributed import Group
from unbroken.errors import ConfigError


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
