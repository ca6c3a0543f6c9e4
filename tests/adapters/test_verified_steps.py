"""The drop-in runs steps twice: the same bits, no false alarm, and a flipped bit is named."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments

from small_trainers import bits
from unbroken.adapters.transformers import Trainer
from unbroken.errors import ConfigError, StepVerificationError
from verification.flips import Once, flip


class Counting(Trainer):
    """Counts in `compute_loss`, logs there, and takes the labels out of the batch."""

    def compute_loss(self, model, inputs, *arguments, **options):
        self.calls = getattr(self, "calls", 0) + 1
        self.log({"calls": float(self.calls)})
        inputs.setdefault("labels", inputs["input_ids"])
        return super().compute_loss(model, inputs, *arguments, **options)


class AtEndOfStep(TrainerCallback):
    def __init__(self, step, choose):
        self.step, self.choose = step, choose

    def on_step_end(self, args, state, control, **more):
        if state.global_step == self.step:
            flip(self.choose(more["model"], more["optimizer"].optimizer))


class InsideOfStep(TrainerCallback):
    def __init__(self, at, choose):
        self.once, self.choose = Once(at), choose

    def on_substep_end(self, args, state, control, **more):
        if self.once():
            flip(self.choose(more["model"], None))


def small_gpt():
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 257, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=256, eos_token_id=256))


def train(folder, model, kind=Trainer, callbacks=(), **options):
    numbers = [torch.Generator().manual_seed(at) for at in range(32)]
    ids = [torch.randint(0, 256, (12,), generator=one) for one in numbers]
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=8,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=100,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = kind(
        model,
        args,
        train_dataset=[{"input_ids": one, "labels": one} for one in ids],
        callbacks=[*callbacks],
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", [Trainer, Counting])
def test_steps_run_twice_have_the_bits_of_steps_run_once(kind, tmp_path):
    ends = []
    for every in (None, 1, 3):
        trainer = train(tmp_path / str(every), small_gpt(), kind, verify_steps=every)
        logged = [line["calls"] for line in trainer.state.log_history if "calls" in line]
        ends.append((bits(trainer.model), getattr(trainer, "calls", 0), logged))
        assert "training_step" not in vars(trainer)
    assert ends[0] == ends[1] == ends[2]


def test_a_flip_in_an_activation_is_named(tmp_path):
    model, once = small_gpt(), Once(7)
    layer = model.transformer.h[0].mlp.c_fc
    layer.register_forward_hook(lambda _m, _i, output: flip(output) if once() else None)
    with pytest.raises(StepVerificationError, match=r"of transformer\.h\.0\.mlp\.c_fc"):
        train(tmp_path, model, verify_steps=1)


def weight(model, _):
    return model.transformer.h[0].ln_1.weight


def moment(model, optimizer):
    return optimizer.state[weight(model, None)]["exp_avg_sq"]


def gradient(model, _):
    return weight(model, None).grad


@pytest.mark.parametrize("choose", [weight, moment])
def test_a_flip_between_two_steps_is_named(choose, tmp_path):
    flipping = AtEndOfStep(4, choose)
    with pytest.raises(StepVerificationError, match=r"h\.0\.ln_1\.weight.*bit 20") as found:
        train(tmp_path, small_gpt(), callbacks=[flipping], verify_steps=5)
    assert found.value.step == 4


def test_a_flip_in_a_gradient_between_two_micro_batches_is_named(tmp_path):
    flipping = InsideOfStep(3, gradient)
    words = "gradient of transformer.h.0.ln_1.weight.*bit 20"
    with pytest.raises(StepVerificationError, match=words) as found:
        train(tmp_path, small_gpt(), callbacks=[flipping], verify_steps=1)
    assert found.value.step == 3


def test_what_is_no_number_of_steps_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="verify_steps"):
        train(tmp_path, small_gpt(), verify_steps=0)
