"""What the recorder wrote, as values: one recording for each rank of one launch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Batch:
    """The digests of a batch and of its samples; no samples where they could not be separated."""

    digest: str
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fetch:
    """A batch that a `DataLoader` gave.

    Attributes:
        dataset: Which dataset of the process, by the order of their first batches.
        pass_number: Which pass over it, from 1.
        index: Which batch of the pass, from 0.
        samples: The indices of its samples in the dataset; none for an iterable dataset.
        batch: Its contents.
    """

    dataset: int
    pass_number: int
    index: int
    samples: tuple[int | str, ...]
    batch: Batch


@dataclass(frozen=True)
class State:
    """What an optimizer moves, between two steps.

    Attributes:
        params: Digest of the parameters.
        moments: Digest of the tensors of the optimizer's state.
        counts: Digest of the numbers of the optimizer's state, step counts above all.
        params_each: A short digest for each parameter.
    """

    params: str
    moments: str
    counts: str
    params_each: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One optimizer step, and what led to it.

    Attributes:
        optimizer: Which of the process's optimizers, by the order of their first steps.
        inputs: The data with which modules were called since the step before.
        fetched: What data loaders gave since the step before.
        losses: The bits of each tensor that `backward` began from.
        loss_values: The same as numbers.
        learning_rates: Of each group, when the step was taken.
        settings: Digest of the optimizer's other settings.
        schedulers: Class and step of each scheduler.
        scalers: Scale and growth count of each gradient scaler.
        gradients: Digest of the gradients that the step used.
        after: The state after the step.
        buffers: Digest of the buffers of the trained modules.
        buffers_each: A short digest for each buffer.
        others: Label and digest of weights that no optimizer moves.
        generators: Digest of each global random generator, after the step.
        before: The state before the step; only for the first step of an optimizer in a process.
        had_moments: With `before`: whether the optimizer's state held anything but zeros.
        setting_values: With `before`: the optimizer's other settings.
        modified: The parameters before the step, as in `State`, where something else than this
            optimizer has changed them since its last step.
        modes: For each module with trained parameters whether it is in training mode.
    """

    optimizer: int
    inputs: tuple[Batch, ...]
    fetched: tuple[Fetch, ...]
    losses: tuple[str, ...]
    loss_values: tuple[float, ...]
    learning_rates: tuple[float, ...]
    settings: str
    schedulers: tuple[tuple[str, int], ...]
    scalers: tuple[tuple[float, float], ...]
    gradients: str
    after: State
    buffers: str
    buffers_each: tuple[str, ...]
    others: tuple[tuple[str, str], ...]
    generators: Mapping[str, str]
    before: State | None = None
    had_moments: bool = False
    setting_values: tuple[Mapping[str, Any], ...] = ()
    modified: tuple[str, tuple[str, ...]] | None = None
    modes: str = ""

    @property
    def data(self) -> tuple[Batch, ...]:
        """The batches of the step: what modules were called with, else what loaders gave."""
        return self.inputs or tuple(one.batch for one in self.fetched)


@dataclass(frozen=True)
class Recording:
    """What one process did.

    Attributes:
        rank: Its rank.
        world_size: How many ranks there were.
        steps: Its optimizer steps.
        names: The names of the parameters of its first optimizer.
        buffer_names: The names of the buffers.
        param_bytes: The size of the parameters of its first optimizer.
        sampled: Whether only blocks of large tensors were read.
        errors: Failures of the recorder itself.
        overhead: The recorder's share of the time of a step; None with too few steps.
    """

    rank: int = 0
    world_size: int = 1
    steps: tuple[Step, ...] = ()
    names: tuple[str, ...] = ()
    buffer_names: tuple[str, ...] = ()
    param_bytes: int = 0
    sampled: bool = False
    errors: tuple[str, ...] = ()
    overhead: float | None = None

    def name_of(self, index: int) -> str:
        """Return what a parameter is called."""
        known = index < len(self.names) and self.names[index]
        return known or f"parameter {index}"


def read_recordings(folder: Path) -> dict[int, Recording]:
    """Return the recording of each rank; of several processes with one rank the longest.

    Example:
        >>> read_recordings(Path("no-such-folder"))
        {}
    """
    found: dict[int, Recording] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        recording = _recording(list(_lines(path)))
        known = found.get(recording.rank)
        if known is None or len(recording.steps) > len(known.steps):
            found[recording.rank] = recording
    return dict(sorted(found.items()))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file; a torn last line is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            yield json.loads(line)


def _recording(lines: Sequence[Mapping[str, Any]]) -> Recording:
    process: Mapping[str, Any] = {}
    scene: Mapping[str, Any] = {}
    steps: list[Mapping[str, Any]] = []
    errors: list[str] = []
    for line in lines:
        match line["kind"]:
            case "process":
                process = line
            case "scene" if line["optimizer"] == 0:
                scene = line
            case "step":
                steps.append(line)
            case "error":
                errors.append(line["traceback"])
    return Recording(
        rank=process.get("rank", 0),
        world_size=process.get("world_size", 1),
        steps=tuple(_step(line) for line in steps),
        names=tuple(scene.get("names", ())),
        buffer_names=tuple(scene.get("buffer_names", ())),
        param_bytes=scene.get("param_bytes", 0),
        sampled=scene.get("sampled", False),
        errors=tuple(errors),
        overhead=_overhead(steps),
    )


def _step(line: Mapping[str, Any]) -> Step:
    before, modified = line.get("before"), line.get("edited")
    return Step(
        optimizer=line["optimizer"],
        inputs=tuple(Batch(digest, tuple(rows)) for digest, rows in line["inputs"]),
        fetched=tuple(
            Fetch(dataset, number, index, tuple(samples), Batch(digest, tuple(rows)))
            for dataset, number, index, samples, digest, rows in line["fetched"]
        ),
        losses=tuple(line["losses"]),
        loss_values=tuple(line["loss_values"]),
        learning_rates=tuple(line["learning_rates"]),
        settings=line["settings"],
        schedulers=tuple((name, step) for name, step in line["schedulers"]),
        scalers=tuple((scale, count) for scale, count in line["scalers"]),
        gradients=line["gradients"],
        after=_state(line),
        buffers=line["buffers"],
        buffers_each=_eights(line["buffers_each"]),
        others=tuple((label, digest) for label, digest in line["others"]),
        generators=line["generators"],
        before=None if before is None else _state(before),
        modes=line.get("modes", ""),
        had_moments=before is not None and before["has_moments"],
        setting_values=() if before is None else tuple(before["settings"]),
        modified=None
        if modified is None
        else (modified["params"], _eights(modified["params_each"])),
    )


def _state(line: Mapping[str, Any]) -> State:
    return State(line["params"], line["moments"], line["counts"], _eights(line["params_each"]))


def _eights(text: str) -> tuple[str, ...]:
    return tuple(text[start : start + 8] for start in range(0, len(text), 8))


def _overhead(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the share of the median step; the first steps, which look around, are left out."""
    pairs = list(pairwise(steps[2:]))
    if not pairs:
        return None
    wall = median(float(after["at"] - before["at"]) for before, after in pairs)
    own = median(float(after["spent"] - before["spent"]) for before, after in pairs)
    return own / (wall - own) if wall > own else None
