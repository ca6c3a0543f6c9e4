"""Records of steps on disk: what a killed run leaves behind, for the run that repeats its steps.

A file holds the steps that one start took after one checkpoint, a line for each. Lines are written
without a sync: the kernel keeps them when the process dies, and a power cut may lose them, which
costs nothing but the comparison. Each line carries a checksum; a line that a kill has cut is none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import xxhash

from unbroken.storage import Storage, WriteHandle
from unbroken.store.format.names import STEP_RECORDS

MODES = "training modes"
"""The name that the modes of all modules have in the state of a step."""

DENSE = 1024  # steps after a checkpoint of which each is recorded; later ones are thinned
_ONE_BY_ONE, _AT_ONCE = 64, 4  # steps whose records are written at once, and later in fours
_MAX_BYTES = 64 << 20  # of a file that is read
_FORMAT = 2


@dataclass(frozen=True)
class RecordedRange:
    """The steps that one start takes after one checkpoint, on one rank.

    Attributes:
        attempt: The start that takes them.
        rank: Its rank.
        world_size: How many ranks take part.
        saved_by: The start that saved the checkpoint.
        step: The step of the checkpoint.
        counted: How many steps the optimizer that steps first had taken in the whole run by then;
            None: nobody knows.
    """

    attempt: str
    rank: int
    world_size: int
    saved_by: str
    step: int
    counted: int | None = None

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"{self.attempt}{_end_of_name(self.rank, self.step)}"


def _end_of_name(rank: int, step: int) -> str:
    return f"-rank{rank}-after{step}.jsonl"


_NOTHING: Mapping[str, str] = {}


class StepRecord(NamedTuple):  # made in each step: a dataclass takes five times as long
    """What one step of an optimizer was made of; digests are hexadecimal texts.

    Attributes:
        number: Which step after the checkpoint it is, from 1; those of all optimizers count.
        optimizer: The name of the optimizer.
        learning_rates: Of each group.
        losses: What backward passes began at since the step before, as `float.hex` writes it.
        batches: Digests of the micro-batches used since the step before; None: not known.
        samples: A digest of each sample in them, in order, and how many bytes it has; empty: not
            taken for this step, or not of all.
        generators: Digests of global random generators when the optimizer was called, by name.
        state: Digests of weights and of the optimizer's state before the step, by name.
        gradients: Digests of gradients, by name.
        others: Digests of buffers, and of weights that no registered optimizer moves, by name.
    """

    number: int
    optimizer: str
    learning_rates: tuple[float, ...] = ()
    losses: tuple[str, ...] = ()
    batches: tuple[str, ...] | None = None
    samples: tuple[str, ...] = ()
    generators: Mapping[str, str] = _NOTHING
    state: Mapping[str, str] = _NOTHING
    gradients: Mapping[str, str] = _NOTHING
    others: Mapping[str, str] = _NOTHING

    def line(self) -> bytes:
        """Return the line that stands for it in a file."""
        return _line(self)

    @classmethod
    def of_line(cls, line: bytes) -> StepRecord | None:
        """Return the record of a line; None: it is torn, or something else.

        Example:
            >>> record = StepRecord(1, "optimizer", (0.1,), ("0x1.0p+0",))
            >>> StepRecord.of_line(record.line()) == record, StepRecord.of_line(record.line()[:-9])
            (True, None)
        """
        found = _value_of(line)
        if not isinstance(found, list) or len(found) != len(cls._fields):
            return None
        number, optimizer, rates, losses, batches, samples, *digests = found
        is_right = (
            type(number) is int
            and isinstance(optimizer, str)
            and _are(rates, float | int)
            and _are(losses, str)
            and (batches is None or _are(batches, str))
            and _are(samples, str)
            and all(isinstance(one, dict) and _are([*one.values()], str) for one in digests)
        )
        if not is_right:
            return None
        lists = (tuple(rates), tuple(losses), None if batches is None else tuple(batches))
        return cls(number, optimizer, *lists, tuple(samples), *digests)


def _are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(one, kind) for one in values)


def _line(value: Any) -> bytes:
    text = _ENCODER.encode(value).encode()
    return b"%s\t%016x\n" % (text, xxhash.xxh3_64_intdigest(text))


_ENCODER = json.JSONEncoder(separators=(",", ":"), check_circular=False)


def _value_of(line: bytes) -> Any:
    text, tab, digest = line.rstrip(b"\n").rpartition(b"\t")
    if not tab or digest != b"%016x" % xxhash.xxh3_64_intdigest(text):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class StateAtStop:
    """What a run was when it was stopped by a signal, after its last save.

    Attributes:
        state: A digest of the state of each registered object, by name.
        samples: Indices of the samples that come next, of all ranks; None: nobody knows.
    """

    state: Mapping[str, str]
    samples: Sequence[int] | None = None

    def line(self) -> bytes:
        """Return the line that stands for it in a file."""
        return _line({"stop": [dict(self.state), self.samples]})

    @classmethod
    def of_line(cls, line: bytes) -> StateAtStop | None:
        """Return what a line holds; None: it is torn, or something else.

        Example:
            >>> stop = StateAtStop({"model": "00ff"}, [3, 1])
            >>> StateAtStop.of_line(stop.line()) == stop, StateAtStop.of_line(stop.line()[:-9])
            (True, None)
        """
        found = _value_of(line)
        parts = found.get("stop") if isinstance(found, dict) else None
        if not isinstance(parts, list) or len(parts) != 2 or not isinstance(parts[0], dict):
            return None
        state, samples = parts
        is_right = _are([*state.values()], str) and (samples is None or _are(samples, int))
        return cls(state, samples) if is_right else None


class RecordWriter:
    """Writes the records of one range; an error of the disk ends that, and nothing else.

    Dense after the checkpoint, later ever fewer: of the steps from 1,024 on every second, from
    2,048 on every fourth, and so on. So a file holds some thousand records at most. After the
    first steps they are written in fours, so that a kill can lose the last three.
    """

    def __init__(self, storage: Storage, window: RecordedRange) -> None:
        self.path = f"{STEP_RECORDS}/{window.name}"
        self._storage, self._window = storage, window
        self._file: WriteHandle | None = None
        self._is_over = False
        self._waiting: list[StepRecord] = []

    def write(self, record: StepRecord) -> None:
        """Append a record, unless it is one of those that are left out."""
        if self._is_over or not is_kept(record.number):
            return
        self._waiting.append(record)
        if record.number <= _ONE_BY_ONE or len(self._waiting) == _AT_ONCE:
            self._flush()

    def write_stop(self, stop: StateAtStop) -> None:
        """Append what the run is, now that it stops."""
        if not self._is_over:
            self._append(stop.line())

    def _flush(self) -> None:
        lines, self._waiting = b"".join([one.line() for one in self._waiting]), []
        self._append(lines)

    def _append(self, lines: bytes) -> None:
        try:
            if self._file is None and lines:
                self._file = self._created()
            if self._file is not None:
                self._file.write(lines)
        except OSError:
            self._is_over = True

    def _created(self) -> WriteHandle:
        with suppress(FileExistsError):
            self._storage.make_folder(STEP_RECORDS)
        file = self._storage.create(self.path)
        file.write(_line({"format": _FORMAT, **asdict(self._window)}))
        return file

    def close(self) -> None:
        """Write no more."""
        if not self._is_over:
            self._flush()
        self._is_over = True
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()


def is_kept(number: int) -> bool:
    """Return whether the record of a step is written.

    Example:
        >>> [n for n in (1023, 1024, 1025, 1026, 4097, 4104) if is_kept(n)]
        [1023, 1024, 1026, 4104]
    """
    return number % (1 << max(0, number.bit_length() - DENSE.bit_length() + 1)) == 0


@dataclass(frozen=True)
class Recorded:
    """The steps that an earlier start took after the checkpoint that is resumed.

    Attributes:
        attempt: The start.
        records: By number.
        stop: What the run was when it was stopped there; None: it was not, or nobody knows.
    """

    attempt: str
    records: Mapping[int, StepRecord]
    stop: StateAtStop | None = None

    @property
    def last(self) -> int:
        """The number of the last one."""
        return max(self.records, default=0)

    @property
    def says_anything(self) -> bool:
        """Whether there is something to compare with."""
        return bool(self.records) or self.stop is not None


def read_recorded(
    storage: Storage, *, rank: int, world_size: int, saved_by: str, step: int
) -> list[Recorded]:
    """Return what earlier starts recorded after a checkpoint, the newest start first.

    Damaged lines are left out; a file that cannot be read is none.

    Args:
        storage: The run directory.
        rank: This rank; each compares with its own.
        world_size: How many ranks there are; records of another number are left out.
        saved_by: The start that saved the checkpoint.
        step: Its step.
    """
    found = []
    for name in sorted(_names(storage, _end_of_name(rank, step)), reverse=True):
        header, recorded = _read(storage, name)
        if (header.get("world_size"), header.get("saved_by")) == (world_size, saved_by):
            found.append(recorded)
    return [one for one in found if one.says_anything]


def read_recorded_by_ranks(storage: Storage, *, saved_by: str, step: int) -> list[Recorded]:
    """Return what starts on any number of ranks recorded after a checkpoint, the newest first.

    A step is the one of rank 0, with the samples of all ranks; without any, where one is missing.

    Args:
        storage: The run directory.
        saved_by: The start that saved the checkpoint.
        step: Its step.
    """
    starts: dict[str, dict[int, Recorded]] = {}
    sizes: dict[str, Any] = {}
    for name in sorted(_names(storage, f"-after{step}.jsonl"), reverse=True):
        header, recorded = _read(storage, name)
        if header.get("saved_by") == saved_by:
            rank = header.get("rank")
            starts.setdefault(recorded.attempt, {})[rank if type(rank) is int else -1] = recorded
            sizes[recorded.attempt] = header.get("world_size")
    together = [_of_all(ranks, sizes[name]) for name, ranks in starts.items() if 0 in ranks]
    return [one for one in together if one.says_anything]


def _of_all(ranks: Mapping[int, Recorded], world_size: Any) -> Recorded:
    """Return the records of rank 0 with the samples of all, where all are known."""
    first, is_whole = ranks[0], len(ranks) == world_size
    found = {}
    for number, record in first.records.items():
        every = [one.records[number].samples for one in ranks.values() if number in one.records]
        is_known = is_whole and len(every) == len(ranks) and all(every)
        samples = tuple(sample for one in every for sample in one) if is_known else ()
        found[number] = record._replace(samples=samples)
    return Recorded(first.attempt, found, first.stop)


def _read(storage: Storage, name: str) -> tuple[Mapping[str, Any], Recorded]:
    """Return the header of a file, and its records; nothing of what is no such file."""
    lines = _lines(storage, f"{STEP_RECORDS}/{name}")
    header = _value_of(next(lines, b""))
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        return {}, Recorded("", {})
    records, stop = dict[int, StepRecord](), None
    for line in lines:
        if (record := StepRecord.of_line(line)) is not None:
            records[record.number] = record
        stop = StateAtStop.of_line(line) or stop
    return header, Recorded(str(header.get("attempt")), records, stop)


def remove_abandoned(
    storage: Storage, *, rank: int, world_size: int, steps: frozenset[int]
) -> None:
    """Remove records after checkpoints that are gone: this rank's, and a share of those without.

    Args:
        storage: The run directory.
        rank: This rank.
        world_size: How many ranks there are; records of ranks beyond are shared among them.
        steps: Those of the checkpoints that are still there.
    """
    for name in _names(storage, ".jsonl"):
        found = _RANK_AND_STEP.search(name)
        if found is None:
            continue
        of_rank, step = int(found[1]), int(found[2])
        if of_rank % world_size == rank and step not in steps:
            with suppress(OSError):
                storage.remove_file(f"{STEP_RECORDS}/{name}")


_RANK_AND_STEP = re.compile(r"-rank(\d{1,9})-after(\d{1,18})\.jsonl$")


def _names(storage: Storage, end: str) -> list[str]:
    try:
        return [name for name in storage.list(STEP_RECORDS) if name.endswith(end)]
    except OSError:
        return []


def _lines(storage: Storage, path: str) -> Iterator[bytes]:
    try:
        with storage.open(path) as file:
            buffer = memoryview(bytearray(min(file.nbytes, _MAX_BYTES)))
            file.read_into(0, buffer)
    except (OSError, EOFError):
        return
    yield from bytes(buffer).splitlines()
