"""Saving together: every rank stores its share, all agree, one rank commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from unbroken.checkpoint.shares import Share
from unbroken.distributed import Group, name_ranks
from unbroken.errors import RankError, SaveError
from unbroken.storage import Storage
from unbroken.store import CheckpointWriter, FileEntry, Json, store_leaves


class GivenUpError(Exception):
    """What was copied is not the state of the step.

    Attributes:
        edited: By rank, the paths of the tensors that were changed meanwhile.
    """

    def __init__(self, edited: Mapping[int, tuple[str, ...]]) -> None:
        super().__init__(edited)
        self.edited = edited


class Saving:
    """One checkpoint that all ranks make: staged, stored, and committed by rank 0.

    A context: what was staged and not committed is removed at its end.

    Args:
        storage: The run directory, as this rank sees it.
        begin: Makes the writer; called on rank 0 alone.
        commit: Adds what rank 0 alone knows, and commits; called on rank 0 alone.
    """

    def __init__(
        self,
        storage: Storage,
        begin: Callable[[], CheckpointWriter],
        commit: Callable[[CheckpointWriter], object],
    ) -> None:
        self._storage = storage
        self._begin = begin
        self._commit = commit
        self._folder: str | None = None  # the staging folder, when it is there
        self._writer: CheckpointWriter | None = None

    @property
    def is_staged(self) -> bool:
        """Whether there is a staging folder."""
        return self._folder is not None

    def stage(self, group: Group) -> tuple[int, ...]:
        """Make the staging folder; return the ranks that do not see it.

        Raises:
            SaveError: The disk of rank 0 failed or is full.
            RankError: That happened on another rank.
        """
        group.together("begin a save", lambda: None if group.rank else self._make_writer())
        staging = None if self._writer is None else self._writer.staging
        self._folder = str(group.share("the staging folder", staging))
        seen = group.gather("who sees the staging folder", self._sees())
        return tuple(rank for rank, sees in enumerate(seen) if not sees)

    def store(
        self,
        group: Group,
        share: Share,
        edited: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Store it; nothing is committed unless all have stored and nobody objects.

        Args:
            group: The ranks; each calls this.
            share: What this rank stores.
            edited: Called when all have stored; returns the paths of tensors that were changed
                before they were copied.

        Raises:
            SaveError: The disk failed or is full on this rank.
            GivenUpError: A rank had such tensors; nothing was committed.
            RankError: Another rank failed; nothing was committed.
        """
        homeless: list[SaveError] = []
        stored = group.together("save", lambda: self._store_at_home(share, homeless))
        own: Json = [[file.to_json() for file in stored], [*edited()], bool(homeless)]
        told: Any = group.gather("what is stored", own)
        if homeless:
            raise homeless[0]
        if ranks := [rank for rank, (*_, lost) in enumerate(told) if lost]:
            raise RankError(name_ranks(ranks), "lost the staging folder", ranks=tuple(ranks))
        if changed := {rank: tuple(paths) for rank, (_, paths, _) in enumerate(told) if paths}:
            raise GivenUpError(changed)
        group.together("commit", lambda: self._commit_files([files for files, *_ in told]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.abandon()

    def _make_writer(self) -> None:
        self._writer = self._begin()

    def _sees(self) -> bool:
        try:
            return self._storage.stat(str(self._folder)) is not None
        except OSError:
            return False

    def _store_at_home(self, share: Share, homeless: list[SaveError]) -> Sequence[FileEntry]:
        """Store; where rank 0 has removed the folder meanwhile, its own error says why."""
        try:
            return self._store(share)
        except SaveError as error:
            if self._writer is not None or self._sees():
                raise
            homeless.append(error)
            return ()

    def _store(self, share: Share) -> Sequence[FileEntry]:
        files = {name: content() for name, content in share.files.items()}
        if self._writer is None:
            return store_leaves(self._storage, str(self._folder), share.leaves, files)
        self._writer.write_leaves(share.leaves)
        for name, data in files.items():
            self._writer.write_file(name, data)
        return ()

    def _commit_files(self, told: Sequence[Any]) -> None:
        if self._writer is None:
            return
        for files in told[1:]:
            self._writer.adopt(FileEntry.from_json(file) for file in files)
        self._commit(self._writer)
        self._writer = None
