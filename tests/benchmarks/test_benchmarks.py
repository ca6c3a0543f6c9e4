"""The benchmarks run, as `--quick`; the pictures are those of the results that stand there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = sorted((BENCHMARKS / "results").glob("*.json"))
QUICK = ("device", "save", "load", "resume", "size", "goodput")


@pytest.fixture
def draw(monkeypatch):
    pytest.importorskip("matplotlib", reason="a part of the dev extra")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import draw

    return draw


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_committed_picture_is_that_of_its_result(path, draw):
    assert path.with_suffix(".svg").read_text() == draw.drawn(path)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_picture_keeps_its_bars_and_words_inside_its_frame_and_words_apart(path, draw):
    from matplotlib.text import Text

    figure = draw.figure(path)
    figure.canvas.draw()  # what a legend needs is known only then
    bars = [bar.get_window_extent() for axes in figure.axes for bar in axes.patches]
    words = [
        text.get_window_extent()
        for text in figure.findobj(Text)
        if text.get_text() and text.get_visible()
    ]
    assert bars
    assert all(
        figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 + 0.5 and box.y0 >= figure.bbox.y0
        for box in [*bars, *words]
    )
    assert not [(a, b) for a, b in combinations(words, 2) if a.overlaps(b)]


def test_no_picture_is_left_of_a_result_that_is_gone():
    pictures = {path.stem for path in (BENCHMARKS / "results").glob("*.svg")}
    assert pictures == {path.stem for path in RESULTS}


def test_a_committed_result_is_a_measurement():
    assert not [path for path in RESULTS if json.loads(path.read_text()).get("quick")]


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_benchmark_measures_every_method_and_is_drawn(name, tmp_path, draw):
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--results", tmp_path]
    environment = {**os.environ, "BENCHMARK_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert set(result["medians"]) == set(result["all"])
    assert result["conclusions"]
    picture = draw.draw_all(tmp_path)[0].read_text()
    assert all(f">{method.rpartition(', ')[0]}" in picture for method in result["medians"])
