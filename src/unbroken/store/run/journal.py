"""A file of JSON lines that grows at its end and survives being cut off in the middle of one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from unbroken.errors import RunDirectoryError, SaveError
from unbroken.storage import Storage
from unbroken.store.format.canonical_json import Json, MalformedError, from_strict, to_canonical

_CHUNK_BYTES = 1 << 20
_TAIL_BYTES = 1 << 16


class Journal:
    """Append records to a file, one JSON object a line.

    A record is there whole or not at all: what a kill or a power cut left of the last lines is
    ignored by readers, and cut off by the next append. Only `sync` and `cut` are durable.

    JSON has no NaN and no infinity; they are written as "NaN", "Infinity" and "-Infinity".

    Args:
        storage: The run directory.
        path: The file, which need not exist.

    Example:
        >>> from unbroken.storage import MemoryStorage
        >>> journal = Journal(MemoryStorage(), "metrics.jsonl")
        >>> journal.append({"step": 1, "loss": 0.5})
        >>> list(journal.records()), journal.nbytes
        ([{'loss': 0.5, 'step': 1}], 22)
    """

    def __init__(self, storage: Storage, path: str) -> None:
        self._storage = storage
        self._path = path
        self._nbytes: int | None = None  # where the next record goes; None: not looked yet
        self._is_name_durable = False
        self._appending = threading.Lock()  # a save beside the training tells of itself

    @property
    def nbytes(self) -> int:
        """Bytes of the whole records: where the next one will start, and where `cut` may cut."""
        if self._nbytes is not None:
            return self._nbytes
        found = self._storage.stat(self._path)
        return 0 if found is None else self._last_end(found.nbytes)

    def records(self, *, past_damage: bool = False) -> Iterator[dict[str, Json]]:
        """Yield all whole records, the oldest first.

        Args:
            past_damage: Leave damaged lines out.

        Raises:
            RunDirectoryError: A line is damaged although later ones are whole.
        """
        broken_at: int | None = None
        for end, record in self._lines():
            if record is None:
                broken_at = end if broken_at is None else broken_at
            elif broken_at is not None and not past_damage:
                what = f"the line that ends at byte {broken_at} is damaged"
                hint = "repair or remove that line; no checkpoint depends on it"
                raise RunDirectoryError(self._storage.describe(self._path), what, hint=hint)
            else:
                yield record

    def check(self) -> None:
        """Raise if no record could be appended, as far as that can be told; nothing is changed.

        Raises:
            RunDirectoryError: Something else stands in its place, or it cannot be written.
        """
        try:
            if self._storage.stat(self._path) is not None:
                self._storage.open(self._path).close()  # it is a file
                self._storage.append(self._path, b"")
        except OSError as error:
            where, hint = self._storage.describe(self._path), "move it away, or repair it"
            what = "cannot be used"
            raise RunDirectoryError(where, what, found=error.strerror, hint=hint) from error

    def append(self, record: Mapping[str, object]) -> None:
        """Add a record; it survives a kill at once, and a power cut after `sync`.

        Args:
            record: JSON values under string keys; floats may be NaN and infinite.

        Raises:
            CaptureError: A value is not JSON.
            SaveError: The storage fails or is full; the journal ends where it did.
        """
        line = to_canonical(_spelled_out(record), self._path) + b"\n"
        with self._appending:
            try:
                start = self._cut_torn_tail()
                self._nbytes = None  # until it is known that the whole line went in
                self._storage.append(self._path, line)
            except OSError as error:
                with suppress(OSError):
                    self._cut_torn_tail()
                raise self._save_error(error) from error
            self._nbytes = start + len(line)

    def sync(self) -> None:
        """Make all records so far durable.

        Raises:
            SaveError: The storage fails.
        """
        try:
            try:
                self._storage.sync_file(self._path)
            except FileNotFoundError:  # nothing was written yet
                return
            if not self._is_name_durable:
                self._storage.sync_folder("")
                self._is_name_durable = True
        except OSError as error:
            raise self._save_error(error) from error

    def ends_at(self, nbytes: int) -> bool:
        """Return whether `cut` may cut there: a whole record ends after so many bytes."""
        return 0 <= nbytes <= self.nbytes and self._last_end(nbytes) == nbytes

    def end_before(self, follows: Callable[[Mapping[str, Json]], bool]) -> int:
        """Return where the first record begins for which `follows` holds, or where all end."""
        before = 0
        for end, record in self._lines():
            if record is not None and follows(record):
                return before
            before = end if record is not None else before
        return before

    def cut(self, nbytes: int) -> None:
        """Durably forget everything after the first `nbytes` bytes, which end a record.

        Args:
            nbytes: What `nbytes` was at some time.

        Raises:
            RunDirectoryError: No record ends there.
            SaveError: The storage fails.
        """
        if not self.ends_at(nbytes):
            where, found = self._storage.describe(self._path), f"{self.nbytes} bytes of records"
            expected = f"a record that ends at byte {nbytes}"
            raise RunDirectoryError(where, "cannot be cut", expected=expected, found=found)
        try:
            if self._storage.stat(self._path) is not None:
                self._storage.truncate(self._path, nbytes)
                self._storage.sync_file(self._path)
        except OSError as error:
            raise self._save_error(error) from error
        self._nbytes = nbytes

    def _cut_torn_tail(self) -> int:
        """Cut off what is no whole record, and return where the next one starts."""
        found = self._storage.stat(self._path)
        length = 0 if found is None else found.nbytes
        nbytes = self._last_end(length) if self._nbytes is None else self._nbytes
        if length > nbytes:
            self._storage.truncate(self._path, nbytes)
        self._nbytes = nbytes
        return nbytes

    def _last_end(self, limit: int) -> int:
        """Return where the last whole record in the first `limit` bytes ends; reads only a tail.

        A run of a million steps has a journal of gigabytes, and starts as fast as any other.
        """
        tail = _TAIL_BYTES
        while True:
            start = max(0, limit - tail)
            lines = self._read(start, limit).split(b"\n")
            end = limit - len(lines.pop())
            first = 0 if start == 0 else 1  # a line that began before `start` is not whole here
            for line in reversed(lines[first:]):
                if _record_of(line + b"\n") is not None:
                    return end
                end -= len(line) + 1
            if start == 0:
                return 0
            tail *= 4

    def _read(self, start: int, stop: int) -> bytes:
        data = bytearray(stop - start)
        if data:
            with self._storage.open(self._path) as handle:
                handle.read_into(start, memoryview(data))
        return bytes(data)

    def _lines(self) -> Iterator[tuple[int, dict[str, Json] | None]]:
        """Yield where each line ends, and its record; None for a line that is not one."""
        end = 0
        for line in self._raw_lines():
            end += len(line)
            yield end, _record_of(line)

    def _raw_lines(self) -> Iterator[bytes]:
        """Yield the file line by line; the last may lack its newline."""
        try:
            handle = self._storage.open(self._path)
        except FileNotFoundError:
            return
        with handle:
            rest = b""
            for offset in range(0, handle.nbytes, _CHUNK_BYTES):
                chunk = bytearray(min(_CHUNK_BYTES, handle.nbytes - offset))
                handle.read_into(offset, memoryview(chunk))
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line + b"\n" for line in whole)
            if rest:
                yield rest

    def _save_error(self, error: OSError) -> SaveError:
        where = self._storage.describe(self._path)
        failure = SaveError(where, "cannot be written", found=str(error.strerror or error))
        failure.errno = error.errno
        return failure


def _record_of(line: bytes) -> dict[str, Json] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = from_strict(line)
    except MalformedError:
        return None
    return record if isinstance(record, dict) else None


def _spelled_out(value: object) -> Json:
    """Return `value` with the floats that JSON does not have as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {key: _spelled_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelled_out(item) for item in value]
    return value  # type: ignore[return-value]  # to_canonical refuses what is not JSON
