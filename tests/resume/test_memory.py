"""Saving and resuming need no second copy of the state in memory."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from torch import nn

from unbroken.checkpoint import Checkpointer

MIB = 1 << 20
TENSOR = 64 * MIB


class Large(nn.Module):
    """Eight tensors of 64 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(TENSOR // 4) for _ in range(8))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def extra_memory(folder: str, action: str) -> int:
    """Return the bytes by which the peak of this process grew in one save or resume."""
    checkpointer = Checkpointer(folder, model=Large())
    before = peak()
    if action == "save":
        checkpointer.save(1)
    else:
        assert checkpointer.resume("must").step == 1
    return peak() - before


def measured(folder, action: str) -> int:
    command = [sys.executable, __file__, str(folder), action]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_saving_and_resuming_half_a_gigabyte_takes_at_most_64_mib_and_one_tensor(tmp_path):
    assert measured(tmp_path, "save") < 64 * MIB + TENSOR
    assert measured(tmp_path, "resume") < 64 * MIB + TENSOR


if __name__ == "__main__":
    print(extra_memory(*sys.argv[1:]))
