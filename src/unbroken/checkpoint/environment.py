"""The facts about the machine and the software that a run's bits depend on."""

from __future__ import annotations

import platform

import numpy as np
import torch


def environment_facts() -> dict[str, object]:
    """Return what this process runs on, as plain JSON values; draws no random number.

    Example:
        >>> environment_facts()["torch"] == torch.__version__
        True
    """
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cuda": torch.version.cuda if cuda else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
