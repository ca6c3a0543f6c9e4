"""The disk fails at every durable step: a named error, nothing lost, and the next save works."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from crash.faulty_runs import EACH_SCENARIO, prepared, steps_of
from crash.oracle import check_next_start, garbage
from crash.save_scenarios import SCENARIOS, Scenario
from store.small_runs import RUN_ID, leaves_of, newest_state, open_run, save, state_of
from unbroken.errors import RunDirectoryError, SaveError
from unbroken.store import CheckpointWriter
from unbroken.testing import POWER_CUT_MODES, FaultyStorage

ERRORS = pytest.mark.parametrize(
    "code",
    [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG, errno.EROFS],
    ids=lambda code: errno.errorcode[code],
)
OVER_AN_OLDER_ONE = SCENARIOS["a save over an older one"]


@contextmanager
def suppress_only(kinds: tuple[type[Exception], ...], pattern: str) -> Iterator[None]:
    """Allow an error of these kinds whose message names the place and the reason."""
    try:
        yield
    except kinds as error:
        if re.search(pattern, str(error)) is None:
            raise


def fail(scenario: Scenario, step: int, code: int, *, lasting: bool) -> tuple[FaultyStorage, bool]:
    """Let a step fail; return the disk, mended, and whether the save had returned."""
    storage = prepared(scenario)
    storage.arm(fail_at=step, error=code, lasting=lasting)
    saved: list[bool] = []
    named = f"memory:.*{os.strerror(code)}"
    with suppress_only((SaveError, RunDirectoryError), named):
        scenario.act(storage, lambda: saved.append(True))
    storage.repair()
    storage.arm()
    return storage, bool(saved)


@EACH_SCENARIO
@pytest.mark.parametrize(
    ("code", "lasting"), [(errno.ENOSPC, True), (errno.EIO, False)], ids=["full disk", "one EIO"]
)
def test_a_failing_step_loses_nothing_and_the_next_start_can_save(scenario, code, lasting):
    for step in range(1, steps_of(scenario) + 1):
        storage, saved = fail(scenario, step, code, lasting=lasting)
        expected = state_of(scenario.after if saved else scenario.before)
        if not (saved or scenario.before):
            expected = None
        assert newest_state(storage) == expected
        check_next_start(storage, [expected])


@EACH_SCENARIO
def test_a_save_after_a_failed_one_is_as_durable_as_any(scenario):
    for step in range(1, steps_of(scenario) + 1):
        storage, _ = fail(scenario, step, errno.EIO, lasting=False)
        with open_run(storage):
            save(storage, scenario.step, scenario.after)
        for mode in POWER_CUT_MODES:
            after = storage.after_power_cut(mode)
            assert newest_state(after) == state_of(scenario.after), storage.log


def failed_writer(step: int, code: int) -> tuple[FaultyStorage, SaveError | None]:
    storage = prepared(OVER_AN_OLDER_ONE)
    storage.arm(fail_at=step, error=code)
    try:
        save(storage, 2)
    except SaveError as error:
        return storage, error
    return storage, None


@ERRORS
def test_every_failure_within_a_save_is_a_save_error_or_none(code):
    storage = prepared(OVER_AN_OLDER_ONE)
    storage.arm()
    save(storage, 2)
    outcomes = [failed_writer(step, code)[1] for step in range(1, storage.steps + 1)]
    assert None not in outcomes
    assert {error.errno for error in outcomes} == {code}


@ERRORS
def test_a_failed_save_leaves_no_garbage_where_the_disk_allows_it(code):
    storage = prepared(OVER_AN_OLDER_ONE)
    storage.arm()
    save(storage, 2)
    for step in range(1, storage.steps + 1):
        assert garbage(failed_writer(step, code)[0]) == []


def test_the_error_names_the_file_that_could_not_be_written():
    storage = FaultyStorage()
    writer = CheckpointWriter(storage, step=1, run_id=RUN_ID)
    storage.arm(fail_at=2, error=errno.ENOSPC)
    with pytest.raises(SaveError, match=r"checkpoint-1\.1/model\.safetensors.*No space") as caught:
        writer.write_leaves(leaves_of("x"))
    assert "make room" in caught.value.hint


def test_a_writer_that_failed_cannot_commit():
    storage = FaultyStorage()
    writer = CheckpointWriter(storage, step=1, run_id=RUN_ID)
    storage.arm(fail_at=3)
    with pytest.raises(SaveError):
        writer.write_file("state.json", b"{}")
    with pytest.raises(SaveError, match="this attempt is over"):
        writer.commit({})
    assert newest_state(storage) is None


def test_a_failed_sync_is_not_repaired_by_syncing_again():
    storage = FaultyStorage(fail_at=3)
    with storage.create("a") as file:
        file.write(b"bytes")
        with pytest.raises(OSError, match="Input/output"):
            file.sync()
        file.sync()  # reports success, as Linux does
    storage.sync_folder("")
    assert storage.after_power_cut("names").open("a").nbytes == 0
