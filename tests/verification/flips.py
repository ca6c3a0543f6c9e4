"""Flips single bits in memory, once, as hardware does: no operation of PyTorch takes part."""

from __future__ import annotations

import ctypes

from unbroken.training import Callback


def flip(tensor, *, element=0, bit=20):
    """Flip a bit of an element where it lies."""
    place = tensor.data_ptr() + element * tensor.element_size() + bit // 8
    ctypes.c_ubyte.from_address(place).value ^= 1 << (bit % 8)


class Once:
    """True at its n-th call, and never else; it counts where nobody puts a count back."""

    def __init__(self, at):
        self.left = ctypes.c_long(at)

    def __call__(self):
        self.left.value -= 1
        return self.left.value == 0


class AtStep(Callback):
    """Flips a bit of what `choose` returns, after a step."""

    def __init__(self, step, choose):
        self.step, self.choose = step, choose

    def on_step_end(self, trainer):
        if trainer.progress.step == self.step:
            flip(self.choose(trainer))


class InMicroBatch(AtStep):
    def __init__(self, at, choose):
        super().__init__(0, choose)
        self.once = Once(at)

    def on_micro_batch_end(self, trainer):
        if self.once():
            flip(self.choose(trainer))
