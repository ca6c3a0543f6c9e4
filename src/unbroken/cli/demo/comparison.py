"""Comparing two runs: their tensors, losses and data, as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unbroken.cli.demo.child import Watch
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointReader, Region

_TIMING = ("seconds", "tokens_per_second")


@dataclass(frozen=True)
class Finding:
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


def compare(left: Path, right: Path, *, step: int) -> list[Finding]:
    """Compare two run directories at a step; every byte of both checkpoints is verified first.

    Raises:
        CheckpointError: A checkpoint is missing or damaged.
    """
    return [*_compare_tensors(left, right, step), *_compare_metrics(left, right, step)]


def _compare_tensors(left: Path, right: Path, step: int) -> list[Finding]:
    one, other = _verified_tensors(left, step), _verified_tensors(right, step)
    kinds: dict[str, Callable[[str], bool]] = {
        "weights": lambda path: path.startswith("model."),
        "optimizer": lambda path: path.startswith("optimizer."),
        "other tensors": lambda path: not path.startswith(("model.", "optimizer.")),
    }
    found = []
    for what, is_of_kind in kinds.items():
        paths = [path for path in sorted({*one, *other}) if is_of_kind(path)]
        different = tuple(path for path in paths if _bits(one, path) != _bits(other, path))
        nbytes = sum(one[path].nbytes for path in paths if path in one)
        found.append(Finding(what, "tensors", len(paths), different, nbytes))
    return found


def _verified_tensors(run: Path, step: int) -> dict[str, Region]:
    reader = CheckpointReader(LocalStorage(run, create=False), f"checkpoint-{step}")
    reader.check_rest()
    return {path: region for path, (_, region) in reader.manifest.tensors.items()}


def _bits(tensors: Mapping[str, Region], path: str) -> object:
    region = tensors.get(path)
    return None if region is None else (region.dtype, region.shape, region.digest)


def _compare_metrics(left: Path, right: Path, step: int) -> list[Finding]:
    one, other = _records(left, step), _records(right, step)
    kinds: dict[str, Callable[[str], bool]] = {
        "loss of each step": lambda key: key == "loss",
        "order of the data": lambda key: key == "data_digest",
        "all other metrics": lambda key: key not in ("loss", "data_digest", *_TIMING),
    }
    return [
        _compare_values(what, _chosen(one, is_of_kind), _chosen(other, is_of_kind))
        for what, is_of_kind in kinds.items()
    ]


def _compare_values(what: str, one: Mapping[str, str], other: Mapping[str, str]) -> Finding:
    lines = sorted({*one, *other})
    different = tuple(line for line in lines if one.get(line) != other.get(line))
    return Finding(what, "records", len(lines), different)


def _records(run: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the records of metrics.jsonl up to a step, by their place in it."""
    records = [record for record in Watch(run).metrics() if record["step"] <= step]
    return {f"{number}: step {record['step']}": record for number, record in enumerate(records)}


def _chosen(
    records: Mapping[str, dict[str, Any]], is_chosen: Callable[[str], bool]
) -> dict[str, str]:
    """Return the chosen fields of each record that has any, as text that tells all floats apart."""
    chosen = {
        place: {key: value for key, value in record.items() if is_chosen(key)}
        for place, record in records.items()
    }
    return {place: json.dumps(part, sort_keys=True) for place, part in chosen.items() if part}
