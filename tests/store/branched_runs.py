"""A small run with checkpoints and metrics, and branches of it. Imports no torch."""

from __future__ import annotations

from store.small_runs import files_of, leaves_of, open_run, read_state
from unbroken.storage import FolderStorage, Storage
from unbroken.store import CheckpointWriter, Manifest, RunDirectory, branch

CHILD_ID = "f" * 32
STEPS = (10, 20, 30)
BEST = 10
NAME = "lr-low"


def save_in(run: RunDirectory, step: int, **facts: object) -> Manifest:
    """Save as a training does: the manifest knows how long the metrics are."""
    with CheckpointWriter(run.storage, step=step, run_id=run.run_id, clock=lambda: 0.0) as writer:
        writer.write_leaves(leaves_of(f"state at {step}"))
        for name, data in files_of(f"state at {step}").items():
            writer.write_file(name, data)
        return writer.commit({"metrics_bytes": run.metrics.nbytes, "best_step": BEST, **facts})


def make_parent(storage: Storage) -> None:
    """A run with checkpoints at `STEPS`, one line of metrics for each, the first the best."""
    with open_run(storage) as run:
        for step in STEPS:
            run.metrics.append({"step": step})
            run.metrics.sync()
            save_in(run, step)


def make_branch(storage: Storage, step: int | None = 20, name: str = NAME) -> RunDirectory:
    """Make, or open, a branch of the run in `storage`."""
    parent = RunDirectory.open_readonly(storage)
    return branch(parent, name, step=step, clock=lambda: 0.0, owner="test", new_id=lambda: CHILD_ID)


def child_of(storage: Storage, name: str = NAME) -> FolderStorage:
    return FolderStorage(storage, f"branches/{name}")


def content_of(storage: Storage) -> dict[str, object]:
    """Everything that a run holds: its checkpoints read whole, and its metrics."""
    run = RunDirectory.open_readonly(storage)
    readers = [run.catalog.open(step) for step, _ in run.catalog.folders()]
    states = {reader.step: read_state(reader) for reader in readers}
    return {"states": states, "metrics": list(run.metrics.records()), "id": run.run_id}
