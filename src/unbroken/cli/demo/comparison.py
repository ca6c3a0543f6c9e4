"""Comparing two runs: their tensors, losses and data, as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbroken.cli.demo.kills import RunObserver
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, Json

_TIMING = ("seconds", "logged_seconds", "tokens_per_second")  # no two runs agree on these


@dataclass(frozen=True)
class ComparedPart:
    """What comparing one kind of thing has shown.

    Attributes:
        what: The kind.
        unit: What is counted.
        total: How many there are in either run.
        different: Those that differ, or that only one run has.
        nbytes: The bytes that were compared; None where that says nothing.
    """

    what: str
    unit: str
    total: int
    different: tuple[str, ...]
    nbytes: int | None = None

    @property
    def is_same(self) -> bool:
        """Whether there was something to compare, and nothing differs."""
        return self.total > 0 and not self.different


def compare(left: Path, right: Path, *, step: int) -> list[ComparedPart]:
    """Compare two run directories at a step; every byte of both checkpoints is verified first.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
    """
    one, other = _verified(left, step), _verified(right, step)
    records, others = _records(left, step), _records(right, step)
    return [
        *(_compare_tensors(what, one, other, is_chosen) for what, is_chosen in _TENSORS.items()),
        _finding("all other values", "values", _values(one), _values(other)),
        *(
            _finding(what, "records", _chosen(records, is_chosen), _chosen(others, is_chosen))
            for what, is_chosen in _METRICS.items()
        ),
    ]


_TENSORS: dict[str, Callable[[str], bool]] = {
    "weights": lambda path: path.startswith("model."),
    "optimizer": lambda path: path.startswith("optimizer."),
    "other tensors": lambda path: not path.startswith(("model.", "optimizer.")),
}
_METRICS: dict[str, Callable[[str], bool]] = {
    "loss of each step": lambda field: field == "loss",
    "order of the data": lambda field: field == "data_digest",
    "all other metrics": lambda field: field not in ("loss", "data_digest", *_TIMING),
}


def _verified(run: Path, step: int) -> CheckpointReader:
    reader = CheckpointReader(LocalStorage(run, create=False), f"checkpoint-{step}")
    reader.check_rest()
    return reader


def _compare_tensors(
    what: str, one: CheckpointReader, other: CheckpointReader, is_of_kind: Callable[[str], bool]
) -> ComparedPart:
    digests = _digests(one, is_of_kind)
    nbytes = sum(one.manifest.tensors[path].nbytes for path in digests)
    return _finding(what, "tensors", digests, _digests(other, is_of_kind), nbytes)


def _digests(reader: CheckpointReader, is_of_kind: Callable[[str], bool]) -> dict[str, str]:
    """Return type, shape and digest of each tensor; the digests have been verified."""
    return {
        path: f"{tensor.dtype} {tensor.shape} {tensor.digest}"
        for path, tensor in reader.manifest.tensors.items()
        if is_of_kind(path)
    }


def _values(reader: CheckpointReader) -> dict[str, str]:
    """Return every value in the files that are not tensors: counters, random generators, ..."""
    return {
        path: text
        for file in reader.manifest.files
        if not file.has_tensors
        for path, text in _leaves(json.loads(reader.read_file(file.name)), file.name)
    }


def _leaves(value: Json, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            if key not in _TIMING:
                yield from _leaves(item, f"{path}: {key}")
    elif isinstance(value, list) and value:
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, json.dumps(value)


def _records(run: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the records of metrics.jsonl up to a step; one that is there twice stands out."""
    found: dict[str, dict[str, Any]] = {}
    for record in RunObserver(run).metrics():
        if record["step"] <= step:
            name = f"step {record['step']}" + ("" if "loss" in record else ", evaluation")
            while name in found:
                name += ", once more"
            found[name] = record
    return found


def _chosen(
    records: Mapping[str, dict[str, Any]], is_chosen: Callable[[str], bool]
) -> dict[str, str]:
    """Return the chosen fields of each record that has any, as text that tells floats apart."""
    chosen = {
        name: {field: value for field, value in record.items() if is_chosen(field)}
        for name, record in records.items()
    }
    return {name: json.dumps(part, sort_keys=True) for name, part in chosen.items() if part}


def _finding(
    what: str,
    unit: str,
    one: Mapping[str, str],
    other: Mapping[str, str],
    nbytes: int | None = None,
) -> ComparedPart:
    names = [*one, *(name for name in other if name not in one)]
    different = tuple(name for name in names if one.get(name) != other.get(name))
    return ComparedPart(what, unit, len(names), different, nbytes)
