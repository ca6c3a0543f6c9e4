"""Settings shared by all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from time_limits import limited

SECONDS = 300  # of one test; the slowest takes 60 on a quiet machine
SECONDS_OF_A_SWEEP = 1800

# The machine that runs the tests is small and shared: no deadlines; the same examples each time.
settings.register_profile(
    "unbroken", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unbroken")

# A shell's background job ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Where these are set, pytest explains a failed comparison whole: of large tensors' bytes that takes
# minutes, also where a negative control fails as it should.
for variable in ("CI", "BUILD_NUMBER"):
    os.environ.pop(variable, None)

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Scripts of users that tests edit and start; they are no modules of tests.
collect_ignore_glob = ["*/scripts/*"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let no test stand still: past its limit it fails by its name, and what it started ends.

    Where not even that is possible (the interpreter is held), `faulthandler_timeout` ends all.
    """
    sweep = item.get_closest_marker("sweep")
    with limited(SECONDS_OF_A_SWEEP if sweep else SECONDS, item.nodeid):
        return (yield)
