"""What a run does between two checkpoints, as scenarios that can be cut anywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from store.small_runs import open_run, save, state_of
from unbroken.storage import Storage
from unbroken.store import KeepPolicy


@dataclass(frozen=True)
class Scenario:
    """A change of a run directory from one newest checkpoint to another.

    Attributes:
        prepare: Brings the storage to where the change begins.
        act: Makes the change; calls its second argument as soon as the save has returned.
        before: The content of the newest checkpoint before, "" if there is none.
        after: The content of the newest checkpoint once the save has returned.
        step: The step that is saved.
    """

    prepare: Callable[[Storage], None]
    act: Callable[[Storage, Callable[[], None]], None]
    before: str
    after: str
    step: int


def nothing(storage: Storage) -> None:
    del storage


def checkpoints(*steps: int) -> Callable[[Storage], None]:
    def prepare(storage: Storage) -> None:
        with open_run(storage):
            for step in steps:
                save(storage, step)

    return prepare


def with_two_damaged(storage: Storage) -> None:
    checkpoints(1, 2)(storage)
    storage.truncate("checkpoint-2/model.safetensors", 100)
    storage.sync_file("checkpoint-2/model.safetensors")


def saving(step: int, content: str = "") -> Callable[[Storage, Callable[[], None]], None]:
    def act(storage: Storage, saved: Callable[[], None]) -> None:
        with open_run(storage) as run:
            run.history.append({"event": "saving"})
            save(storage, step, content)
            saved()
            run.history.append({"event": "saved"})
            run.history.sync()

    return act


def saving_and_pruning(storage: Storage, saved: Callable[[], None]) -> None:
    with open_run(storage) as run:
        save(storage, 4)
        saved()
        run.prune(KeepPolicy(last=1))


SCENARIOS = {
    "the first save": Scenario(nothing, saving(1), "", "state at 1", 1),
    "a save over an older one": Scenario(checkpoints(1), saving(2), "state at 1", "state at 2", 2),
    "a save and then retention": Scenario(
        checkpoints(1, 2, 3), saving_and_pruning, "state at 3", "state at 4", 4
    ),
    "a save in place of another state": Scenario(
        checkpoints(1, 2), saving(2, "other"), "state at 2", "other", 2
    ),
    "a save in place of the only checkpoint": Scenario(
        checkpoints(2), saving(2, "other"), "state at 2", "other", 2
    ),
    "a save in place of a damaged one": Scenario(
        with_two_damaged, saving(2, "other"), "state at 1", "other", 2
    ),
    "the same save again": Scenario(checkpoints(1, 2), saving(2), "state at 2", "state at 2", 2),
}


def state_before(scenario: Scenario) -> dict[str, bytes] | None:
    return state_of(scenario.before) if scenario.before else None
