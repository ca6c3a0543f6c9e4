"""Ordinary scripts with a few lines changed end with the same bits, however often killed."""

from __future__ import annotations

import difflib
import random

import pytest

from fresh import run_fresh
from loops.killed_scripts import (
    EXAMPLES,
    bits_of,
    data_of_nanogpt,
    ended,
    output_of,
    run_here,
)

LINES = {"nanogpt": 8, "mnist": 8, "gan": 10}
PASSES = {"nanogpt": 600, "mnist": 100, "gan": 340}  # of a whole run: a kill comes within a third
LOST = {  # what a script has without one of the lines
    "nanogpt": ('X, Y = run.state.batch = get_batch("train")', 'X, Y = get_batch("train")'),
    "gan": (', "optimizerG": optimizerG}', "}"),
}


def text_of(name: str) -> str:
    return (EXAMPLES / f"{name}.py").read_text()


def changed_lines(name: str) -> int:
    """Return how many lines were added, or replaced, or taken out."""
    sides = ((EXAMPLES / "plain" / f"{name}.py"), (EXAMPLES / f"{name}.py"))
    old, new = ([x for x in path.read_text().splitlines() if x.strip()] for path in sides)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    return sum(
        max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in matcher.get_opcodes() if tag != "equal"
    )


@pytest.mark.parametrize("name", LINES)
def test_a_plain_script_becomes_exact_by_a_few_lines(name):
    assert 0 < changed_lines(name) <= LINES[name]


def shown(name: str) -> str:
    """Return the difference as the document shows it."""
    sides = ((EXAMPLES / "plain" / f"{name}.py"), (EXAMPLES / f"{name}.py"))
    old, new = (path.read_text().splitlines() for path in sides)
    return "\n".join([*difflib.unified_diff(old, new, lineterm="", n=1)][2:])


@pytest.mark.parametrize("name", LINES)
def test_the_document_shows_the_lines_that_make_a_script_exact(name):
    page = (EXAMPLES.parent.parent / "docs" / "loops.md").read_text()
    assert f"```diff\n{shown(name)}\n```" in page


def in_folder(name, folder, kills=(), text=None):
    if name == "nanogpt":
        data_of_nanogpt(folder)
    return bits_of(ended(text or text_of(name), folder, kills))


def kills_of(name: str, seed: int) -> tuple[int, ...]:
    drawn = random.Random(f"{name} {seed}")
    return tuple(drawn.randrange(PASSES[name] // 6, PASSES[name] // 3) for _ in range(3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    known = {}

    def run(name):
        if name not in known:
            known[name] = in_folder(name, tmp_path_factory.mktemp(name) / "run")
        return known[name]

    return run


@pytest.mark.parametrize("name", LINES)
def test_killed_at_random_and_started_again_it_ends_with_the_same_bits(name, whole, tmp_path):
    assert in_folder(name, tmp_path / "run", kills_of(name, 0)) == whole(name)


@pytest.mark.parametrize("name", ["nanogpt", "gan"])
def test_without_one_of_the_lines_it_does_not(name, whole, tmp_path):
    old, new = LOST[name]
    text = text_of(name)
    assert text.count(old) == 1
    assert in_folder(name, tmp_path / "run", kills_of(name, 0), text.replace(old, new)) != whole(
        name
    )


def test_a_script_in_epochs_that_reads_its_own_loader_is_told_before_anything_is_saved(tmp_path):
    text = text_of("mnist")
    own = "enumerate(torch.utils.data.DataLoader(Digits(44, is_train=True), BATCH_SIZE))"
    assert text.count("enumerate(run.batches())") == 1
    script = tmp_path / "train.py"
    script.write_text(text.replace("enumerate(run.batches())", own))
    assert run_fresh(run_here, str(tmp_path), str(script), 0) == 1
    assert "in an epoch whose batches were not asked for" in output_of(tmp_path)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.sweep
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize("name", LINES)
def test_wherever_it_is_killed_it_ends_with_the_same_bits(name, seed, whole, tmp_path):
    assert in_folder(name, tmp_path / "run", kills_of(name, seed)) == whole(name)
