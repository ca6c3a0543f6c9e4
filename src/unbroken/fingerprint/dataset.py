"""What the data of a run are: length, a sample of the records, and the code that makes batches."""

from __future__ import annotations

import copy
import fcntl
import gc
import os
import select
import signal
import stat
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Subset,
    TensorDataset,
    default_collate,
    default_convert,
)

from unbroken.data import (
    BatchDigest,
    KeyedRandom,
    Permutation,
    derive_key,
    drawn_from,
    generators_in,
)
from unbroken.fingerprint.source_code import is_user_code, qualified_name, source_digest
from unbroken.fingerprint.values import (
    NOT_COMPARED,
    Plain,
    callable_facts,
    facts_of,
    facts_of_items,
    record_digest,
    tokenizer_digest,
)
from unbroken.introspection import Failed, attributes_of, safe_getattr, try_call

# Run work in a forked child that leaves no trace in this process: only lines of text come back.
#
# The child shares no position in a file, no socket and no generator with this process, writes
# nothing to the terminal, and ends at a deadline. With its own copy of everything it may open
# files, draw numbers and fill caches.


_DONE = "."
_HANDLED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGALRM,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


@dataclass(frozen=True)
class ChildOutput:
    """The whole lines that a child wrote in time, and why some may be missing (None: none are)."""

    lines: list[str]
    missing: str | None


class ForkedWork:
    """Work that runs in a forked child while this process goes on.

    That CUDA has begun here does no harm as long as the work leaves it alone, as the workers of a
    DataLoader do. A lock that another thread held at the fork stays locked in the child for ever.
    It then stands still, and ends at the deadline like one that is slow.

    Args:
        work: Called in the child as `work(write)`; `write(line)` sends one line back.
        seconds: How long the child may live.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], None], *, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._child: int | None = None
        if sys.platform != "linux":
            return
        self._reader, writer = os.pipe()
        self._child = _forked()
        if self._child == 0:
            _work_as_child(work, writer, seconds)
        os.close(writer)
        if self._child is None:
            os.close(self._reader)

    def output(self) -> ChildOutput:
        """Wait for the child, end it, and return what it wrote. Call it once."""
        if self._child is None:
            return ChildOutput([], "there is no process of their own to read them in")
        try:
            lines = _lines_until(self._deadline, self._reader)
        finally:
            self._end()
        if lines[-1:] == [_DONE]:
            return ChildOutput(lines[:-1], None)
        is_late = time.monotonic() >= self._deadline
        return ChildOutput(
            lines, f"it took longer than {self._seconds:g} s" if is_late else "their reader died"
        )

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            os.close(self._reader)
            _end(child)

    def __del__(self) -> None:
        """Kill the child if its result was never read."""
        self._end()


def _forked() -> int | None:
    """Return the child's id, 0 in the child, None where no process can be made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads; see above
        try:
            return os.fork()
        except OSError:
            return None


def _lines_until(deadline: float, reader: int) -> list[str]:
    """Return all whole lines that arrive in time."""
    poll, text = select.poll(), b""
    poll.register(reader, select.POLLIN)
    while not text.endswith(f"{_DONE}\n".encode()):
        left = deadline - time.monotonic()
        if not poll.poll(max(0.0, left) * 1000):  # what came in time may be read late
            break
        part = os.read(reader, 65536)
        if not part:
            break
        text += part
    return text.decode().split("\n")[:-1]


