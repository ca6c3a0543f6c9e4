"""What must hold of a run directory after a scenario was cut, whatever the cut was."""

from __future__ import annotations

from crash.save_scenarios import Scenario, state_before
from store.small_runs import newest_state, open_run, save, state_of
from unbroken.storage import Storage


def check_after_cut(
    storage: Storage, scenario: Scenario, *, may_be_new: bool, must_be_new: bool
) -> None:
    """The newest intact checkpoint is the old one or the new one; and the run goes on."""
    allowed = [] if must_be_new else [state_before(scenario)]
    if may_be_new:
        allowed.append(state_of(scenario.after))
    assert newest_state(storage) in allowed, "as a reader without the lock finds it"
    check_next_start(storage, allowed)


def check_next_start(storage: Storage, allowed: list[dict[str, bytes] | None]) -> None:
    """The next start finds the same, sweeps the garbage, and can save."""
    with open_run(storage) as run:
        assert newest_state(storage) in allowed, "as the next start finds it"
        assert run.left_over == ()
        save(storage, 9)
        assert newest_state(storage) == state_of("state at 9")
        assert garbage(storage) == []


def garbage(storage: Storage) -> list[str]:
    folders = [folder for folder in (".staging", ".trash") if storage.stat(folder) is not None]
    return [f"{folder}/{name}" for folder in folders for name in storage.list(folder)]
