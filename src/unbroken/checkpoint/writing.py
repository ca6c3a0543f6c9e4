"""Beginning and committing one checkpoint of a run, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unbroken.checkpoint.layout import Layout
from unbroken.store import (
    CheckpointReader,
    CheckpointWriter,
    Json,
    KeepPolicy,
    Manifest,
    RunDirectory,
)
from unbroken.store.layout import checkpoint_name
from unbroken.store.run_directory import now_as_text


class Writing:
    """One checkpoint on its way into the run directory.

    Args:
        run: The run directory.
        step: Completed optimizer steps.
        layout: What stands where.
        facts: For the manifest.
        keep: Which checkpoints stay once this one is there.
        like: The checkpoint before: files that did not change since are linked.
        clock: Seconds since 1970.
        told: What the history is told besides.

    Attributes:
        made: The checkpoint, when it is there and has files that do not change.
    """

    def __init__(
        self,
        run: RunDirectory,
        step: int,
        layout: Layout,
        facts: Mapping[str, Json],
        keep: KeepPolicy,
        *,
        like: CheckpointReader | None,
        clock: Callable[[], float],
        told: Mapping[str, Json],
    ) -> None:
        self.made: CheckpointReader | None = None
        self._run = run
        self._step = step
        self._constant = layout.constant
        self._files = layout.files()
        self._facts = facts
        self._keep = keep
        self._like = like
        self._clock = clock
        self._told = told

    def begin(self) -> CheckpointWriter:
        """Return the writer."""
        run = self._run
        run.require_ownership()  # at the commit, too; here, before anything is written
        writer = CheckpointWriter(
            run.storage,
            step=self._step,
            run_id=run.run_id,
            clock=self._clock,
            like=self._like if self._constant else None,
            constant=self._constant,
            require_ownership=run.require_ownership,
        )
        writer.expect(self._facts)
        return writer

    def commit(self, writer: CheckpointWriter) -> Manifest:
        """Commit, tell the history, and remove what is no longer kept.

        Args:
            writer: It has stored all else.
        """
        run, best = self._run, self._facts.get("best_step")
        run.metrics.sync()  # a checkpoint must never promise lines that a power cut can take
        for name, data in self._files.items():
            writer.write_file(name, data)
        manifest = writer.commit(self._facts)
        if self._constant:  # else there is nothing to link, and reading takes time
            self.made = CheckpointReader(run.storage, checkpoint_name(self._step))
        saved = {"event": "saved", "at": now_as_text(self._clock), "step": self._step}
        run.history.append({**saved, "digest": manifest.state_digest, **self._told})
        run.prune(self._keep, best_steps=(best,) if isinstance(best, int) else ())
        return manifest
