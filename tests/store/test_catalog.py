"""Which checkpoints there are, which is the newest intact one, and what ails the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from store.small_runs import RUN_ID, read_state, save, state_of
from store.test_manifest import body_of, spelled
from unbroken.errors import CheckpointNotFoundError, CorruptCheckpointError, NewerFormatError
from unbroken.storage import MemoryStorage
from unbroken.store import Catalog, CheckpointReader, Rejection


@pytest.fixture
def storage():
    storage = MemoryStorage()
    for step in (5, 10, 9):
        save(storage, step)
    return storage


def spoil(storage, step) -> None:
    storage.truncate(f"checkpoint-{step}/state.json", 1)


def test_checkpoints_are_listed_by_number_and_not_by_letter(storage):
    assert Catalog(storage).folders() == [
        (5, "checkpoint-5"),
        (9, "checkpoint-9"),
        (10, "checkpoint-10"),
    ]


@pytest.mark.parametrize("name", ["checkpoint-foo", "checkpoint-007", "checkpoint-1.bak", "other"])
def test_other_names_are_no_checkpoints(storage, name):
    storage.make_folder(name)
    assert len(Catalog(storage).folders()) == 3


def test_the_newest_intact_checkpoint_is_read_whole(storage):
    reader, rejections = Catalog(storage).newest_intact()
    assert read_state(reader) == state_of("state at 10")
    assert rejections == ()


def test_damaged_ones_are_passed_over_and_told(storage):
    spoil(storage, 10)
    storage.remove_file("checkpoint-9/manifest.json")
    reader, rejections = Catalog(storage).newest_intact()
    assert reader.step == 5
    assert [(r.folder, r.step) for r in rejections] == [("checkpoint-10", 10), ("checkpoint-9", 9)]
    assert "state.json: has another size" in rejections[0].reason
    assert "manifest.json: is missing" in rejections[1].reason


def test_an_empty_folder_a_file_and_a_folder_without_manifest_are_passed_over(storage):
    storage.make_folder("checkpoint-20")
    storage.append("checkpoint-21", b"a file")
    storage.make_folder("checkpoint-22")
    storage.append("checkpoint-22/model.safetensors", b"bytes")
    reader, rejections = Catalog(storage).newest_intact()
    assert (reader.step, [r.step for r in rejections]) == (10, [22, 21, 20])


def test_where_none_is_intact_none_is_given(storage):
    for step in (5, 9, 10):
        spoil(storage, step)
    reader, rejections = Catalog(storage).newest_intact()
    assert (reader, len(rejections)) == (None, 3)


def test_an_empty_directory_has_none():
    assert Catalog(MemoryStorage()).newest_intact() == (None, ())


def test_a_renamed_checkpoint_is_not_taken_for_another_step(storage):
    storage.rename("checkpoint-10", "checkpoint-11")
    with pytest.raises(CorruptCheckpointError, match="expected 11, found 10"):
        Catalog(storage).open(11)
    assert Catalog(storage).newest_intact()[0].step == 9


def test_a_checkpoint_of_another_run_is_not_taken(storage):
    save(storage, 20, run_id="another run")
    assert Catalog(storage).newest_intact()[0].step == 20
    reader, rejections = Catalog(storage, RUN_ID).newest_intact()
    assert reader.step == 10
    assert f"expected {RUN_ID}, found another run" in rejections[0].reason


def test_a_checkpoint_of_a_newer_format_is_never_passed_over_silently(storage):
    manifest = CheckpointReader(storage, "checkpoint-10").manifest
    storage.remove_file("checkpoint-10/manifest.json")
    newer = spelled({**body_of(manifest), "version": 2})
    storage.append("checkpoint-10/manifest.json", newer)
    with pytest.raises(NewerFormatError):
        Catalog(storage).newest_intact()


def test_opening_a_step_that_is_not_there_is_an_error(storage):
    with pytest.raises(CheckpointNotFoundError, match="checkpoint-7"):
        Catalog(storage).open(7)


def test_a_copied_checkpoint_can_be_read_under_any_name(storage):
    storage.rename("checkpoint-10", "best")
    assert read_state(CheckpointReader(storage, "best")) == state_of("state at 10")


def test_one_set_aside_is_kept_but_never_found_again(storage):
    name = Catalog(storage).set_aside(10, "resumed from 9")
    assert name == "set-aside/checkpoint-10.1"
    assert read_state(CheckpointReader(storage, name)) == state_of("state at 10")
    assert storage.list("set-aside") == ["checkpoint-10.1", "checkpoint-10.1.txt"]
    assert Catalog(storage).newest_intact()[0].step == 9


def test_setting_aside_the_same_step_again_takes_another_name(storage):
    Catalog(storage).set_aside(10, "first")
    save(storage, 10, "second future")
    assert Catalog(storage).set_aside(10, "second") == "set-aside/checkpoint-10.2"


def test_setting_aside_what_is_not_there_is_an_error(storage):
    with pytest.raises(CheckpointNotFoundError):
        Catalog(storage).set_aside(7, "why not")


def test_a_save_of_the_same_state_keeps_the_checkpoint_that_is_there(storage):
    before = CheckpointReader(storage, "checkpoint-10").manifest
    assert save(storage, 10) == before
    assert storage.list("") == [".staging", "checkpoint-10", "checkpoint-5", "checkpoint-9"]
    assert storage.list(".staging") == []


def test_a_save_of_another_state_sets_the_old_one_aside(storage):
    save(storage, 10, "other")
    assert read_state(Catalog(storage).open(10)) == state_of("other")
    aside = CheckpointReader(storage, "set-aside/checkpoint-10.1")
    assert read_state(aside) == state_of("state at 10")


@pytest.mark.parametrize("differs", ["run", "step", "facts"])
def test_the_same_state_of_another_run_or_step_or_with_other_facts_is_not_kept(differs, storage):
    if differs == "step":
        storage.rename("checkpoint-9", "checkpoint-11")
    else:
        more = {"run_id": "another run"} if differs == "run" else {"best_step": 5}
        save(storage, 11, "state at 9", **more)
    made = save(storage, 11, "state at 9")
    found = CheckpointReader(storage, "checkpoint-11").manifest
    assert (found, made.run_id, made.step) == (made, RUN_ID, 11)
    assert found.facts == {"content": "state at 9"}


def test_a_save_in_place_of_a_damaged_one_keeps_its_remains(storage):
    spoil(storage, 10)
    save(storage, 10)
    assert read_state(Catalog(storage).open(10)) == state_of("state at 10")
    assert storage.list("set-aside") == ["checkpoint-10.1"]


def test_one_that_is_being_replaced_still_counts(storage):
    storage.make_folder("set-aside")
    storage.rename("checkpoint-10", "set-aside/checkpoint-10.replaced")
    reader, _ = Catalog(storage).newest_intact()
    assert (reader.step, reader.folder) == (10, "set-aside/checkpoint-10.replaced")


def test_a_rejection_is_a_value():
    rejection = Rejection("checkpoint-1", 1, "gone")
    assert replace(rejection, step=2) != rejection
