"""The errors by which PyTorch says that there is no memory left."""

from __future__ import annotations

import torch

from unbroken.errors import UnbrokenError

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUDA out of memory",
    "HIP out of memory",
    "MPS backend out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUSPARSE_STATUS_INSUFFICIENT_RESOURCES",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be had.

    CUDA's own allocator has a class for it; the CPU's, and libraries that ask the driver for
    memory themselves, say it in the text of a RuntimeError.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError()), is_out_of_memory(RuntimeError("shape"))
        (True, False)
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, UnbrokenError):
        return False
    text = str(error)
    return any(sign in text for sign in _SIGNS)
