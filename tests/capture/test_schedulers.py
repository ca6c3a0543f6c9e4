"""Schedulers and loss scalers continue where they were, learning rates included."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim
from torch.amp import GradScaler
from torch.optim import lr_scheduler as lrs

from capture.round_trip import carry, saved
from capture.tree_equality import account
from unbroken.capture import capture
from unbroken.errors import StateMismatchError


class Warm:
    """A callable with state of its own."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 1 / (1 + self.calls)


SCHEDULERS = {
    "LambdaLR": lambda o: lrs.LambdaLR(o, lambda epoch: 0.9**epoch),
    "LambdaLR with state": lambda o: lrs.LambdaLR(o, Warm()),
    "MultiplicativeLR": lambda o: lrs.MultiplicativeLR(o, lambda epoch: 0.95),
    "StepLR": lambda o: lrs.StepLR(o, 3),
    "MultiStepLR": lambda o: lrs.MultiStepLR(o, [2, 5, 5, 8]),
    "ExponentialLR": lambda o: lrs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lrs.PolynomialLR(o, 20),
    "CosineAnnealingLR": lambda o: lrs.CosineAnnealingLR(o, 7),
    "CosineAnnealingWarmRestarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: lrs.OneCycleLR(o, 0.5, total_steps=40),
    "CyclicLR": lambda o: lrs.CyclicLR(o, 0.01, 0.1, 3),
    "ReduceLROnPlateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "ChainedScheduler": lambda o: lrs.ChainedScheduler(
        [lrs.ConstantLR(o, total_iters=4), lrs.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lrs.SequentialLR(
        o, [lrs.LinearLR(o, total_iters=4), lrs.CosineAnnealingLR(o, 9)], [4]
    ),
}


def scheduled(build, lr=0.1, steps=0):
    optimizer = optim.SGD(nn.Linear(1, 1).parameters(), lr=lr, momentum=0.9)
    objects = {"optimizer": optimizer, "scheduler": build(optimizer)}
    rates(objects, steps)
    return objects


def rates(objects, steps):
    """Take steps and return the learning rates on the way."""
    scheduler, found = objects["scheduler"], []
    for _ in range(steps):
        objects["optimizer"].step()
        plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
        scheduler.step(1.0) if plateau else scheduler.step()
        found.append(float(objects["optimizer"].param_groups[0]["lr"]))
    return found


def only_scheduler(objects):
    return {"scheduler": objects["scheduler"]}


@pytest.mark.parametrize("build", SCHEDULERS.values(), ids=SCHEDULERS)
def test_it_goes_on_with_the_same_learning_rates(build):
    source, target = scheduled(build, steps=6), scheduled(build)
    carry(only_scheduler(source), only_scheduler(target))
    assert source["optimizer"].param_groups[0]["lr"] == target["optimizer"].param_groups[0]["lr"]
    assert account(rates(target, 8)) == account(rates(source, 8))


def test_its_state_alone_would_leave_the_learning_rate_behind():
    source, target = (scheduled(SCHEDULERS["ExponentialLR"], steps=n) for n in (6, 0))
    target["scheduler"].load_state_dict(source["scheduler"].state_dict())
    assert rates(target, 8) != rates(source, 8)


def test_a_learning_rate_that_is_a_tensor_is_filled_in_place():
    build = SCHEDULERS["ExponentialLR"]
    source = scheduled(build, torch.tensor(0.1), steps=3)
    target = scheduled(build, torch.tensor(0.1))
    rate = target["optimizer"].param_groups[0]["lr"]
    carry(only_scheduler(source), only_scheduler(target))
    assert target["optimizer"].param_groups[0]["lr"] is rate
    assert account(rate) == account(source["optimizer"].param_groups[0]["lr"])


def test_another_scheduler_is_refused():
    source, target = (scheduled(SCHEDULERS[name]) for name in ("StepLR", "OneCycleLR"))
    with pytest.raises(StateMismatchError, match="expected StepLR, found OneCycleLR"):
        carry(only_scheduler(source), only_scheduler(target))


def test_another_number_of_groups_is_refused():
    source, target = (scheduled(SCHEDULERS["StepLR"]) for _ in range(2))
    target["optimizer"].add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(StateMismatchError, match="number of parameter groups: expected 1, found 2"):
        carry(only_scheduler(source), only_scheduler(target))


def scaler(uses, **options):
    """Return a loss scaler that saw `uses` overflows."""
    result = GradScaler("cpu", init_scale=4096.0, growth_interval=2, **options)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([parameter], lr=0.1)
    for number in range(uses):
        result.scale(parameter.sum()).backward()
        parameter.grad.fill_(float("inf") if number == 0 else 1.0)
        result.step(optimizer)
        result.update()
    return result


@pytest.mark.parametrize("was", [0, 2])
@pytest.mark.parametrize("used", [0, 1], ids=["fresh", "used"])
def test_a_loss_scaler_comes_back_used_or_not(was, used):
    target = scaler(used)
    carry({"scaler": scaler(was)}, {"scaler": target})
    assert target.state_dict() == scaler(was).state_dict()
    assert target.scale(torch.ones(())).item() == scaler(was).get_scale()


def test_a_loss_scaler_that_was_off_is_not_switched_on_silently():
    with pytest.raises(StateMismatchError, match="expected on, found off"):
        carry({"scaler": scaler(0)}, {"scaler": scaler(0, enabled=False)})


def test_a_loss_scaler_that_is_off_fits_one_that_was():
    off = {"scaler": scaler(0, enabled=False)}
    carry(off, off)
    assert capture(off)["scaler"].state == saved(off)["scaler"].state == {}
