"""Which code a run was started from; the repositories here are made by hand, without git."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import ModuleType

import pytest

from unbroken.changes.rules import CODE_RULES
from unbroken.checkpoint import code_differences, code_facts
from unbroken.fingerprint.environment import code_facts_of, is_dirty, read_commit
from unbroken.store.format.canonical_json import digest_of

ONE, TWO = "1" * 40, "2" * 40
SCRIPT = "import json; from unbroken.checkpoint import code_facts; print(json.dumps(code_facts()))"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def repository(folder, head="ref: refs/heads/main\n", **references):
    write(folder / ".git" / "HEAD", head)
    for name, commit in references.items():
        write(folder / ".git" / "refs" / "heads" / name, f"{commit}\n")
    return folder


def run(*command, cwd):
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_script_is_known_by_its_name_its_bytes_and_its_commit(tmp_path):
    repository(tmp_path, main=ONE)
    write(tmp_path / "src" / "train.py", SCRIPT)
    facts = run("src/train.py", cwd=tmp_path)
    assert (facts["script"], facts["git_commit"]) == ("train.py", ONE)
    assert facts["script_digest"] == digest_of(SCRIPT.encode())
    assert str(tmp_path) not in json.dumps(facts)


def test_a_module_is_a_script_too(tmp_path):
    write(tmp_path / "jobs" / "train.py", SCRIPT)
    facts = run("-m", "jobs.train", cwd=tmp_path)
    assert (facts["script"], facts["git_commit"]) == ("jobs.train", None)
    assert facts["script_digest"] == digest_of(SCRIPT.encode())


def test_modules_beside_a_script_are_known_by_their_bytes_and_the_script_only_once(tmp_path):
    text = f"import train, helpers, torch\nif __name__ == '__main__': {SCRIPT}"
    write(tmp_path / "train.py", text)
    write(tmp_path / "helpers.py", "ONE = 1\n")
    for command in (["train.py"], ["-m", "train"]):
        facts = run(*command, cwd=tmp_path)
        assert facts["modules"] == {"helpers": digest_of(b"ONE = 1\n")}
        assert facts["script_digest"] == digest_of(text.encode())


def test_modules_that_nobody_can_read_or_that_wait_for_their_first_use_are_left_alone(tmp_path):
    text = """import importlib.util, sys, types, unbroken.checkpoint
