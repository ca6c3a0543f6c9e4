"""What is trained, on what, and how often it is saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TOKENS, SAMPLES, VOCABULARY = 128, 1_000_003, 512
LEARNING_RATE = 1e-5


class Blocks:
    """A million blocks of tokens, made when asked for."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int):
        import torch

        row = torch.arange(index, index + TOKENS) % VOCABULARY
        return {"input_ids": row, "labels": row}


@dataclass(frozen=True)
class Work:
    """One training.

    Args:
        folder: Where checkpoints go, and are looked for.
        model: Makes the model, whose parameters may be frozen in part.
        max_steps: Its end.
        save_steps: Save every so many steps; None: never.
        keep: How many checkpoints stay; None: all.
        on_step: Called after each step with how many there were.
        compressed: Keep tensors compressed; only our own trainer can.
    """

    folder: Path
    model: Callable[[], object]
    max_steps: int
    save_steps: int | None
    keep: int | None = None
    on_step: Callable[[int], None] = lambda step: None
    compressed: bool = False

    def data(self) -> Blocks:
        return Blocks()


def optimizer_for(model):
    import torch

    trained = [one for one in model.parameters() if one.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def newest_first(folder: Path, pattern: str) -> list[Path]:
    """Return the checkpoints whose names end in a step, the newest first."""
    return sorted(folder.glob(pattern), key=lambda path: -int(path.stem.rpartition("-")[2]))
