"""unbroken: a training run killed at any moment and started again is the same run, bit for bit.

The public names are loaded when first used (PEP 562), so that `import unbroken` and the
commands that only look at files do not pay for importing torch.

Example:
    >>> import unbroken
    >>> unbroken.TrainerConfig(max_steps=100).max_steps
    100
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unbroken.checkpoint import EXIT_STOPPED as EXIT_STOPPED
    from unbroken.checkpoint import Checkpointer as Checkpointer
    from unbroken.checkpoint import Difference as Difference
    from unbroken.checkpoint import RankPolicy as RankPolicy
    from unbroken.checkpoint import ResumePolicy as ResumePolicy
    from unbroken.checkpoint import ResumeReport as ResumeReport
    from unbroken.checkpoint import RunFacts as RunFacts
    from unbroken.checkpoint import SavePolicy as SavePolicy
    from unbroken.checkpoint import TrainingStopped as TrainingStopped
    from unbroken.data import batch_source as batch_source
    from unbroken.errors import CaptureError as CaptureError
    from unbroken.errors import CheckpointError as CheckpointError
    from unbroken.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from unbroken.errors import ConfigError as ConfigError
    from unbroken.errors import CorruptCheckpointError as CorruptCheckpointError
    from unbroken.errors import DataError as DataError
    from unbroken.errors import DifferenceError as DifferenceError
    from unbroken.errors import LockHeldError as LockHeldError
    from unbroken.errors import NewerFormatError as NewerFormatError
    from unbroken.errors import OutOfMemoryError as OutOfMemoryError
    from unbroken.errors import RankError as RankError
    from unbroken.errors import RankTimeoutError as RankTimeoutError
    from unbroken.errors import RunDirectoryError as RunDirectoryError
    from unbroken.errors import SaveError as SaveError
    from unbroken.errors import StateMismatchError as StateMismatchError
    from unbroken.errors import StepVerificationError as StepVerificationError
    from unbroken.errors import UnbrokenError as UnbrokenError
    from unbroken.store import KeepEvery as KeepEvery
    from unbroken.store import KeepPolicy as KeepPolicy
    from unbroken.training import Callback as Callback
    from unbroken.training import Progress as Progress
    from unbroken.training import Trainer as Trainer
    from unbroken.training import TrainerConfig as TrainerConfig
    from unbroken.training import TrainResult as TrainResult

__version__ = "0.1.0"

_HOMES = {
    "unbroken.checkpoint": (
        "EXIT_STOPPED",
        "Checkpointer",
        "Difference",
        "RankPolicy",
        "ResumePolicy",
        "ResumeReport",
        "RunFacts",
        "SavePolicy",
        "TrainingStopped",
    ),
    "unbroken.data": ("batch_source",),
    "unbroken.errors": (
        "CaptureError",
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "CorruptCheckpointError",
        "DataError",
        "DifferenceError",
        "LockHeldError",
        "NewerFormatError",
        "OutOfMemoryError",
        "RankError",
        "RankTimeoutError",
        "RunDirectoryError",
        "SaveError",
        "StateMismatchError",
        "StepVerificationError",
        "UnbrokenError",
    ),
    "unbroken.store": ("KeepEvery", "KeepPolicy"),
    "unbroken.training": ("Callback", "Progress", "TrainResult", "Trainer", "TrainerConfig"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "__version__"])


def __getattr__(name: str) -> object:
    """Load a public name from its module when it is first used."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'unbroken' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