def _end(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # another handler of this process has waited for it


def _work_as_child(
    work: Callable[[Callable[[str], None]], None], writer: int, seconds: float
) -> None:
    """Do the work and end the child; no exit handler of the parent runs."""
    try:
        _live_no_longer_than(seconds)
        gc.disable()  # nothing of the parent may be finished here: it could flush its files
        _let_go_of_files(keep=writer)
        torch.set_num_threads(1)  # the threads of the parent's pools are not here
        work(partial(_write, writer))
        _write(writer, _DONE)
    finally:
        os._exit(0)


def _write(writer: int, line: str) -> None:
    os.write(writer, f"{line}\n".encode())


def _live_no_longer_than(seconds: float) -> None:
    """End after so many seconds even if the parent died, and on signals that the parent handles."""
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _let_go_of_files(keep: int) -> None:
    """Give the child its own file positions, and nothing that it could write to."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in [int(name) for name in os.listdir("/proc/self/fd")]:
        if descriptor in (keep, nowhere):
            continue
        if descriptor <= 2:
            os.dup2(nowhere, descriptor)
        else:
            _let_go(descriptor, nowhere)
    sys.stdout = sys.stderr = open(nowhere, "w")  # noqa: SIM115 (open until the end)


def _let_go(descriptor: int, nowhere: int) -> None:
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:  # the folder that was listed
        return
    if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
        os.dup2(nowhere, descriptor)
    elif stat.S_ISREG(mode):
        writes = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY
        if writes:
            os.dup2(nowhere, descriptor)
        else:
            own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
            os.lseek(own, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
            os.dup2(own, descriptor)
            os.close(own)


# A few records of a data set as digests, read where reading can change nothing here.


_RECORDS = 16
_SECONDS = 0.05  # for reading
_DEADLINE = 3.0  # for all of it, a fork and a first record that is slow included
_KEY = derive_key(0, "fingerprint")
_TWICE = 2
_OWN_RECORD, _OWN_BATCH = "a record moves a generator", "a batch is not the same twice"
_SEEDED, _SEEDED_BATCH = "the same by its generators", "a batch is the same by its generators"
BY_GENERATORS = "by its own generators"
"""What `repeatable` is where records are the same whenever the generators stand where they did."""
_INERT = (bool, int, float, complex, str, bytes, type(None), np.ndarray, np.generic, torch.Tensor)


def begin_sampling(
    data: Any, length: int, collate: Callable[..., Any] | None, clock: Callable[[], float]
) -> Callable[[], dict[str, Plain]]:
    """Begin to read some records, the same ones each time; return what waits for their digests.

    A data set runs in a forked child, and so does a collator: whatever they open, draw or count
    stays there. Lists, arrays and tensors are read here. Where there is no child to read
    in, or it reads not one record twice in time, the facts say so instead.
    """
    indices = sampled_records(length) if length > 0 else []
    inert: dict[str, Plain] = {}
    if not indices or _is_inert(data, indices):
        records = [record_digest(data[index]) for index in indices]
        inert = {"records": [*records], "repeatable": True} if records else {}
        if not indices or collate is None:
            return lambda: inert
    on_device = _device_has_begun()

    def read(write: Callable[[str], None]) -> None:
        for line in _lines(data, indices, collate, clock, on_device=on_device):
            write(line)

    reading = ForkedWork(read, seconds=_DEADLINE)
    return lambda: {**_facts(reading.output()), **inert}


def _device_has_begun() -> bool:
    """Return whether a forked child could not use the device."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _facts(output: ChildOutput) -> dict[str, Plain]:
    """Return the facts in what a child wrote: digests, and perhaps why there are no more."""
    lines = list(output.lines)
    is_seeded = _SEEDED in lines
    if is_seeded:
        lines = lines[lines.index(_SEEDED) + 1 :]
    found = [line for line in lines if line not in (_OWN_RECORD, _OWN_BATCH, _SEEDED_BATCH)]
    digests = [line for line in found if not line.startswith(NOT_COMPARED)]
    own: dict[str, Plain] = {"collates": False} if _OWN_BATCH in lines else {}
    own |= {"collates": BY_GENERATORS} if _SEEDED_BATCH in lines else {}
    if len(digests) < 2:  # the first record is read twice
        reasons = [line for line in found if line not in digests]
        return {**own, "records": reasons[0] if reasons else f"{NOT_COMPARED}{output.missing}"}
    is_same: Plain = digests[0] == digests[1] and _OWN_RECORD not in lines
    if is_same and is_seeded:
        is_same = BY_GENERATORS
    return {**own, "records": [digests[0], *digests[2:]], "repeatable": is_same}


def sampled_records(length: int) -> list[int]:
    """Return the first record, the last one, and others by the order of a fixed key."""
    some = Permutation(length, _KEY)(np.arange(min(length, _RECORDS), dtype=np.uint64))
    return list(dict.fromkeys([0, length - 1, *some.tolist()]))[:_RECORDS]


def _lines(
    data: Any,
    indices: list[int],
    collate: Callable[..., Any] | None,
    clock: Callable[[], float],
    *,
    on_device: bool,
) -> Iterator[str]:
    """Yield the digest of the first record twice, then those of the others, while time allows.

    After them a line tells of records, or batches of them, that are not the same twice.
    A record that raises counts by its exception if others can be read. Where none can, or what is
    missing is only missing in this process (a connection, memory, the device), a line says so.
    """
    transient = (OSError, MemoryError, *((RuntimeError,) if on_device else ()))
    reading = _Reading(data, indices, clock, clock() + _SECONDS, transient, on_device=on_device)
    with KeyedRandom() as rng:
        yield from reading.lines(rng, {})
        own = generators_in(data)
        if reading.is_unrepeatable and own and reading.had == own.keys():
            yield _SEEDED
            yield from reading.lines(rng, own)
        if reading.is_unrepeatable:
            yield _OWN_RECORD
        if collate is not None and reading.can_be_read:
            yield from _draws_by_itself(collate, reading.first, rng)
    if not reading.can_be_read:
        yield f"{NOT_COMPARED}{reading.reason}"


class _Reading:
    """Records that are read one after the other, the first of them twice, while time allows."""

    def __init__(
        self,
        data: Any,
        indices: list[int],
        clock: Callable[[], float],
        deadline: float,
        transient: tuple[type[Exception], ...],
        *,
        on_device: bool,
    ) -> None:
        self.first: list[Any] = []
        self.can_be_read = self.is_unrepeatable = False
        self.reason = ""
        self.had = generators_in(data).keys()
        self._data, self._indices = data, indices
        self._clock, self._deadline = clock, deadline
        self._transient, self._on_device = transient, on_device

    def lines(self, rng: KeyedRandom, own: Mapping[str, Any]) -> Iterator[str]:
        """Yield digests; stop after the first record where it is not the same twice.

        Args:
            rng: Keys the global generators.
            own: Generators that the data hold, to be keyed, too.
        """
        self.first, held, found = [], list[str](), list[tuple[str, dict[str, str]]]()
        for position, index in enumerate([self._indices[0], *self._indices]):
            rng.seed(derive_key(_KEY, index))
            _seed(own, derive_key(_KEY, index))
            record = _read(self._data, index)
            digest = record if isinstance(record, Failed) else try_call(record_digest, record)
            if isinstance(digest, Failed):
                self.reason = _reason(digest.error, on_device=self._on_device)
                if isinstance(digest.error, self._transient):
                    break
                digest = record_digest(qualified_name(digest.error))
            else:
                self.can_be_read = True
            if len(self.first) < _TWICE:
                self.first.append(record)
                found.append((digest, drawn_from(self._data)))
            held.append(digest)
            if self.can_be_read:
                yield from held
                held.clear()
            self.is_unrepeatable = len(found) == _TWICE and found[0] != found[1]
            if (position and self._clock() >= self._deadline) or self._may_stop(own):
                break

    def _may_stop(self, own: Mapping[str, Any]) -> bool:
        return self.is_unrepeatable and not own and bool(self.had)


def _seed(generators: Mapping[str, Any], key: int) -> None:
    """Key generators of a data set's own; in a child process, whose they are alone."""
    for one in generators.values():
        if isinstance(one, torch.Generator):
            one.manual_seed(key >> 1)
        elif isinstance(one, np.random.Generator):
            one.bit_generator.state = type(one.bit_generator)(key).state
        elif isinstance(one, np.random.RandomState):
            one.seed(key % 2**32)
        else:
            one.seed(key)


def _draws_by_itself(
    collate: Callable[..., Any], records: list[Any], rng: KeyedRandom
) -> Iterator[str]:
    """Tell if a collator gives another batch of the same records under the same key."""
    had = generators_in(collate).keys()
    if _is_one_batch(collate, records, rng, {}):
        return
    own = generators_in(collate)
    is_seeded = bool(own) and own.keys() == had and _is_one_batch(collate, records, rng, own)
    yield _SEEDED_BATCH if is_seeded else _OWN_BATCH


def _is_one_batch(
    collate: Callable[..., Any], records: list[Any], rng: KeyedRandom, own: Mapping[str, Any]
) -> bool:
    found = []
    for _ in range(_TWICE):
        copied = try_call(copy.deepcopy, records)  # a collator may change what it is given
        rng.seed(_KEY)
        _seed(own, _KEY)
        batch = try_call(collate, copied)
        if isinstance(copied, Failed) or isinstance(batch, Failed):
            return True  # of records that do not go together, say
        seen = BatchDigest()
        seen.add(batch)
        found.append((seen.text(), drawn_from(collate)))
    return bool(found[0] == found[1])


def _read(data: Any, index: int) -> Any:
    """Return a record, or a batch where a data set takes lists of indices; or what it raised."""
    record = try_call(lambda: data[index])
    if not isinstance(record, Failed):
        return record
    of_batch = try_call(lambda: data[[index]])
    return record if isinstance(of_batch, Failed) else of_batch


def _reason(error: Exception, *, on_device: bool) -> str:
    name = qualified_name(error).removeprefix("builtins.")
    where = "in a process that cannot use the device"
    return f"{name} {where}" if on_device else f"reading one raised {name}"


def _is_inert(data: Any, indices: list[int]) -> bool:
    """Return whether reading these records runs no code but Python's, NumPy's and torch's."""
    if type(data) in (range, np.ndarray, torch.Tensor, TensorDataset):
        return True
    if type(data) is Subset:
        inner = [data.indices[index] for index in indices]
        return type(data.indices) in (list, range) and _is_inert(data.dataset, inner)
    return type(data) in (list, tuple) and all(_is_plain(data[index]) for index in indices)


def _is_plain(record: Any, depth: int = 0) -> bool:
    if type(record) in _INERT or isinstance(record, np.generic):
        return True
    if depth > 3 or type(record) not in (list, tuple, dict):
        return False
    parts = record.values() if isinstance(record, dict) else record
    return all(_is_plain(part, depth + 1) for part in parts)


_TRANSFORMS = ("transform", "target_transform", "transforms")
_FACTS_ELSEWHERE = frozenset({"tokenizer", "data_source", "dataset", "sampler", *_TRANSFORMS})
_OF_THIS_RANK = frozenset({"num_replicas", "rank", "epoch", "num_samples", "total_size"})


def data_facts(
    data: Any,
    collate_fn: Callable[..., Any] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Plain]:
    """Return what training data are, from a few of their records; leaves no trace in them.

    The records are read under keyed generators. A data set runs in a forked child, so that
    neither its generators nor its files nor its counters are touched here. Sixteen are read, or
    as many as 50 milliseconds allow: lists are compared by what both have. Where they cannot be
    read (they are on a GPU, or there is no fork), `records` is a text that says so.

    Args:
        data: A map-style data set, a `DataLoader`, or any other iterable (which is not read).
        collate_fn: Makes a batch of a list of samples.
        clock: Seconds.

    Returns:
        `class`; `length`; `records`: digests (of the class of the exception where reading one
        raises); or the data set's own `fingerprint` instead of them; `repeatable`: False if a
        record was not the same twice under the same key, because it draws from a generator of
        its own; `source`, `values`: the numbers and functions in the user's own data sets;
        `transform`, `collate_fn`, `tokenizer`, `loader`.

    Example:
        >>> facts = data_facts([3, 1, 2])
        >>> facts["length"], len(facts["records"]), facts["repeatable"]
        (3, 3, True)
    """
    return begin_data_facts(data, collate_fn, clock=clock)()


def begin_data_facts(
    data: Any,
    collate_fn: Callable[..., Any] | None = None,
    *,
    clock: Callable[[], float] = time.perf_counter,
    keeps_generators: bool = False,
) -> Callable[[], dict[str, Plain]]:
    """Begin to read records, and return what waits for `data_facts`, to be called once.

    What the data are is taken now, whatever happens to them before the answer is asked for.
    `keeps_generators`: checkpoints hold the states of generators that the data have of their own.

    Example:
        >>> facts = begin_data_facts([3, 1, 2])
        >>> facts()["length"]
        3
    """
    if isinstance(data, DataLoader):
        collate_fn = data.collate_fn if collate_fn is None else collate_fn
        more = {"clock": clock, "keeps_generators": keeps_generators}
        begun, loader = begin_data_facts(data.dataset, collate_fn, **more), _loader(data)  # type: ignore[arg-type]
        return lambda: {**begun(), "loader": loader}
    facts: dict[str, Plain] = {"class": qualified_name(type(data)), **_code(data, collate_fn)}
    if isinstance(data, FunctionType | MethodType | partial):
        return lambda: {**facts, "made_by": callable_facts(data)}
    length, own = try_call(len, data), safe_getattr(data, "fingerprint")
    if isinstance(length, int):
        facts["length"] = length
    if isinstance(own, str):
        return lambda: {**facts, "fingerprint": own}
    if not isinstance(length, int) or not hasattr(type(data), "__getitem__"):
        return lambda: facts
    collate = None if _draws_nothing(collate_fn) else collate_fn
    reading = begin_sampling(data, length, collate, clock)  # last: after a fork memory is slower
    return lambda: _with(facts, reading(), keeps_generators=keeps_generators)


def _with(
    facts: dict[str, Plain], read: dict[str, Plain], *, keeps_generators: bool
) -> dict[str, Plain]:
    """Return the facts with those that were read; what a collator does stands with its code."""
    if not keeps_generators:
        read = {name: one != BY_GENERATORS and one for name, one in read.items()}
    collates, collate = read.pop("collates", None), facts.get("collate_fn")
    if collates is not None and isinstance(collate, dict):
        facts = {**facts, "collate_fn": {**collate, "repeatable": collates}}
    return {**facts, **read}


def _draws_nothing(collate: Callable[..., Any] | None) -> bool:
    known = collate in (None, default_collate, default_convert)
    return known or safe_getattr(collate, "deterministic") is True


def keeps_generators(source: Any) -> bool:
    """Return whether the state of a source of batches holds the generators that its data have.

    Example:
        >>> keeps_generators([1, 2])
        False
    """
    own = getattr(source, "own_generators", None)
    return own is not None and own.are_kept


def begin_source_facts(sources: Mapping[str, Any]) -> Callable[[], dict[str, Plain]] | None:
    """Begin to take the facts of registered sources of batches and loaders; None: there are none.

    Those of the one called "data", or else of the first, stand for themselves, those of others
    under their names.

    Example:
        >>> from unbroken.data import batch_source
        >>> source = batch_source([3, 1, 2], seed=0, global_batch_size=1)
        >>> begin_source_facts({"data": source})()["length"]
        3
    """
    begun = {
        name: begin_data_facts(
            getattr(one, "data", one),
            getattr(one, "collate_fn", None),
            keeps_generators=keeps_generators(one),
        )
        for name, one in sources.items()
    }
    first = "data" if "data" in begun else next(iter(begun), None)
    if first is None:
        return None

    def facts() -> dict[str, Plain]:
        others = {name: read() for name, read in begun.items() if name != first}
        return {**begun[first](), **others}

    return facts


def _loader(loader: DataLoader[Any]) -> dict[str, Plain]:
    facts: dict[str, Plain] = {
        "batch_size": loader.batch_size,
        "drop_last": loader.drop_last,
        "sampler": qualified_name(type(loader.sampler)),
    }
    own = [] if type(loader.batch_sampler) in (BatchSampler, type(None)) else ["batch_sampler"]
    for name in ("sampler", *own):
        if values := _settings(getattr(loader, name)):
            facts[f"{name}_values"] = values
    return facts


def _settings(sampler: Any) -> dict[str, Plain]:
    """Return the attributes of a sampler, and of one in it; a list of indices is one itself."""
    if isinstance(sampler, list | tuple):
        return facts_of_items({"indices": sampler})
    own = attributes_of(sampler)
    if "num_replicas" in own:
        own = {name: value for name, value in own.items() if name not in _OF_THIS_RANK}
    return facts_of_items({n: v for n, v in own.items() if n not in _FACTS_ELSEWHERE})


def _code(data: Any, collate_fn: Callable[..., Any] | None) -> dict[str, Plain]:
    facts: dict[str, Plain] = {}
    layers = [layer for layer in _layers(data) if is_user_code(type(layer))]
    sources = {qualified_name(type(one)): source_digest(type(one)) for one in layers}
    if sources:
        facts["source"] = {**sources}
    if values := {qualified_name(type(one)): found for one in layers if (found := _values(one))}:
        facts["values"] = {**values}
    for name in _TRANSFORMS:
        transform = safe_getattr(data, name)
        if callable(transform):
            facts[name] = callable_facts(transform)
    if collate_fn is not None:
        facts["collate_fn"] = callable_facts(collate_fn, without=_FACTS_ELSEWHERE)
    for holder in (data, collate_fn):
        tokenizer = safe_getattr(holder, "tokenizer")
        digest = None if tokenizer is None else try_call(tokenizer_digest, tokenizer)
        if isinstance(digest, str):
            facts["tokenizer"] = digest
    return facts


def _layers(data: Any, depth: int = 0) -> Iterator[Any]:
    """Yield a data set, and those that it is made of."""
    yield data
    for part in _inner(data) if depth < _MAX_LAYERS else ():
        yield from _layers(part, depth + 1)


_MAX_LAYERS = 8


def _inner(data: Any) -> list[Any]:
    if isinstance(data, Subset):
        return [data.dataset]
    return list(data.datasets) if isinstance(data, ConcatDataset) else []


def _values(data: Any) -> dict[str, Plain]:
    """Return the numbers of a data set and what it calls; texts are paths, arrays are records."""
    found: dict[str, Plain] = {}
    for name, value in attributes_of(data).items():
        counts = isinstance(value, bool | int | float) or callable(value)
        if counts and name not in _FACTS_ELSEWHERE and (facts := facts_of(value)) is not ...:
            found[name] = facts
    return dict(sorted(found.items()))
