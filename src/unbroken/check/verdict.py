"""What the check says in the end."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """Whether the resumed run is the same run."""

    EXACT = "exact"
    NOT_EXACT = "not exact"
    UNKNOWN = "could not tell"

    @property
    def exit_code(self) -> int:
        """0, 1, 2 in the order above."""
        return list(Status).index(self)


class Culprit(StrEnum):
    """What was not restored, or why nothing can be said; the first thing that went wrong."""

    NONE = "none"
    # what is wrong with the state at resume
    FROM_SCRATCH = "from-scratch"
    WEIGHTS = "weights"
    STALE_WEIGHTS = "stale-weights"
    STALE_STATE = "stale-state"
    OPTIMIZER = "optimizer"
    STALE_OPTIMIZER = "stale-optimizer"
    PARAMETER_ORDER = "parameter-order"
    # what is wrong with the data
    DATA_RESTARTED = "data-restarted"
    DATA_REPEATED = "data-repeated"
    DATA_SKIPPED = "data-skipped"
    EPOCH_SKIPPED = "epoch-skipped"
    EPOCH_ORDER = "epoch-order"
    DATA_ORDER = "data-order"
    POSITION_UNITS = "position-units"
    BATCH_SIZE = "batch-size"
    AUGMENTATION = "augmentation"
    ACCUMULATION = "accumulation"
    # what is wrong with a step
    SCHEDULER = "scheduler"
    SETTINGS = "settings"
    SCALER = "scaler"
    GENERATORS = "generators"
    SEED_RESET = "seed-reset"
    WRONG_RANK = "wrong-rank"
    BUFFERS = "buffers"
    AVERAGE = "average"
    MODEL = "model"
    GRADIENTS = "gradients"
    MODE = "mode"
    # what is wrong with the resumed process
    NOTHING_TRAINED = "nothing-trained"
    STEPS_MISSING = "steps-missing"
    STEPS_EXTRA = "steps-extra"
    RESUME_FAILED = "resume-failed"
    # why nothing can be said
    NOT_DETERMINISTIC = "not-deterministic"
    NEVER_SAVED = "never-saved"
    SCRIPT_FAILED = "script-failed"
    NOT_RECORDED = "not-recorded"
    NOT_KILLED = "not-killed"
    TIMED_OUT = "timed-out"
    RECORDER_FAILED = "recorder-failed"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a check, in one word, one sentence and its evidence.

    Attributes:
        status: Whether the resumed run is the same run.
        culprit: The first thing that went wrong.
        words: What happened, in plain words.
        evidence: The facts behind it, one a line.
        step: The step of the reference at which the runs first differ, counted from 1.
        rank: The rank where it was seen; None with a single process.
        also: Other things that went wrong at the same place, independent of the culprit.

    Example:
        >>> verdict = Verdict(Status.NOT_EXACT, Culprit.SCHEDULER, "learning rate 0.1, not 0.05")
        >>> print(verdict)
        not exact: scheduler: learning rate 0.1, not 0.05
        >>> verdict.status.exit_code
        1
    """

    status: Status
    culprit: Culprit
    words: str
    evidence: tuple[str, ...] = ()
    step: int | None = None
    rank: int | None = None
    also: tuple[Culprit, ...] = ()

    def __str__(self) -> str:
        """Return the outcome as one line."""
        name = "" if self.culprit is Culprit.NONE else f"{self.culprit}: "
        return f"{self.status}: {name}{self.words}"


def not_exact(culprit: Culprit, words: str, *evidence: str, step: int | None = None) -> Verdict:
    """Return a verdict against the script."""
    return Verdict(Status.NOT_EXACT, culprit, words, evidence, step)


def unknown(culprit: Culprit, words: str, *evidence: str, step: int | None = None) -> Verdict:
    """Return the verdict that nothing can be said."""
    return Verdict(Status.UNKNOWN, culprit, words, evidence, step)
