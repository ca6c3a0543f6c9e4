"""Runs of the host's Trainer and of ours, in fresh processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fork_server import ForkServer


@dataclass(frozen=True)
class Outcome:
    """How a process ended, and what it wrote."""

    status: int
    values: dict[str, Any]
    text: str

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    @property
    def bits(self) -> tuple:
        """All that must be the same in two runs that are the same."""
        names = ("step", "digest", "log", "train_loss", "counters", "flos", "best")
        return tuple(json.dumps(self.values[name], sort_keys=True) for name in names)


class Runs:
    """Trains in a folder, each time in a fresh process."""

    def __init__(self, server: ForkServer, folder: Path, cache: Path) -> None:
        self.server, self.folder, self.cache = server, folder, cache
        self.count = 0

    def __call__(self, out: str = "run", **order: Any) -> Outcome:
        self.count += 1
        result, log = self.folder / f"{self.count}.json", self.folder / f"{self.count}.txt"
        paths = {"out": str(self.folder / out), "folder": str(self.folder)}
        files = {"cache": str(self.cache), "result": str(result), "log": str(log)}
        what = {"module": "adapters.runs", "action": "train", "trainer": "ours"}
        status = self.server.run({**what, **paths, **files, **order})
        values = json.loads(result.read_text()) if result.exists() else {}
        return Outcome(status, values, log.read_text())


@pytest.fixture(scope="session")
def server():
    server = ForkServer(
        "unbroken.adapters.transformers", "adapters.runs", "adapters.seeds", "quiet.running"
    )
    yield server
    server.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(server, cache, tmp_path):
    return Runs(server, tmp_path, cache)


@pytest.fixture(scope="session")
def uninterrupted(server, cache, tmp_path_factory):
    """Runs that nobody interrupts, each once in a session."""
    known: dict[str, Outcome] = {}

    def outcome(**order: Any) -> Outcome:
        key = json.dumps(order, sort_keys=True)
        if key not in known:
            known[key] = Runs(server, tmp_path_factory.mktemp("whole"), cache)(**order)
        return known[key]

    return outcome