found = importlib.util.find_spec("late")
found.loader = importlib.util.LazyLoader(found.loader)
sys.modules["late"] = importlib.util.module_from_spec(found)
found.loader.exec_module(sys.modules["late"])
sys.modules["odd"], sys.modules["gone"] = None, types.ModuleType("gone")
sys.modules["gone"].__file__ = "/nowhere/gone.py"
"""
    write(tmp_path / "train.py", text + SCRIPT)
    write(tmp_path / "late.py", "raise RuntimeError\n")
    assert {*run("train.py", cwd=tmp_path)["modules"]} <= {"late"}


def test_of_an_interpreter_nothing_is_known(tmp_path):
    facts = run("-c", SCRIPT, cwd=repository(tmp_path, main=ONE))
    assert facts.pop("modules") == {}
    assert {value for name, value in facts.items() if name != "unbroken"} == {None}


def test_of_an_installed_command_only_the_name_is_known(tmp_path):
    pytest_facts = code_facts()  # of this very process
    assert (pytest_facts["script_digest"], pytest_facts["git_commit"]) == (None, None)
    own = ModuleType("__main__")
    own.__file__ = str(write(repository(tmp_path, main=ONE) / "unbroken" / "__main__.py", ""))
    own.__spec__ = type("Spec", (), {"name": "unbroken.__main__"})()
    facts = code_facts_of(own)
    assert facts.pop("unbroken")
    assert isinstance(facts.pop("modules"), dict)
    assert facts == {**dict.fromkeys(facts), "script": "unbroken"}


def test_a_script_that_is_gone_has_no_digest(tmp_path):
    main = ModuleType("__main__")
    main.__file__, main.__spec__ = str(tmp_path / "gone.py"), None
    assert code_facts_of(main)["script_digest"] is None


def test_a_commit_is_read_from_a_loose_reference(tmp_path):
    assert read_commit(repository(tmp_path, main=ONE, other=TWO)) == ONE
    assert read_commit(repository(tmp_path, "ref: refs/heads/other\n")) == TWO


def test_a_commit_is_read_from_a_detached_head_and_from_a_folder_below(tmp_path):
    below = repository(tmp_path, f"{TWO}\n") / "a" / "b"
    below.mkdir(parents=True)
    assert read_commit(below) == TWO


def test_a_commit_is_read_from_packed_references(tmp_path):
    packed = f"# pack-refs with: peeled\n{TWO} refs/heads/domain\n{ONE} refs/heads/main\n^{TWO}\n"
    write(repository(tmp_path) / ".git" / "packed-refs", packed)
    assert read_commit(tmp_path) == ONE


def test_a_loose_reference_is_newer_than_a_packed_one(tmp_path):
    write(repository(tmp_path, main=ONE) / ".git" / "packed-refs", f"{TWO} refs/heads/main\n")
    assert read_commit(tmp_path) == ONE


def test_a_commit_is_read_in_a_worktree(tmp_path):
    own = repository(tmp_path / "main", main=ONE, side=TWO) / ".git" / "worktrees" / "side"
    write(own / "HEAD", "ref: refs/heads/side\n")
    write(own / "commondir", "../..\n")
    write(tmp_path / "side" / ".git", f"gitdir: {own}\n")
    assert read_commit(tmp_path / "side") == TWO


def test_a_repository_without_a_commit_and_a_folder_without_a_repository_have_none(tmp_path):
    assert read_commit(repository(tmp_path / "new")) is None
    assert read_commit(repository(tmp_path / "odd", "ref: refs/heads/main\n", main="no")) is None
    assert read_commit(tmp_path) is None
    assert is_dirty(tmp_path) is None


def test_references_in_a_circle_lead_nowhere(tmp_path):
    repository(tmp_path, main="ref: refs/heads/main")
    assert read_commit(tmp_path) is None


def test_without_git_nothing_is_known_of_changed_files(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert is_dirty(repository(tmp_path, main=ONE)) is None
    assert read_commit(tmp_path) == ONE


STUB = "#!/bin/sh\n{} \n"


def git_stub(folder, monkeypatch, body):
    stub = write(folder / "bin" / "git", STUB.format(body))
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("body", "expected"), [("true", False), ("echo ' M train.py'", True), ("exit 128", None)]
)
def test_what_git_lists_decides_whether_files_have_changed(tmp_path, monkeypatch, body, expected):
    git_stub(tmp_path, monkeypatch, body)
    assert is_dirty(repository(tmp_path, main=ONE)) is expected


def test_a_slow_git_is_not_waited_for(tmp_path, monkeypatch):
    git_stub(tmp_path, monkeypatch, "exec sleep 60")
    assert is_dirty(repository(tmp_path, main=ONE), seconds=0.05) is None


def test_git_is_asked_without_locks_and_only_for_tracked_files(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/elsewhere")
    git_stub(tmp_path, monkeypatch, f'echo "$@ $GIT_OPTIONAL_LOCKS $GIT_DIR" > {tmp_path}/asked')
    is_dirty(repository(tmp_path, main=ONE))
    asked = (tmp_path / "asked").read_text().split()
    assert asked[-3:] == ["--porcelain", "--untracked-files=no", "0"]


def test_a_real_repository_tells_a_changed_tracked_file_from_an_untracked_one(tmp_path):
    if shutil.which("git") is None:  # then there is nothing to be told
        assert is_dirty(repository(tmp_path, main=ONE)) is None
        return
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    write(tmp_path / "train.py", "1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "one"]):
        subprocess.run(["git", *identity, *command], cwd=tmp_path, check=True)
    write(tmp_path / "notes.txt", "2")
    assert is_dirty(tmp_path) is False
    write(tmp_path / "train.py", "3")
    assert is_dirty(tmp_path) is True
    assert len(read_commit(tmp_path)) == 40


BASE = {"script": "a.py", "script_digest": "5a", "git_commit": ONE, "git_dirty": False}
BASE |= {"modules": {"a": "1", "b": "1"}}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, {}),
        ({"script_digest": "c3"}, {"code.script_digest": "equivalent"}),
        ({"git_commit": TWO}, {"code.git_commit": "equivalent"}),
        ({"git_dirty": True}, {"code.git_dirty": "equivalent"}),
        ({"script": "b.py"}, {"code.script": "harmless"}),
        ({"modules": {"a": "1", "new": "2"}}, {}),
        ({"modules": {"a": "2"}}, {"code.modules.a": "equivalent"}),
        ({"modules": {"a": "2", "b": "2"}}, {"code.modules": "equivalent"}),
        ({"modules": ["a"]}, {}),
        ({"script": "unbroken", "script_digest": None}, {"code.script": "equivalent"}),
        (dict.fromkeys(BASE), {}),
    ],
)
def test_a_change_of_the_code_is_told_as_what_is_known_of_it(change, found):
    differences = code_differences({**BASE, "unbroken": "1"}, {**BASE, **change, "unbroken": "1"})
    assert {difference.path: difference.verdict for difference in differences} == found


def test_every_fact_about_the_code_has_a_rule():
    assert {f"code.{name}" for name in code_facts()} == set(CODE_RULES)
