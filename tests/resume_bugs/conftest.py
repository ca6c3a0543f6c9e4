"""A server that forks the scripts, for all tests of the corpus."""

from __future__ import annotations

import pytest

from check.recorded_scripts import ScriptServer


@pytest.fixture(scope="session")
def server():
    """The server that runs the scripts."""
    one = ScriptServer()
    yield one
    one.close()
