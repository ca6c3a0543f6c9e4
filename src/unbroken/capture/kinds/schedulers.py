"""Learning-rate schedulers and the loss scaler of mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim.lr_scheduler import LRScheduler

from unbroken.capture.kinds.mismatch import Mismatch
from unbroken.capture.state_tree import Captured, State
from unbroken.capture.stored_tensor import load_tensors


def capture_scheduler(scheduler: LRScheduler, _path: str, _names: object) -> State:
    """Return a scheduler's state and the learning rates that it has set."""
    facts = {"lr": [group["lr"] for group in _groups(scheduler)]}
    return scheduler.state_dict(), facts


def _groups(scheduler: LRScheduler) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = scheduler.optimizer.param_groups
    return groups


def check_scheduler(
    scheduler: LRScheduler, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Yield all that keeps the stored state from fitting the scheduler."""
    here, there = len(_groups(scheduler)), len(stored.facts["lr"])
    if here != there:
        yield Mismatch(path, "schedules another number of parameter groups", there, here)


def restore_scheduler(scheduler: LRScheduler, stored: Captured, *_: object) -> None:
    """Bring back a scheduler and its learning rates, which its state alone does not set."""
    scheduler.load_state_dict(load_tensors(stored.state))
    for group, lr in zip(_groups(scheduler), load_tensors(stored.facts["lr"]), strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def capture_scaler(scaler: GradScaler, _path: str, _names: object) -> State:
    """Return a loss scaler's state; empty if it is switched off."""
    return scaler.state_dict(), {}


def check_scaler(
    scaler: GradScaler, stored: Captured, path: str, _names: object
) -> Iterator[Mismatch]:
    """Yield a mismatch if the scaler is on in one place and off in the other."""
    was, is_now = (("on" if on else "off") for on in (bool(stored.state), scaler.is_enabled()))
    if was != is_now:
        yield Mismatch(path, "loss scaling is switched otherwise", was, is_now)


def restore_scaler(scaler: GradScaler, stored: Captured, *_: object) -> None:
    """Bring back scale and growth counter, whether the scaler has been used already or not."""
    scaler.load_state_dict(load_tensors(stored.state))
