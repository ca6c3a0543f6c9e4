"""The Trainer: one loop, its configuration, and what follows a run."""

from unbroken.training.callback import Callback as Callback
from unbroken.training.config import TrainerConfig as TrainerConfig
from unbroken.training.display import Display as Display
from unbroken.training.display import NoDisplay as NoDisplay
from unbroken.training.run_state import Progress as Progress
from unbroken.training.run_state import TrainResult as TrainResult
from unbroken.training.trainer import Trainer as Trainer

__all__ = [
    "Callback",
    "Display",
    "NoDisplay",
    "Progress",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
]
