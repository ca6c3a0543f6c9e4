"""What stays, what goes, and what is never touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from store.small_runs import RUN_ID, newest_state, save, state_of
from unbroken.errors import ConfigError
from unbroken.storage import MemoryStorage
from unbroken.store import Catalog, KeepEvery, KeepPolicy, VerifiedCache, prune


def run_of(*steps: int) -> MemoryStorage:
    storage = MemoryStorage()
    for step in steps:
        save(storage, step)
    return storage


def pruned(storage, policy, best_steps=(), verified=None):
    verified = VerifiedCache() if verified is None else verified
    return prune(storage, policy, run_id=RUN_ID, best_steps=best_steps, verified=verified)


def steps_in(storage) -> list[int]:
    return [step for step, _ in Catalog(storage).folders()]


def spoil(storage, step) -> None:
    storage.truncate(f"checkpoint-{step}/state.json", 1)


def flip(storage, step) -> None:
    """Damage that only a reading of every byte finds."""
    storage._file(f"checkpoint-{step}/model.safetensors").data[-1] ^= 1


def test_none_keeps_all():
    storage = run_of(1, 2, 3)
    assert pruned(storage, KeepPolicy()).removed == ()
    assert steps_in(storage) == [1, 2, 3]


def test_the_last_ones_stay():
    storage = run_of(1, 2, 3, 10)
    outcome = pruned(storage, KeepPolicy(last=2))
    assert outcome.removed == ("checkpoint-2", "checkpoint-1")
    assert outcome.kept == ("checkpoint-10", "checkpoint-3")
    assert steps_in(storage) == [3, 10]
    assert storage.list(".trash") == []


def test_intervals_stay_until_they_end():
    storage = run_of(5, 10, 15, 20, 25, 30, 35, 40)
    policy = KeepPolicy(last=1, every=(KeepEvery(10, until=20), KeepEvery(15)))
    assert pruned(storage, policy).removed == (
        "checkpoint-35",
        "checkpoint-25",
        "checkpoint-15",
        "checkpoint-5",
    )
    assert steps_in(storage) == [10, 20, 30, 40]


def test_the_best_and_the_pinned_stay():
    storage = run_of(1, 2, 3, 4)
    storage.append("checkpoint-2/pinned", b"")
    outcome = pruned(storage, KeepPolicy(last=1), best_steps={1})
    assert outcome.removed == ("checkpoint-3",)
    assert (outcome.reasons["checkpoint-1"], outcome.reasons["checkpoint-2"]) == ("best", "pinned")


def test_the_newest_counts_as_one_of_the_last_where_it_is_the_best_too():
    storage = run_of(1, 2, 3)
    outcome = pruned(storage, KeepPolicy(last=1), best_steps={3})
    assert outcome.removed == ("checkpoint-2", "checkpoint-1")


@pytest.mark.parametrize("damage", [spoil, flip])
def test_damaged_ones_are_not_counted_and_not_removed(damage):
    storage = run_of(1, 2, 3, 4)
    damage(storage, 3)
    outcome = pruned(storage, KeepPolicy(last=2))
    assert outcome.removed == ("checkpoint-1",)
    assert steps_in(storage) == [2, 3, 4]
    assert outcome.reasons["checkpoint-3"].startswith("it is damaged (checkpoint-3: ")


@pytest.mark.parametrize("damage", [spoil, flip])
def test_an_old_damaged_one_is_told_and_not_removed(damage):
    storage = run_of(1, 2, 3)
    damage(storage, 1)
    outcome = pruned(storage, KeepPolicy(last=1))
    assert outcome.removed == ("checkpoint-2",)
    assert "damaged" in outcome.reasons["checkpoint-1"]


@pytest.mark.parametrize("damage", [spoil, flip])
def test_where_the_newest_is_damaged_nothing_goes(damage):
    storage = run_of(1, 2, 3, 4)
    damage(storage, 4)
    assert pruned(storage, KeepPolicy(last=1)).removed == ()


def test_where_all_are_damaged_nothing_goes():
    storage = run_of(1, 2)
    spoil(storage, 1)
    flip(storage, 2)
    assert pruned(storage, KeepPolicy(last=1)).removed == ()


def test_a_checkpoint_with_an_unlisted_file_is_never_removed():
    storage = run_of(1, 2, 3)
    storage.append("checkpoint-1/notes.txt", b"mine")
    outcome = pruned(storage, KeepPolicy(last=1))
    assert outcome.removed == ("checkpoint-2",)
    assert "notes.txt" in outcome.reasons["checkpoint-1"]


def test_nothing_that_is_not_ours_is_touched():
    storage = run_of(2, 3)
    save(storage, 1, run_id="another run")
    for name in ("checkpoint-foo", "checkpoint-0", "runs"):
        storage.make_folder(name)
        storage.append(f"{name}/a", b"")
    storage.append("notes.txt", b"")
    before = set(storage.list(""))
    assert pruned(storage, KeepPolicy(last=1)).removed == ("checkpoint-2",)
    assert set(storage.list("")) - {".trash"} == before - {"checkpoint-2"}


def test_one_under_the_name_of_another_step_is_neither_counted_nor_removed():
    storage = run_of(1, 2, 3)
    storage.rename("checkpoint-3", "checkpoint-9")
    outcome = pruned(storage, KeepPolicy(last=1))
    assert outcome.removed == ("checkpoint-1",)
    assert steps_in(storage) == [2, 9]


def test_one_that_is_being_replaced_is_neither_counted_nor_removed():
    storage = run_of(1, 2, 3)
    storage.make_folder("set-aside")
    storage.rename("checkpoint-3", "set-aside/checkpoint-3.replaced")
    outcome = pruned(storage, KeepPolicy(last=1))
    assert outcome.removed == ("checkpoint-1",)
    assert storage.list("set-aside") == ["checkpoint-3.replaced"]


def test_checkpoints_of_another_run_are_not_counted():
    storage = run_of(1, 2)
    save(storage, 3, run_id="another run")
    assert pruned(storage, KeepPolicy(last=1)).removed == ("checkpoint-1",)
    assert steps_in(storage) == [2, 3]


def test_each_checkpoint_is_read_once_in_a_process():
    storage, verified = run_of(1, 2, 3), VerifiedCache()
    pruned(storage, KeepPolicy(last=2), verified=verified)
    flip(storage, 2)  # behind the cache's back: no size, time or identity tells
    save(storage, 4)
    assert pruned(storage, KeepPolicy(last=1), verified=verified).removed == (
        "checkpoint-3",
        "checkpoint-2",
    )


def test_one_that_was_touched_is_read_again():
    storage, verified = run_of(1, 2, 3), VerifiedCache()
    pruned(storage, KeepPolicy(last=3), verified=verified)
    storage.remove_file("checkpoint-2/state.json")
    storage.append("checkpoint-2/state.json", b'{"of":"state at X"}')
    outcome = pruned(storage, KeepPolicy(last=1), verified=verified)
    assert outcome.removed == ("checkpoint-1",)


@given(
    steps=st.sets(st.integers(0, 30), min_size=1, max_size=6),
    bad=st.sets(st.integers(0, 30), max_size=3),
    last=st.integers(1, 4),
)
def test_the_last_intact_ones_always_stay(steps, bad, last):
    storage = run_of(*sorted(steps))
    for step in steps & bad:
        flip(storage, step)
    good = sorted(steps - bad)
    pruned(storage, KeepPolicy(last=last))
    assert set(steps_in(storage)) >= set(good[-last:]) | (steps & bad)
    if good:
        assert newest_state(storage) == state_of(f"state at {good[-1]}")


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepPolicy(last=0),
        lambda: KeepEvery(0),
        lambda: KeepEvery(5, until=0),
        lambda: KeepPolicy(every=(KeepEvery(5), KeepEvery(10, until=20))),
        lambda: KeepPolicy(every=(KeepEvery(5, until=20), KeepEvery(10, until=10))),
    ],
)
def test_an_impossible_policy_is_refused(make):
    with pytest.raises(ConfigError):
        make()
