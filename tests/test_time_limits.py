"""A test that stands still fails by its name, and leaves no process."""

from __future__ import annotations

import subprocess
from subprocess import PIPE

import pytest

from time_limits import limited


def test_what_stands_still_is_ended_and_named():
    within = pytest.raises(pytest.fail.Exception, match=r"this one took more than 0\.2 s")
    with within as raised, limited(0.2, "this one"), subprocess.Popen(["cat"], stdin=PIPE) as child:
        child.wait()
    assert child.returncode == -9
    assert not raised.value.pytrace  # a signal's traceback may be one that pytest can't show
