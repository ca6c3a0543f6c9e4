"""A pytest fixture; enabled by `pytest_plugins = ["unbroken.testing.pytest_plugin"]`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from unbroken.check import CheckResult
from unbroken.testing.assertions import assert_resumes_exactly


@pytest.fixture
def resumes_exactly(request: pytest.FixtureRequest) -> Callable[..., CheckResult]:
    """Return `assert_resumes_exactly`, for which paths are relative to the test's own file."""
    return partial(assert_resumes_exactly, folder=request.path.parent)
