"""Saving and resuming need no second copy of the state in memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from unbroken.checkpoint import Checkpointer, SavePolicy

pytestmark = pytest.mark.disk  # of memory, the files would be a part
MIB = 1 << 20
TENSOR = 64 * MIB


class Large(nn.Module):
    """Eight tensors of 64 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.ones(TENSOR // 4) for _ in range(8))


def peak() -> int:
    """Return the most memory that this process itself ever had.

    `ru_maxrss` is at least what the process had that started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def extra_memory(folder: str, action: str) -> int:
    """Return the bytes by which the peak of this process grew in one save or resume."""
    checkpointer = Checkpointer(folder, tell=None, model=Large())
    before = peak()
    if action == "save":
        checkpointer.save(1)
    else:
        assert checkpointer.resume("must").step == 1
    return peak() - before


def extra_memory_beside(folder: str, mode: str) -> int:
    """Return the bytes by which the peak grew in saves beside the training, the first is small."""
    model = nn.Linear(4096, 4096)  # 64 MiB, and 128 MiB of moments from the first step on
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpointer = Checkpointer(
        folder, save=SavePolicy(mode=mode), model=model, optimizer=optimizer
    )
    checkpointer.save(0)
    model.weight.grad = torch.zeros(4096, 4096)
    optimizer.step()
    checkpointer.wait()
    before = resident() - 64 * MIB  # without the first copy
    for step in (1, 2):
        checkpointer.save(step)
        optimizer.step()
    checkpointer.wait()
    return peak() - before


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measured(folder, action: str) -> int:
    command = [sys.executable, __file__, str(folder), action]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_saving_and_resuming_half_a_gigabyte_takes_at_most_64_mib_and_one_tensor(tmp_path):
    assert measured(tmp_path, "save") < 64 * MIB + TENSOR
    assert measured(tmp_path, "resume") < 64 * MIB + TENSOR


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="nobody tells how much is resident")
@pytest.mark.parametrize("mode", ["async", "overlap"])
def test_saving_beside_the_training_takes_one_copy_of_what_is_saved(mode, tmp_path):
    found, state = measured(tmp_path, mode), 3 * 64 * MIB
    assert found < state + 32 * MIB
    assert found > 0.9 * state  # it is a copy, and is seen


if __name__ == "__main__":
    is_beside = sys.argv[2] in ("async", "overlap")
    print((extra_memory_beside if is_beside else extra_memory)(*sys.argv[1:]))
