"""The table of the host's rows in docs/design/0016 names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "docs/design/0016-hugging-face-trainer.md"
ROWS = [line.split("|")[1:4] for line in TABLE.read_text().splitlines() if "`test_" in line]
SOURCES = "\n".join(path.read_text() for path in HERE.glob("test_*.py"))
MARKED = re.findall(r"@pytest.mark.stock\n(?:@.*\n)*def (\w+)", SOURCES)
FOUND = re.findall(r"^def (test_\w+)", SOURCES, re.MULTILINE)


@pytest.mark.parametrize(("row", "stock", "ours"), ROWS)
def test_a_row_names_tests_that_are_there(row, stock, ours):
    names = re.findall(r"`(test_\w+)`", f"{stock} {ours}")
    assert len(names) >= 2, row
    assert set(names) <= set(FOUND)


def test_what_shows_the_hosts_own_stands_in_the_table():
    told = {name for _, stock, _ in ROWS for name in re.findall(r"`(test_\w+)`", stock)}
    assert len(told) > 30
    assert set(MARKED) <= told
