"""The verdict is a function of recordings: made by hand here, step by step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unbroken.check import Culprit, Status
from unbroken.check.judge import Kill, Reference, judge_resumed, make_reference
from unbroken.check.recording import Batch, Fetch, Recording, State, Step

KILL = Kill(after=6, saved=True)


def state(place, optimizer=0):
    return State(f"p{place}.{optimizer}", f"m{place}.{optimizer}", f"c{place}", (f"{place}",))


def step(place, optimizer=0, **other):
    """Return the step that leads from one place to the next."""
    values = {
        "optimizer": optimizer,
        "inputs": (Batch(f"x{place}", (f"r{place}a", f"r{place}b")),),
        "fetched": (),
        "losses": (f"l{place}",),
        "loss_values": (float(place),),
        "learning_rates": (0.1 / (place + 1),),
        "settings": "s",
        "schedulers": (("StepLR", place),),
        "scalers": (),
        "gradients": f"g{place}",
        "after": state(place + 1, optimizer),
        "buffers": f"b{place}",
        "buffers_each": (f"b{place}",),
        "others": (),
        "generators": {"torch": f"t{place}"},
    }
    return Step(**{**values, **other})


def recording(first=0, last=10, **changes):
    """Return steps from `first` on; each change is a function of the place."""
    steps = [
        step(place, **{name: make(place) for name, make in changes.items()})
        for place in range(first, last)
    ]
    steps[0] = replace(steps[0], before=state(first), had_moments=first > 0)
    return Recording(steps=tuple(steps), names=("weight",), param_bytes=8)


WHOLE = recording()
REFERENCE = make_reference({0: WHOLE}, {0: WHOLE})


def judge(resumed, reference=REFERENCE, kill=KILL):
    return judge_resumed(reference, {0: resumed}, kill, is_whole=True)


def test_the_same_steps_are_exact():
    verdict = judge(recording(4))
    assert (verdict.status, verdict.culprit) == (Status.EXACT, Culprit.NONE)
    assert verdict.words.startswith("resumed after step 4; 6 steps")


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"learning_rates": lambda place: (0.1,)}, Culprit.SCHEDULER),
        ({"schedulers": lambda place: (("StepLR", place - 4),)}, Culprit.SCHEDULER),
        ({"settings": lambda place: "other"}, Culprit.SETTINGS),
        ({"scalers": lambda place: ((1.0, 0.0),)}, Culprit.SCALER),
        ({"losses": lambda place: ("other",)}, Culprit.MODEL),
        ({"gradients": lambda place: "other"}, Culprit.GRADIENTS),
        ({"buffers": lambda place: f"other {place}"}, Culprit.BUFFERS),
        ({"after": lambda place: state(f"other {place}")}, Culprit.OPTIMIZER),
    ],
)
def test_the_first_difference_names_the_culprit(changes, culprit):
    verdict = judge(recording(4, **changes))
    assert (verdict.status, verdict.culprit) == (Status.NOT_EXACT, culprit)


def test_a_generator_that_was_drawn_from_without_effect_is_noted_only():
    verdict = judge(recording(4, generators=lambda place: {"torch": f"other {place}"}))
    assert verdict.status is Status.EXACT
    assert "a generator was not restored" in verdict.evidence[0]


@pytest.mark.parametrize(
    ("stands", "culprit"),
    [
        (lambda place: f"other {place}", Culprit.GENERATORS),
        (lambda place: f"t{place - 4}", Culprit.SEED_RESET),
    ],
)
def test_a_generator_with_an_effect_is_the_culprit(stands, culprit):
    changes = {"generators": lambda place: {"torch": stands(place)}}
    verdict = judge(recording(4, **changes, losses=lambda place: (f"other {place}",)))
    assert (verdict.status, verdict.culprit) == (Status.NOT_EXACT, culprit)


def fetched(place):
    return (Fetch(0, 1, place, (2 * place, 2 * place + 1), Batch(f"x{place}")),)


def test_a_generator_counts_where_no_new_pass_could_have_shown_its_effect():
    whole = recording(fetched=fetched)
    reference = make_reference({0: whole}, {0: whole})
    other = recording(4, fetched=fetched, generators=lambda place: {"torch": f"other {place}"})
    assert judge(other, reference).culprit is Culprit.GENERATORS


def test_a_generator_that_nobody_draws_from_does_not_count():
    fixed = recording(generators=lambda _: {"torch": "fixed"})
    reference = make_reference({0: fixed}, {0: fixed})
    other = recording(4, generators=lambda _: {"torch": "elsewhere"})
    assert judge(other, reference).evidence == ()


def test_a_generator_that_differs_between_two_references_does_not_count():
    other = recording(generators=lambda place: {"torch": f"other {place}"})
    reference = make_reference({0: WHOLE}, {0: other})
    assert reference.generators == {0: frozenset()}


def test_two_references_that_differ_are_none():
    other = recording(losses=lambda place: (f"l{place}" if place < 6 else "other",))
    verdict = make_reference({0: WHOLE}, {0: other})
    assert (verdict.culprit, verdict.step) == (Culprit.NOT_DETERMINISTIC, 7)


def test_the_cause_comes_before_what_follows_from_it():
    changes = {"losses": lambda _: ("other",), "learning_rates": lambda _: (0.5,)}
    verdict = judge(recording(4, **changes, gradients=lambda _: "other"))
    assert verdict.culprit is Culprit.SCHEDULER


def begin(recorded, **changes):
    """Return a recording whose first state is another one."""
    first = replace(recorded.steps[0], **changes)
    return replace(recorded, steps=(first, *recorded.steps[1:]))


def test_weights_and_optimizer_of_two_steps_are_told_apart():
    mixed = State("p1.0", "m4.0", "c4", ())
    verdict = judge(begin(recording(4), before=mixed))
    assert verdict.culprit is Culprit.STALE_WEIGHTS
    assert "weights of step 1, optimizer of step 4" in verdict.words
    mixed = State("p4.0", "m2.0", "c2", ())
    assert judge(begin(recording(4), before=mixed)).culprit is Culprit.STALE_OPTIMIZER


def test_weights_of_no_step_are_compared_one_by_one():
    partly = State("?", "m4.0", "c4", ("4", "?"))
    of_two = [replace(one, after=replace(one.after, params_each=("4", "x"))) for one in WHOLE.steps]
    reference = Reference(
        {0: replace(WHOLE, steps=tuple(of_two), names=("a", "b"))}, {0: frozenset()}
    )
    verdict = judge(begin(recording(4), before=partly), reference)
    assert verdict.culprit is Culprit.WEIGHTS
    assert any("1 of 2 parameters" in line and "not: b" in line for line in verdict.evidence)


def test_an_old_checkpoint_under_a_new_schedule_and_position_is_stale():
    stale = begin(recording(4), before=state(1))
    assert judge(stale).culprit is Culprit.STALE_STATE


@pytest.mark.parametrize(
    ("saved", "culprit", "status"),
    [
        (True, Culprit.FROM_SCRATCH, Status.NOT_EXACT),
        (False, Culprit.NEVER_SAVED, Status.UNKNOWN),
    ],
)
def test_a_fresh_start_depends_on_whether_something_was_saved(saved, culprit, status):
    verdict = judge(recording(0), kill=Kill(6, saved))
    assert (verdict.culprit, verdict.status) == (culprit, status)


def test_too_few_and_too_many_steps_are_told():
    assert judge(recording(4, 8)).culprit is Culprit.STEPS_MISSING
    assert judge(recording(4, 12)).culprit is Culprit.STEPS_EXTRA


def test_equal_weights_at_two_steps_do_not_confuse_the_alignment():
    """A rate of 0 at first leaves the weights as they were; the step counts tell steps apart."""

    def lazily(first):
        made = recording(first, after=lambda place: replace(state(place + 1), params="same"))
        return begin(made, before=replace(state(first), params="same"))

    whole = lazily(0)
    reference = make_reference({0: whole}, {0: whole})
    assert judge(lazily(3), reference).words.startswith("resumed after step 3; 7 steps")


def test_two_optimizers_that_take_turns_are_aligned():
    def turns(first, last):
        steps = [step(place, optimizer=place % 2) for place in range(first, last)]
        for index in (0, 1):
            place = first + index
            before = state(max(place - 1, 0), place % 2)
            steps[index] = replace(steps[index], before=before, had_moments=first > 0)
        return Recording(steps=tuple(steps))

    whole = turns(0, 10)
    reference = make_reference({0: whole}, {0: whole})
    assert judge(turns(4, 10), reference).words.startswith("resumed after step 4; 6 steps")


def test_a_missing_rank_is_no_exact_resume():
    reference = make_reference({0: WHOLE, 1: WHOLE}, {0: WHOLE, 1: WHOLE})
    verdict = judge(recording(4), reference)
    assert (verdict.status, verdict.culprit) == (Status.NOT_EXACT, Culprit.SETTINGS)


def test_a_rank_that_makes_no_step_is_no_exact_resume():
    reference = make_reference({0: WHOLE, 1: WHOLE}, {0: WHOLE, 1: WHOLE})
    resumed = {0: recording(4), 1: Recording(rank=1)}
    verdict = judge_resumed(reference, resumed, KILL, is_whole=True)
    assert (verdict.status, verdict.culprit) == (Status.NOT_EXACT, Culprit.STEPS_MISSING)


def test_a_recorder_that_failed_proves_nothing():
    verdict = judge(replace(recording(4), errors=("Traceback ...",)))
    assert (verdict.status, verdict.culprit) == (Status.UNKNOWN, Culprit.RECORDER_FAILED)


def average(label, lag):
    return lambda place: ((label, f"{label}{place - lag}"),)


def test_an_average_counts_if_it_changes_and_still_differs_at_the_end():
    whole = recording(others=average("EMA", 0))
    reference = make_reference({0: whole}, {0: whole})
    assert judge(recording(4, others=average("EMA", 4)), reference).culprit is Culprit.AVERAGE
    healed = recording(4, others=lambda place: (("EMA", f"EMA{place if place > 4 else 0}"),))
    assert judge(healed, reference).status is Status.EXACT


def test_a_copy_that_never_changes_does_not_count():
    whole = recording(others=lambda _: (("teacher", "fixed"),))
    reference = make_reference({0: whole}, {0: whole})
    assert (
        judge(recording(4, others=lambda _: (("teacher", "?"),)), reference).status is Status.EXACT
    )
