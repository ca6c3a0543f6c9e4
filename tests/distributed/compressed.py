"""Two ranks with a sharded model, in a run whose tensors are kept compressed."""

from __future__ import annotations

from distributed.sharded import build, checkpointer_in, facts, train
from distributed.sharded_saves import LAYOUT, leave
from unbroken.distributed import join
from unbroken.storage import CompressedStorage, LocalStorage


def save_and_resume(folder: str) -> None:
    """Save a trained model, and resume it in another one, with the storage and by its path."""
    group = join(timeout=60.0)
    model, optimizer = build(LAYOUT, seed=1)
    train(model, optimizer, LAYOUT, range(2))
    run = f"{folder}/run"
    storage = CompressedStorage(LocalStorage(run), least_bytes=1)
    with checkpointer_in(storage, group, model, optimizer) as checkpointer:
        checkpointer.save(2)
    resumed = []
    for place in (storage, run):
        other, its_optimizer = build(LAYOUT, seed=2)
        with checkpointer_in(place, group, other, its_optimizer) as checkpointer:
            checkpointer.resume("must")
        resumed.append(facts(other, its_optimizer))
    leave(folder, group, checkpointer, {"saved": facts(model, optimizer), "resumed": resumed})
