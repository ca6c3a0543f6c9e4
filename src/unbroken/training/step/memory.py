"""Memory that a step frees stays with the process, for the next step to use."""

from __future__ import annotations

import ctypes
import gc
import platform

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_ARENA_BLOCK = 32 << 20
_NEVER = 2**31 - 1


def keep_freed_memory(device: torch.device) -> bool:
    """Ask the C library not to give memory back to the system after each step.

    A step frees its activations and gradients, and the next one needs as much again. Whether
    glibc gives it back in between depends on what happens to lie at the end of the heap; where it
    does, the system must clear and map thousands of pages in every step (see mallopt(3)). GPU
    memory has PyTorch's caching allocator for the same reason.

    Args:
        device: Where the model is; only on "cpu" something is done.

    Returns:
        Whether the C library has been told: it is glibc, and the model is on the CPU.

    Example:
        >>> keep_freed_memory(torch.device("meta"))
        False
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    kept = libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    return bool(kept and libc.mallopt(_MMAP_THRESHOLD, _LARGEST_ARENA_BLOCK))


def give_back_freed_memory(device: torch.device) -> None:
    """Give memory back that is free but kept, so that pieces of other sizes may take its place.

    Example:
        >>> give_back_freed_memory(torch.device("cpu"))
    """
    gc.collect()  # graphs that stand in circles
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    elif device.type == "cuda":
        torch.cuda.empty_cache()
