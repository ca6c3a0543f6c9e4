"""Where a branch comes from: what its run.json says of the run that it left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from unbroken.store.canonical import Json, MalformedError
from unbroken.store.digest import is_digest
from unbroken.store.fields import Fields
from unbroken.store.layout import MAX_STEP
from unbroken.store.manifest import Manifest

_MAX_CHECKPOINTS = 100


@dataclass(frozen=True)
class Lineage:
    """The run that a branch left, and what it took over from there.

    Attributes:
        run_id: The run that was left.
        path: Its directory, as seen from the branch's when that was made: "../..". For people;
            a directory that was moved since is known by its id.
        step: How many optimizer steps the two have in common.
        checkpoints: The state digest of each checkpoint that the branch took over, by step: the
            one of `step`, and the best one known there.

    Example:
        >>> lineage = Lineage("a" * 32, "../..", 1200, {1000: "1" * 32, 1200: "2" * 32})
        >>> lineage.state_digest
        '22222222222222222222222222222222'
        >>> Lineage.from_json(lineage.to_json()) == lineage
        True
    """

    run_id: str
    path: str
    step: int
    checkpoints: Mapping[int, str]

    @property
    def state_digest(self) -> str:
        """The state digest of the checkpoint in which the branch begins."""
        return self.checkpoints[self.step]

    def covers(self, manifest: Manifest) -> bool:
        """Return whether a checkpoint is one that the branch took over."""
        return self.checkpoints.get(manifest.step) == manifest.state_digest

    def to_json(self) -> dict[str, Json]:
        """Return the lineage as run.json spells it."""
        taken: list[Json] = [
            {"state_digest": digest, "step": step}
            for step, digest in sorted(self.checkpoints.items())
        ]
        return {"checkpoints": taken, "id": self.run_id, "path": self.path, "step": self.step}

    @classmethod
    def from_json(cls, value: Json) -> Lineage:
        """Return the lineage that run.json spells.

        Raises:
            MalformedError: It is not what `to_json` writes.
        """
        fields = Fields(value, "parent")
        taken = [_read_taken(item) for item in fields.items("checkpoints", _MAX_CHECKPOINTS)]
        lineage = cls(
            run_id=fields.text("id"),
            path=fields.text("path"),
            step=fields.count("step", MAX_STEP),
            checkpoints=dict(taken),
        )
        fields.done()
        if lineage.step not in lineage.checkpoints or len(lineage.checkpoints) < len(taken):
            what = "parent does not name one checkpoint for its step"
            raise MalformedError(what, lineage.step, [step for step, _ in taken])
        return lineage


def belongs_to(manifest: Manifest, run_id: str, parent: Lineage | None) -> bool:
    """Return whether a checkpoint is the run's own: it wrote it, or took it over as a branch."""
    return manifest.run_id == run_id or (parent is not None and parent.covers(manifest))


def _read_taken(item: Json) -> tuple[int, str]:
    fields = Fields(item, "parent's checkpoint")
    step, digest = fields.count("step", MAX_STEP), fields.text("state_digest")
    fields.done()
    if not is_digest(digest):
        what = "parent's checkpoint has an impossible 'state_digest'"
        raise MalformedError(what, "32 hexadecimal digits", repr(digest))
    return step, digest
