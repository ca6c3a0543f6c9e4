"""A bit flipped in an activation, a gradient, a weight or a moment is found and named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from small_trainers import bits, small_model, small_trainer, steps_in
from unbroken.errors import StepVerificationError
from verification.flips import AtStep, InMicroBatch, Once, flip

SETTINGS = {"batch_size": 8, "micro_batch_size": 4, "lr_scheduler_type": "constant"}


def trainer_with(folder, model, callbacks=(), **settings):
    return small_trainer(
        folder, model=model, trainer={"callbacks": [*callbacks]}, **{**SETTINGS, **settings}
    )


def in_output(model, at):
    once = Once(at)
    model[0].register_forward_hook(lambda _m, _i, output: flip(output) if once() else None)


def in_output_gradient(model, at):
    once = Once(at)

    def changed(gradient):
        if once():
            gradient = gradient.clone()
            flip(gradient, element=3)
        return gradient

    model[0].register_forward_hook(lambda _m, _i, output: output.register_hook(changed) and None)


def in_parameter_gradient(model, at):
    once = Once(at)

    def changed(gradient):
        if once():
            gradient = gradient.clone()
            flip(gradient, element=3)
        return gradient

    model[2].weight.register_hook(changed)


def in_weight_of_the_pass(model, at):
    once = Once(at)
    model[2].register_forward_pre_hook(
        lambda module, _inputs: flip(module.weight, element=5, bit=9) if once() else None
    )


IN_A_PASS = [  # step 2 begins with call 3 of an unverified run, with call 5 of a verified one
    (in_output, "0 (Linear)", "another output of 0 (Linear)"),
    (in_output_gradient, "0 (Linear)", "another gradient of the output of 0 (Linear)"),
    (in_parameter_gradient, "2.weight", "another gradient of 2.weight"),
    (in_weight_of_the_pass, "2.weight", "memory that nothing wrote: 2.weight[0, 5], bit 9"),
]


@pytest.mark.parametrize("at", [5, 6, 7, 8])
@pytest.mark.parametrize(("inject", "tensor", "words"), IN_A_PASS)
def test_a_flip_in_a_pass_is_found_before_the_optimizer(inject, tensor, words, at, tmp_path):
    model = small_model()
    inject(model, at)
    trainer = trainer_with(tmp_path, model, verify_steps=1, save_steps=1)
    with pytest.raises(StepVerificationError) as caught:
        trainer.train()
    error = caught.value
    assert (error.step, error.tensor, error.rank) == (2, tensor, 0)
    assert words in str(error)
    assert "the same command goes on from the last checkpoint" in error.hint
    assert steps_in(tmp_path) == [0, 1]
    assert trainer.progress.step == 1


def test_a_third_pass_says_which_of_two_was_odd(tmp_path):
    for at, words in ((5, "second result again"), (7, "first result again")):
        model = small_model()
        in_output(model, at)
        with pytest.raises(StepVerificationError, match=f"a third pass gave the {words}"):
            trainer_with(tmp_path / str(at), model, verify_steps=1).train()


def test_after_a_flip_the_same_command_goes_on_to_the_bits_of_a_run_without(tmp_path):
    clean = small_model()
    trainer_with(tmp_path / "clean", clean).train()
    model = small_model()
    in_output(model, 11)
    with pytest.raises(StepVerificationError):
        trainer_with(tmp_path / "run", model, verify_steps=1).train()
    again = small_model()
    trainer_with(tmp_path / "run", again, verify_steps=1, allow=["model"]).train()
    assert bits(again) == bits(clean)


def test_a_flip_in_a_gradient_that_waits_for_the_next_micro_batch(tmp_path):
    callback = InMicroBatch(5, lambda trainer: trainer.model[0].weight.grad)
    with pytest.raises(
        StepVerificationError, match="gradient, as the optimizer gets it,"
    ) as caught:
        trainer_with(tmp_path, small_model(), [callback], verify_steps=1).train()
    assert caught.value.tensor == "0.weight"


def weight(trainer):
    return trainer.model[0].weight


def moment(trainer):
    return trainer.optimizer.state[trainer.model[2].weight]["exp_avg"]


@pytest.mark.parametrize(
    ("choose", "tensor"), [(weight, "0.weight"), (moment, "exp_avg of 2.weight")]
)
@pytest.mark.parametrize(("every", "at"), [(1, 2), (3, 2), (3, 3)])
def test_a_flip_at_rest_is_found_at_the_next_look(choose, tensor, every, at, tmp_path):
    flipping = AtStep(at, choose)
    trainer = trainer_with(tmp_path, small_model(), [flipping], verify_steps=every, save_steps=1)
    with pytest.raises(StepVerificationError) as caught:
        trainer.train()
    error = caught.value
    assert (error.step, error.tensor) == (at, tensor)
    assert f"step {at}: memory changed after it, and nothing wrote it" in str(error)
    assert f"found {tensor}[0, 0], bit 20: " in str(error)
    assert steps_in(tmp_path) == list(range(at))  # that of this step would hold the flip


@pytest.mark.parametrize(("inject", "tensor", "words"), IN_A_PASS)
def test_without_verification_nobody_sees_it(inject, tensor, words, tmp_path):
    model, clean = small_model(), small_model()
    inject(model, 3)
    trainer_with(tmp_path / "run", model).train()
    trainer_with(tmp_path / "clean", clean).train()
    assert bits(model) != bits(clean)


@pytest.mark.parametrize("choose", [weight, moment])
def test_without_verification_nobody_sees_a_flip_at_rest(choose, tmp_path):
    model, clean = small_model(), small_model()
    trainer_with(tmp_path / "run", model, [AtStep(2, choose)]).train()
    trainer_with(tmp_path / "clean", clean).train()
    assert bits(model) != bits(clean)


def test_a_kernel_that_is_not_deterministic_is_told_apart(tmp_path):
    class Varying(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x):
            with open("/dev/urandom", "rb") as source:
                return self.layer(x) + source.read(1)[0] + 256 * source.read(1)[0]

    torch.manual_seed(0)
    trainer = trainer_with(tmp_path, Varying(), verify_steps=2, full_determinism=False)
    with pytest.raises(StepVerificationError, match="a third pass gave a third result") as caught:
        trainer.train()
    assert "full_determinism=True" in caught.value.hint
