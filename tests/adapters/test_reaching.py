"""Where the host's loop begins, and how it counts from there: numbers by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from unbroken.adapters.transformers.position import (
    Batching,
    DataPosition,
    LoopCounts,
    StoredPosition,
    plan_loop_start,
)
from unbroken.errors import ConfigError

# 3 epochs of 32 samples: 8 batches of 4, 4 steps of 2 batches.
CUT = Batching(batch=4, accumulation=2, world_size=1, length=32)
NUMBERS = LoopCounts(3, 4, 32, 96, 8, 8, 12)
# Batches of 8: 4 batches and 2 steps in an epoch.
LARGER, OF_LARGER = replace(CUT, batch=8), LoopCounts(3, 2, 32, 96, 16, 4, 6)


def begun(stored, now=CUT, counts=NUMBERS, left=None, by_epochs=True):
    """Return epoch, batches, whether in samples, shift, whether at its end; epochs and steps."""
    found, counted = plan_loop_start(stored, now, counts, left, by_epochs=by_epochs)
    assert found.position.batches in (found.batches, stored.position.batches)
    where = (found.epoch, found.batches, found.in_samples, found.shift, found.ends_at_once)
    return where, (counted.num_train_epochs, counted.max_steps)


IN_THE_MIDDLE = DataPosition(epoch=1, batches=4, samples=16)
AT_THE_END, OVER = DataPosition(2, 8, 32), DataPosition(2, 8, 32, is_over=True)
CASES = {
    "in the middle of an epoch": (StoredPosition(6, IN_THE_MIDDLE, CUT), (1, 4, False, 0, False)),
    "inside of a step": (StoredPosition(6, DataPosition(1, 5, 20), CUT), (1, 5, False, 0, False)),
    "at an end that callbacks know of": (
        StoredPosition(8, DataPosition(1, 8, 32, is_over=True), CUT),
        (2, 0, False, 0, False),
    ),
    "at an end that they do not know of": (
        StoredPosition(8, DataPosition(1, 8, 32), CUT),
        (1, 8, False, 0, True),
    ),
    "over": (StoredPosition(12, OVER, CUT), (3, 0, False, 0, False)),
    "over, but for its last epoch's end": (
        StoredPosition(12, AT_THE_END, CUT),
        (2, 8, False, 0, True),
    ),
    "stopped by a callback": (
        StoredPosition(6, IN_THE_MIDDLE, CUT, stopped=(True, False)),
        (1, 8, False, 0, True),
    ),
    "its epoch stopped by a callback": (
        StoredPosition(6, IN_THE_MIDDLE, CUT, stopped=(False, True)),
        (1, 8, False, 0, True),
    ),
    "shifted before": (StoredPosition(9, IN_THE_MIDDLE, CUT, shift=3), (1, 4, False, 3, False)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_cut_as_before_begins_where_it_was(name):
    stored, where = CASES[name]
    assert begun(stored) == (where, (3, 12 + stored.shift))


def test_larger_batches_begin_at_the_sample_and_end_after_the_same_epochs():
    stored = StoredPosition(6, IN_THE_MIDDLE, CUT)
    found = begun(stored, LARGER, OF_LARGER, left=2)
    assert found == ((1, 2, True, 3, False), (3, 9)), "one step of this epoch, two of the last"


def test_the_next_start_with_larger_batches_goes_on_in_samples_too():
    stored = StoredPosition(6, DataPosition(1, 3, 24, is_even=False), LARGER, shift=3)
    found = begun(stored, LARGER, OF_LARGER, left=1)
    assert found == ((1, 3, True, 3, False), (3, 9))


def test_a_run_of_so_many_steps_gets_the_epochs_that_they_need():
    stored = StoredPosition(6, IN_THE_MIDDLE, CUT)
    counts = replace(OF_LARGER, max_steps=12)
    found = begun(stored, LARGER, counts, left=2, by_epochs=False)
    assert found == ((1, 2, True, 3, False), (5, 12)), "six steps: one, two, two, and one"


@pytest.mark.parametrize(
    ("stored", "where"),
    [
        (StoredPosition(6, IN_THE_MIDDLE, CUT), (1, 8, False, 0, True)),
        (StoredPosition(8, DataPosition(1, 8, 32, is_over=True), CUT), (3, 0, False, 0, False)),
    ],
    ids=["in an epoch", "at the end of one"],
)
def test_a_run_that_has_all_its_steps_trains_no_more(stored, where):
    counts = replace(NUMBERS, max_steps=stored.step)
    assert begun(stored, counts=counts, by_epochs=False) == (where, (3, stored.step))


def test_a_stream_goes_on_with_the_next_sample_or_says_what_it_needs():
    stored = StoredPosition(6, DataPosition(0, 12, 48), replace(CUT, length=None))
    found = begun(stored, replace(LARGER, length=None), replace(OF_LARGER, batches_per_epoch=99))
    assert found[0] == (0, 6, False, 3, False)
    for size in (5, 32):
        with pytest.raises(ConfigError, match="48 samples done"):
            begun(stored, replace(CUT, batch=size, length=None))
