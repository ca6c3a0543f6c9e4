"""Helpers for tests, of unbroken and of what is built on it. Names are loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unbroken.testing.assertions import (
        assert_loader_resumes_at_every_step as assert_loader_resumes_at_every_step,
    )
    from unbroken.testing.assertions import assert_resumes_exactly as assert_resumes_exactly
    from unbroken.testing.failing_storage import POWER_CUT_MODES as POWER_CUT_MODES
    from unbroken.testing.failing_storage import FaultyStorage as FaultyStorage
    from unbroken.testing.failing_storage import KillingStorage as KillingStorage
    from unbroken.testing.failing_storage import PowerCut as PowerCut
    from unbroken.testing.failing_storage import PowerCutMode as PowerCutMode
    from unbroken.testing.storage_contract import SharedStorageContract as SharedStorageContract
    from unbroken.testing.storage_contract import StorageContract as StorageContract

_HOME = {
    "POWER_CUT_MODES": "failing_storage",
    "FaultyStorage": "failing_storage",
    "KillingStorage": "failing_storage",
    "PowerCut": "failing_storage",
    "PowerCutMode": "failing_storage",
    "SharedStorageContract": "storage_contract",
    "StorageContract": "storage_contract",
    "assert_loader_resumes_at_every_step": "assertions",
    "assert_resumes_exactly": "assertions",
}

__all__ = [
    "POWER_CUT_MODES",
    "FaultyStorage",
    "KillingStorage",
    "PowerCut",
    "PowerCutMode",
    "SharedStorageContract",
    "StorageContract",
    "assert_loader_resumes_at_every_step",
    "assert_resumes_exactly",
]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: pytest, say, only for the contract suites."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
