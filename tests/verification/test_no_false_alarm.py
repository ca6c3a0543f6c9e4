"""Steps run twice give the bits of steps run once, and no alarm, whatever a pass changes."""

from __future__ import annotations

import pytest
import torch

from small_trainers import bits, small_model, steps_in
from verification import odd_models
from verification.odd_models import run

PLAIN = [
    *("Statistics", "Counting", "Lazy", "Growing", "Expanded", "Generators", "Spectral", "Tied"),
    *("Checkpointed", "InPlace", "Recurrent", "Frozen"),
]


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", PLAIN)
def test_a_pass_that_is_run_twice_leaves_what_it_leaves_once(name, every, tmp_path):
    plain, _ = run(tmp_path / "plain", getattr(odd_models, name)())
    twice, lines = run(tmp_path / "twice", getattr(odd_models, name)(), verify_steps=every)
    assert lines == []
    assert bits(twice.model) == bits(plain.model)
    assert getattr(twice.model, "calls", 0) == getattr(plain.model, "calls", 0)
    assert steps_in(tmp_path / "twice") == steps_in(tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Renormed", "it writes table.weight"),
        ("WritingData", "it writes last.weight through .data"),
        ("Reading", "it reads on a cycle"),
    ],
)
def test_a_pass_that_writes_what_is_not_copied_is_left_as_it_is_and_named(name, why, tmp_path):
    plain, _ = run(tmp_path / "plain", getattr(odd_models, name)())
    twice, lines = run(tmp_path / "twice", getattr(odd_models, name)(), verify_steps=1)
    assert lines == [f"verify_steps: step 1 was not run twice: {why}"]
    assert bits(twice.model) == bits(plain.model)


def test_a_loss_that_moves_a_teacher_is_put_back(tmp_path):
    ends = []
    for every in (None, 1):
        model = odd_models.Layers()
        loss = odd_models.Teacher(model)
        run(tmp_path / str(every), model, loss=loss, verify_steps=every)
        ends.append((bits(model), bits(loss.teacher), loss.calls))
    assert ends[0] == ends[1]


def test_callbacks_change_gradients_and_count_as_if_once(tmp_path):
    ends = []
    for every in (None, 1, 3):
        counting = odd_models.CountingMicroBatches()
        trainer, _ = run(
            tmp_path / str(every),
            small_model(),
            verify_steps=every,
            callbacks=[counting],
        )
        ends.append((bits(trainer.model), counting.count, counting.lines))
    assert ends[0] == ends[1] == ends[2]


def test_weights_that_a_callback_writes_are_no_alarm(tmp_path):
    _, lines = run(tmp_path, small_model(), verify_steps=1, callbacks=[odd_models.Clipping()])
    assert lines == []


def test_weights_that_a_callback_writes_through_data_are_named_and_not_judged(tmp_path):
    callbacks = [odd_models.ClippingData()]
    _, lines = run(tmp_path, small_model(), verify_steps=1, callbacks=callbacks)
    (line,) = lines
    assert "edits through `.data`, or damage; such are not judged" in line


def test_scaled_gradients_of_half_precision(tmp_path):
    settings = {"fp16": True, "device": "cpu"}
    ends = [
        bits(run(tmp_path / str(every), small_model(), verify_steps=every, **settings)[0].model)
        for every in (None, 1)
    ]
    assert ends[0] == ends[1]


def test_lanes(tmp_path):
    settings = {"lanes": 2, "max_grad_norm": 0.1}
    ends = [
        bits(run(tmp_path / str(every), small_model(), verify_steps=every, **settings)[0].model)
        for every in (None, 1)
    ]
    assert ends[0] == ends[1]


def test_workers_and_a_resume_with_another_setting(tmp_path):
    whole, _ = run(tmp_path / "whole", small_model())
    for steps, every in ((3, 2), (5, None), (8, 1)):
        settings = {"max_steps": steps, "lr_scheduler_type": "constant"}
        part, lines = run(
            tmp_path / "parts",
            small_model(),
            verify_steps=every,
            dataloader_num_workers=1,
            **settings,
        )
        assert lines == []
        assert part.resume_report.verdict in ("exact", "fresh") or part.resume_report.resumed
    constant, _ = run(tmp_path / "constant", small_model(), lr_scheduler_type="constant")
    assert bits(part.model) == bits(constant.model) != bits(whole.model)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # by dynamo
def test_what_a_pass_compiles_is_left_as_it_is(tmp_path):
    def model():
        inner = odd_models.Statistics()
        inner.last = torch.compile(inner.last, backend="eager")
        return inner

    plain, _ = run(tmp_path / "plain", model())
    torch._dynamo.reset()
    twice, lines = run(tmp_path / "twice", model(), verify_steps=1)
    assert lines == ["verify_steps: step 1 was not run twice: code was compiled in it"]
    assert bits(twice.model) == bits(plain.model)
