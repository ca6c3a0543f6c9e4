"""Writing a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from unbroken.errors import CaptureError, LockHeldError, SaveError
from unbroken.storage import Storage
from unbroken.store.canonical import Json, MalformedError, from_strict, to_canonical
from unbroken.store.commit import commit_staging
from unbroken.store.layout import STAGING, checkpoint_name
from unbroken.store.leaf import Leaf
from unbroken.store.manifest import FileEntry, Manifest, least_nbytes, refuse_too_large
from unbroken.store.reader import CheckpointReader
from unbroken.store.removal import ensure_folder, free_name, remove_staging
from unbroken.store.staged import (
    Plan,
    check_new_names,
    link_plan,
    plan_files,
    save_error,
    write_plain,
    write_plan,
)

_LEAST_OF_REGION = 90  # digest, lengths and the names of fields, in a manifest


class CheckpointWriter:
    """Write one checkpoint: everything becomes a checkpoint at `commit`, or nothing does.

    Until `commit` returns, all earlier checkpoints are as they were, whatever fails or is
    killed. The first failure ends the attempt: its files are removed as far as the disk allows,
    and a new writer may try again.

    Args:
        storage: The run directory.
        step: How many optimizer steps were completed.
        run_id: The run that writes it.
        clock: Seconds since 1970; for the date in the manifest only.
        like: An earlier checkpoint, known to be intact, whose files may be linked.
        constant: Names of files that are linked from there if not one bit of them has changed.
        require_ownership: Raises if this process may not commit; called just before it does.

    Raises:
        SaveError: The staging folder cannot be made.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> storage = MemoryStorage()
        >>> with CheckpointWriter(storage, step=10, run_id="a" * 32) as writer:
        ...     writer.write_file("state.json", b"{}")
        ...     manifest = writer.commit({"loss": 0.5})
        >>> storage.list("checkpoint-10")
        ['manifest.json', 'state.json']
    """

    def __init__(
        self,
        storage: Storage,
        *,
        step: int,
        run_id: str,
        clock: Callable[[], float] = time.time,
        like: CheckpointReader | None = None,
        constant: Collection[str] = (),
        require_ownership: Callable[[], None] = lambda: None,
    ) -> None:
        self._require_ownership = require_ownership
        self._like = like
        self._constant = constant
        self._storage = storage
        self._step = step
        self._run_id = run_id
        self._clock = clock
        self._files: dict[str, FileEntry] = {}
        self._paths: set[tuple[str, tuple[int, ...] | None]] = set()
        self._facts: Mapping[str, Json] = {}
        self._least_nbytes = 0  # of the manifest
        self._is_over = False
        self._folder: str | None = None
        with self._attempt():
            self._folder = self._make_staging()

    def expect(self, facts: Mapping[str, Json]) -> None:
        """Take note of what `commit` will be given: what cannot be committed is not written.

        Raises:
            CaptureError: The manifest would be larger than any reader takes.
        """
        with self._attempt():
            self._facts, self._least_nbytes = facts, least_nbytes(facts)
            refuse_too_large(facts, (), self._least_nbytes)

    def _count(self, leaves: Iterable[Leaf]) -> None:
        """Add what leaves take in the manifest, at least; raise if that is too much."""
        self._least_nbytes += sum(len(leaf.path) + _LEAST_OF_REGION for leaf in leaves)
        refuse_too_large(self._facts, [*self._files.values()], self._least_nbytes)

    def write_leaves(self, leaves: Iterable[Leaf]) -> None:
        """Write the bytes of all leaves, each into the safetensors file that it names.

        When it returns, the bytes are durable. One call writes a file whole.

        Raises:
            CaptureError: A leaf's path, name, type, shape or length is impossible.
            SaveError: The storage fails or is full.
        """
        with self._attempt() as folder:
            plans = plan_files(leaves)
            check_new_names((plan.name for plan in plans), self._files)
            self._count(leaf for plan in plans for leaf in plan.leaves)
            self._check_paths((leaf.path, leaf.offsets) for plan in plans for leaf in plan.leaves)
            for plan in plans:
                linked = self._linked(folder, plan)
                self._files[plan.name] = linked or write_plan(self._storage, folder, plan)

    def _linked(self, folder: str, plan: Plan) -> FileEntry | None:
        if self._like is None or plan.name not in self._constant:
            return None
        return link_plan(self._storage, folder, plan, self._like)

    def write_file(self, name: str, data: bytes) -> None:
        """Write a file that is not tensors; when it returns, its bytes are durable.

        Args:
            name: Letters, digits, ".", "_" and "-", the first not "." or "-".
            data: The whole content.

        Raises:
            CaptureError: The name is impossible or taken.
            SaveError: The storage fails or is full.
        """
        with self._attempt() as folder:
            check_new_names([name], self._files)
            self._files[name] = write_plain(self._storage, folder, name, data)

    @property
    def staging(self) -> str:
        """The folder that other ranks store their files in, with `store_leaves`."""
        return self._folder or ""

    def adopt(self, files: Iterable[FileEntry]) -> None:
        """Take files into the checkpoint that others have stored, durably, in its folder.

        Args:
            files: What their `store_leaves` returned.

        Raises:
            CaptureError: A name or a tensor is there already.
            SaveError: A file is not there, or not as long: others see another folder.
        """
        with self._attempt() as folder:
            for file in files:
                self._check_is_there(folder, file)
                check_new_names([file.name], self._files)
                self._check_paths(
                    (region.path, region.offsets)
                    for region in file.regions
                    if region.path is not None
                )
                self._files[file.name] = file

    def _check_is_there(self, folder: str, file: FileEntry) -> None:
        found = self._storage.stat(f"{folder}/{file.name}")
        if found is None or found.nbytes != file.nbytes:
            where = self._storage.describe(f"{folder}/{file.name}")
            expected, nbytes = f"{file.nbytes} bytes", None if found is None else found.nbytes
            what = "is not as another rank has stored it"
            hint = "all ranks must see the same run directory"
            raise SaveError(where, what, expected=expected, found=nbytes or "no file", hint=hint)

    def commit(self, facts: Mapping[str, Json]) -> Manifest:
        """Make it a checkpoint. When it returns, the checkpoint survives a power cut.

        If an intact checkpoint of this step with the same state and facts is there, it is kept.

        Args:
            facts: What `unbroken show` and later tools may want to know without reading a file.

        Returns:
            The manifest of the checkpoint.

        Raises:
            CaptureError: The facts are not JSON, or the manifest is larger than any reader takes.
            LockHeldError: This process does not own the run directory any more.
            SaveError: The storage fails or is full; nothing was committed.
        """
        with self._attempt() as folder:
            manifest = self._manifest(facts)
            committed = commit_staging(self._storage, folder, manifest, self._require_ownership)
        self._is_over = True
        return committed

    def abandon(self) -> None:
        """Give the attempt up and remove its files as far as possible. Never raises `OSError`."""
        folder, self._folder, self._is_over = self._folder, None, True
        if folder is not None:
            with suppress(OSError):  # the next start sweeps what is left
                remove_staging(self._storage, folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None:
        if not self._is_over:
            self.abandon()

    def _make_staging(self) -> str:
        ensure_folder(self._storage, STAGING)
        folder = free_name(self._storage, STAGING, checkpoint_name(self._step))
        self._storage.make_folder(folder)
        return folder

    def _manifest(self, facts: Mapping[str, Json]) -> Manifest:
        plain = from_strict(to_canonical(facts, "facts"))
        if not isinstance(plain, dict):
            raise CaptureError("facts", "must be a mapping", found=type(facts).__name__)
        created = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds")
        files = tuple(self._files[name] for name in sorted(self._files))
        manifest = Manifest(self._step, self._run_id, created, files, plain)
        try:
            manifest.tensors  # noqa: B018 (raises where shards do not make up their tensor)
        except MalformedError as error:
            raise CaptureError("the checkpoint", error.what, found=error.found) from None
        refuse_too_large(plain, files, len(manifest.to_bytes()))
        return manifest

    def _check_paths(self, paths: Iterable[tuple[str, tuple[int, ...] | None]]) -> None:
        for path, offsets in paths:
            if (path, offsets) in self._paths:
                raise CaptureError(path, "two leaves have this path")
            self._paths.add((path, offsets))

    @contextmanager
    def _attempt(self) -> Iterator[str]:
        """Give the staging folder; whatever goes wrong ends the attempt."""
        if self._is_over:
            where = self._storage.describe(checkpoint_name(self._step))
            raise SaveError(where, "this attempt is over", hint="make a new CheckpointWriter")
        try:
            yield self._folder or ""
        except LockHeldError:  # an OSError, but not of the storage
            self.abandon()
            raise
        except OSError as error:
            self.abandon()
            where = self._storage.describe(checkpoint_name(self._step))
            raise save_error(error, where) from error
        except BaseException:
            self.abandon()
            raise
