"""The data of a recording in one row: by contents, or by the samples that loaders took."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unbroken.check.recording import Step

_RUNS = (4, 2)  # so many batches in a row are a place, and no accident


@dataclass(frozen=True)
class Stream:
    """All micro-batches of a recording, in order.

    Attributes:
        tokens: What stands for each: equal tokens are the same data.
        windows: For each step the index of its first micro-batch.
        epochs: The steps at which a pass over the data begins.
    """

    tokens: tuple[Any, ...]
    windows: tuple[int, ...]
    epochs: tuple[int, ...]

    def since(self, step: int) -> tuple[Any, ...]:
        """Return what a step and those after it used."""
        return self.tokens[self.windows[step] :] if step < len(self.windows) else ()

    def window(self, step: int) -> tuple[int, int]:
        """Return where the micro-batches of a step begin and end."""
        ends = (*self.windows[1:], len(self.tokens))
        return self.windows[step], ends[step]

    def step_of(self, index: int) -> int:
        """Return the step that used a micro-batch."""
        return bisect_right(self.windows, index) - 1

    def epoch_of(self, step: int) -> int:
        """Return the epoch in which a step is, from 0."""
        return max(bisect_right(self.epochs, step) - 1, 0)

    def find(self, ours: Sequence[Any]) -> list[int]:
        """Return each index from which `ours` follow one another, as far as both go.

        Four in a row are looked for, then two: a position that was lost right before the end of
        an epoch shows itself only in those.

        Example:
            >>> Stream(("a", "b", "a", "c"), (0, 1, 2, 3), (0,)).find(("a", "c"))
            [2]
        """
        for run in _RUNS:
            places = range(len(self.tokens))
            found = [index for index in places if follows(self.tokens[index:], ours, run)]
            if found:
                return found
        return []


def follows(theirs: Sequence[Any], ours: Sequence[Any], run: int = _RUNS[0]) -> bool:
    """Return whether two rows of data begin alike."""
    pairs = list(zip(theirs[:run], ours[:run], strict=False))
    return bool(pairs) and all(a == b for a, b in pairs)


def by_content(steps: Sequence[Step]) -> Stream:
    """Return the data by the digests of what was used."""
    tokens: list[str] = []
    windows = []
    for step in steps:
        windows.append(len(tokens))
        tokens.extend(batch.digest for batch in step.data)
    return Stream(tuple(tokens), tuple(windows), tuple(epoch_starts(steps)))


def by_samples(steps: Sequence[Step]) -> Stream | None:
    """Return the data by the samples that the loader of the training data took.

    What was fetched ahead is counted to the step that uses it: each fetched batch stands for as
    many uses as all steps have on average. None if a loader did not tell its samples.
    """
    training = _training_dataset(steps)
    fetched = [fetch for step in steps for fetch in step.fetched if fetch.dataset == training]
    uses = sum(len(step.data) for step in steps)
    if not fetched or not all(fetch.samples for fetch in fetched):
        return None
    uses_of_each = max(round(uses / len(fetched)), 1)
    windows, used = [], 0
    for step in steps:
        windows.append(min(used // uses_of_each, len(fetched)))
        used += len(step.data)
    tokens = tuple(fetch.samples for fetch in fetched)
    return Stream(tokens, tuple(windows), tuple(epoch_starts(steps)))


def epoch_starts(steps: Sequence[Step]) -> list[int]:
    """Return the steps at which a pass over the training data begins; [0] if that is not seen."""
    training = _training_dataset(steps)
    begins = {
        index
        for index, step in enumerate(steps)
        if any(fetch.index == 0 and fetch.dataset == training for fetch in step.fetched)
    }
    return sorted({0} | begins)


def _training_dataset(steps: Sequence[Step]) -> int | None:
    """Return the dataset from which most batches come."""
    counted = Counter(fetch.dataset for step in steps for fetch in step.fetched)
    return counted.most_common(1)[0][0] if counted else None
