"""A server that forks scripts, for all tests of the check."""

from __future__ import annotations

import pytest

from check.fork_server import ForkServer

collect_ignore_glob = ["scripts/*"]  # they are run, not imported


@pytest.fixture(scope="session")
def server():
    server = ForkServer()
    yield server
    server.close()
