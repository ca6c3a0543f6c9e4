"""Scripts of users, killed by SIGKILL and started again by the same command, in fresh processes."""

from __future__ import annotations

import multiprocessing
import os
import random
import runpy
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from fresh import run_fresh

EXAMPLES = Path(__file__).parents[2] / "examples" / "loops"


def run_here(folder: str, script: str, kill_at: int) -> None:
    """Run a script in a folder as its user would; be killed at the n-th forward pass of a module.

    Each layer has one: they come within steps, between them, in an evaluation and after it.
    """
    multiprocessing.set_start_method("fork", force=True)  # of the workers of a DataLoader
    os.chdir(folder)
    torch.set_num_threads(1)
    random.seed(0)  # fresh processes begin with other numbers, and some scripts never draw
    np.random.seed(0)
    with open(Path(folder) / "output.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    if kill_at:
        left = [kill_at]

        def count(*_: object) -> None:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        torch.nn.modules.module.register_module_forward_pre_hook(count)
    sys.argv = [script]
    sys.path.insert(0, folder)
    runpy.run_path(script, run_name="__main__")


def ended(text: str, folder: Path, kills: tuple[int, ...] = ()) -> Path:
    """Run a script with this text, killed so often and started again; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / "train.py"
    script.write_text(text)
    for kill_at in kills:
        assert run_fresh(run_here, str(folder), str(script), kill_at) == -signal.SIGKILL
    assert run_fresh(run_here, str(folder), str(script), 0) == 0, output_of(folder)
    return folder


def output_of(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def last_checkpoint(folder: Path) -> Path:
    found = folder.rglob("checkpoint-*/manifest.json")
    return max((path.parent for path in found), key=lambda path: int(path.name.split("-")[1]))


def bits_of(folder: Path) -> dict[str, bytes]:
    """Return all that the last checkpoint of a run holds, and its statistics."""
    last = last_checkpoint(folder)
    run = last.parent
    names = ["state.json", *sorted(path.name for path in last.glob("*.safetensors"))]
    found = {f"{last.name}/{name}": (last / name).read_bytes() for name in names}
    metrics = run / "metrics.jsonl"
    return found | ({"metrics": metrics.read_bytes()} if metrics.exists() else {})


def data_of_nanogpt(folder: Path) -> None:
    """Write the files that its prepare.py makes."""
    data = folder / "data"
    data.mkdir(parents=True)
    drawn = np.random.default_rng(0).integers(32, size=512).astype(np.uint16)
    drawn.tofile(data / "train.bin")
    drawn[::-1].tofile(data / "val.bin")
