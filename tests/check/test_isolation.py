"""Each run of a script works in a place of its own."""

from __future__ import annotations

import pytest

from unbroken.check.isolation import Separation, Workspaces, choose_separation
from unbroken.errors import ConfigError


@pytest.fixture
def current(tmp_path):
    folder = tmp_path / "current"
    for name in (".git/objects", ".mypy_cache", "data", "kept"):
        (folder / name).mkdir(parents=True)
    (folder / "train.py").write_text("print()")
    (folder / "data/x").write_bytes(bytes(100))
    return folder


def test_a_copy_has_the_user_s_files_and_no_others(current):
    place = Workspaces(current / "kept", current, Separation.COPY).make("first")
    found = sorted(str(path.relative_to(place.folder)) for path in place.folder.rglob("*"))
    assert found == ["data", "data/x", "train.py"]


def test_two_runs_share_nothing(current, tmp_path):
    places = Workspaces(tmp_path, current, Separation.COPY)
    first, second = places.make("first"), places.make("second")
    (first.folder / "data/x").write_text("changed")
    assert (second.folder / "data/x").read_bytes() == bytes(100)
    assert first.out != second.out


def test_the_placeholder_is_filled_in_everywhere(current, tmp_path):
    place = Workspaces(tmp_path, current, Separation.PLACEHOLDER).make("run")
    assert place.command(["a", "--x={out}/y"]) == ["a", f"--x={tmp_path}/run/out/y"]
    assert place.folder == current


def test_logs_are_no_checkpoints(current, tmp_path):
    place = Workspaces(tmp_path, current, Separation.PLACEHOLDER).make("run")
    for name in ("log.txt", "metrics.jsonl", "events.out.tfevents.1"):
        (place.out / name).write_bytes(bytes(1000))
    assert place.bytes_written_since(0) == 0
    (place.out / "model.bin").write_bytes(bytes(1000))
    assert place.bytes_written_since(0) == 1000


def test_what_is_named_for_removal_is_removed_before_each_run(current, tmp_path):
    places = Workspaces(tmp_path, current, Separation.CLEAN, (current / "run", current / "run.log"))
    places.make("first")
    (current / "run").mkdir()
    (current / "run.log").touch()
    places.make("second")
    assert not (current / "run").exists()
    assert not (current / "run.log").exists()


@pytest.mark.parametrize("name", ["data", "..", "../elsewhere", "/etc", "."])
def test_what_the_user_has_is_never_removed(current, name):
    with pytest.raises(ConfigError, match="--clean"):
        choose_separation([["python", "train.py"]], current, (name,))
    assert (current / "data/x").exists()


def test_a_folder_that_is_too_large_is_not_copied(current, monkeypatch):
    monkeypatch.setattr("unbroken.check.isolation.MAX_COPY_BYTES", 50)
    with pytest.raises(ConfigError, match="too large to be copied"):
        choose_separation([["python", "train.py"]], current, ())


def test_a_script_that_knows_the_variable_needs_no_copy(current):
    (current / "train.py").write_text("os.environ['UNBROKEN_CHECK_OUT']")
    assert choose_separation([["python", "train.py"]], current, ())[0] is Separation.VARIABLE
