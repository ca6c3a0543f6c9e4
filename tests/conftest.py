"""Settings shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory

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

GIB = 1 << 30
IN_MEMORY, FREE = Path("/dev/shm"), 8 * GIB


def has_room_in_memory() -> bool:
    """Return whether the folders of the tests may lie in memory: half of the time is syncs, else.

    A kill is no power cut, and what a killed process had written is there with or without a disk.
    """
    try:
        found = os.statvfs(IN_MEMORY)
        told = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return False
    available = int(told["MemAvailable"].split()[0]) * 1024
    return min(found.f_bavail * found.f_frsize, available) > FREE


if has_room_in_memory():
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))

# What is about disks is tested on one, and what measures memory does not fill it.
ON_DISK = {"benchmarks", "cli", "contracts", "crash", "store"}


@pytest.fixture
def tmp_path(request, tmp_path):
    """An empty folder, in memory where that is ample; on the disk for the marker `disk`."""
    folder = request.path.parent.name
    if folder not in ON_DISK and request.node.get_closest_marker("disk") is None:
        yield tmp_path
        return
    with TemporaryDirectory(prefix="unbroken-", ignore_cleanup_errors=True) as place:
        yield Path(place)


# Scripts of users that tests edit and start; they are no modules of tests.
collect_ignore_glob = ["*/scripts/*"]
collect_ignore = ["fresh_modules.py"]  # of the process alone that fresh ones are forked from


def pytest_collection_finish():
    """Let the garbage collector pass by what stays: a million objects, 0.6 s whenever it looks."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Let no test stand still: past its limit it fails by its name, and what it started ends.

    Where not even that is possible (the interpreter is held), `faulthandler_timeout` ends all.
    """
    sweep = item.get_closest_marker("sweep")
    with limited(SECONDS_OF_A_SWEEP if sweep else SECONDS, item.nodeid):
        return (yield)
