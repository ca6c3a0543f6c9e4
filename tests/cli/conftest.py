"""Fixtures of the command line's tests."""

from __future__ import annotations

import pytest

from cli.sample_run import make_run
from unbroken.cli.main import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, called "/here" in golden files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here):
    """The run directory "gpt2" in the current directory; its checkpoint-0 is pinned."""
    folder = make_run(here / "gpt2")
    (folder / "checkpoint-0" / "pinned").touch()
    return folder


@pytest.fixture
def unbroken(capsys):
    """Call the command in this process; return its status, output and errors."""

    def call(*arguments):
        try:
            status = main([str(one) for one in arguments])
        except SystemExit as end:
            status = end.code
        output, errors = capsys.readouterr()
        return status, output, errors

    return call


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The user's cache folder; the tokens of all tests stand in one."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder
