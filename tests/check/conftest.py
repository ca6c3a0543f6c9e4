"""Servers that fork scripts, for all tests of the check."""

from __future__ import annotations

import pytest

from check.recorded_scripts import ScriptServer

collect_ignore_glob = ["scripts/*"]  # they are run, not imported


@pytest.fixture(scope="session")
def server_with():
    """Return the server that has loaded these modules."""
    servers: dict[tuple[str, ...], ScriptServer] = {}

    def server(*modules: str) -> ScriptServer:
        if modules not in servers:
            servers[modules] = ScriptServer(*modules)
        return servers[modules]

    yield server
    for one in servers.values():
        one.close()


@pytest.fixture(scope="session")
def server(server_with):
    return server_with()
