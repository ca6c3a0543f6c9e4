"""What cannot be saved is known before the first step, or right after it; not hours later."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from small_trainers import small_trainer
from unbroken import Checkpointer
from unbroken.errors import CaptureError
from unbroken.training import Callback


class Opaque(torch.Tensor):
    """A tensor subclass of which nobody knows what is in it."""


class Projector:
    """An object in an optimizer's state, as GaLore keeps one for each parameter."""


class Projecting(torch.optim.SGD):
    def step(self, closure=None):
        loss = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["projector"] = Projector()
        return loss


class Meter:
    """An object whose state cannot be stored once it has seen a batch."""

    def __init__(self) -> None:
        self.seen = None

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def steps_until_refused(folder, optimizer_class, *, loop: str, meter: Meter | None = None) -> int:
    """Return how many steps a hand-written loop takes before it hears of it."""
    model = nn.Linear(2, 2)
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    objects = {"model": model, "optimizer": optimizer, **({"meter": meter} if meter else {})}
    taken = []

    def train(checkpointer):
        for step in range(10):
            model(torch.ones(1, 2)).sum().backward()
            taken.append(step)
            optimizer.step()
            if meter is not None:
                meter.seen = Projector()
            if loop == "save_if_due":
                checkpointer.save_if_due(step + 1)

    with Checkpointer(folder, save_steps=1000, **objects) as checkpointer:
        checkpointer.resume()
        checkpointer.save(0)
        with pytest.raises(CaptureError):
            train(checkpointer)
        assert [step for step, _ in checkpointer.run.catalog.folders()] == [0]
    return len(taken)


@pytest.mark.parametrize("loop", ["save_if_due", "a save at the end"])
def test_state_that_an_optimizer_makes_in_its_first_step_is_looked_at_right_after_it(
    loop, tmp_path
):
    assert steps_until_refused(tmp_path, Projecting, loop=loop) == 1


def test_the_state_of_any_object_is_looked_at_after_the_first_step(tmp_path):
    assert steps_until_refused(tmp_path, torch.optim.SGD, loop="save_if_due", meter=Meter()) == 1


def test_a_model_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path):
    model = nn.Linear(2, 2)
    model.register_buffer("odd", torch.ones(2).as_subclass(Opaque))
    refusal = pytest.raises(CaptureError, match=r"model\.odd: is a tensor subclass.*Opaque")
    with Checkpointer(tmp_path, model=model) as checkpointer, refusal:
        checkpointer.resume()


def test_after_that_nothing_is_looked_at_again(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Checkpointer(tmp_path, save_steps=9, model=model, optimizer=optimizer) as checkpointer:
        checkpointer.resume()
        assert len(optimizer._optimizer_step_post_hooks) == 1
        optimizer.step()
        assert len(optimizer._optimizer_step_post_hooks) == 0
        assert checkpointer.save_if_due(1) is None
        model.register_buffer("odd", torch.ones(2).as_subclass(Opaque))
        assert checkpointer.save_if_due(2) is None


class Odd(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_step_end(self, trainer) -> None:
        self.steps += 1

    def state_dict(self):
        return {"odd": Projector() if self.steps else None}

    def load_state_dict(self, state):
        pass


def test_the_trainer_tells_of_it_after_one_step(tmp_path):
    odd = Odd()
    trainer = small_trainer(tmp_path, save_steps=1000, trainer={"callbacks": [odd]})
    assert trainer.config.save_at_start
    with pytest.raises(CaptureError, match=r"callbacks\.0-Odd\.odd: cannot be stored"):
        trainer.train()
    assert odd.steps == 1


def test_the_trainer_tells_of_an_optimizer_after_one_step(tmp_path):
    model = nn.Linear(6, 4)
    parts = {"optimizer": Projecting(model.parameters(), lr=0.1)}
    trainer = small_trainer(tmp_path, model=model, save_steps=1000, trainer=parts)
    with pytest.raises(CaptureError, match=r"optimizer\.state\.weight\.projector"):
        trainer.train()
    assert trainer.progress.step == 0
