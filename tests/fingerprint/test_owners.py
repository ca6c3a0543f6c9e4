"""A host of training and what it needs are never the user's own code, wherever they lie."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest
from torch import nn

from unbroken import Checkpointer
from unbroken.fingerprint import (
    cut_off,
    environment,
    is_user_code,
    model_facts,
    source_code,
    source_digest,
)
from unbroken.fingerprint.source_code import _installation, _is_library

MODULE = """
from torch import nn

class Block(nn.Module):
    def forward(self, x):
        return x
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return what makes a package in a folder on the path, and imports a class of it."""
    names = []

    def make(name: str, folder: str = "here", version: str | None = "1.0") -> type:
        home = tmp_path / folder / name
        home.mkdir(parents=True)
        (home / "__init__.py").write_text("" if version is None else f"__version__ = {version!r}")
        (home / "layers.py").write_text(MODULE)
        monkeypatch.syspath_prepend(str(home.parent))
        names.append(name)
        return importlib.import_module(f"{name}.layers").Block

    _is_library.cache_clear()
    yield make
    for name in names:
        sys.modules.pop(f"{name}.layers"), sys.modules.pop(name)
    _is_library.cache_clear()


def installed(folder, name: str, **more) -> None:
    """Leave what an installer leaves of a package."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text("")
    if more:
        (info / "direct_url.json").write_text(json.dumps({"url": "file:///", "dir_info": more}))


def test_a_host_on_the_path_is_not_walked(made):
    block = made("timm")
    assert not is_user_code(block)
    assert source_digest(block) is None
    assert "Block" not in model_facts(nn.Sequential(block()))["source"]


def test_a_host_that_loads_its_parts_when_asked_is_not_either(made, tmp_path):
    lazy = "def __getattr__(name):\n    return {'__version__': '1.0'}[name]\n"
    block = made("trl", version=None)
    (tmp_path / "here/trl/__init__.py").write_text(lazy)
    importlib.reload(sys.modules["trl"])
    assert not is_user_code(block)


def test_a_folder_of_the_users_with_the_name_of_a_host_is_his_own(made):
    assert is_user_code(made("evaluate", version=None))


def test_a_package_of_the_users_own_is_walked_wherever_it_is_installed_from(made, tmp_path):
    assert is_user_code(made("of_mine"))
    installed(tmp_path / "site", "of-mine-too", editable=True)
    assert is_user_code(made("of_mine_too", "checkout"))
    assert _installation("of-mine") is None


def test_packages_in_a_folder_with_their_records_are_not(made, tmp_path):
    installed(tmp_path / "target", "somebodys")
    assert not is_user_code(made("somebodys", "target"))


def test_what_a_host_needs_is_none_either_where_it_is_editable(made, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    installed(tmp_path / "site", "regex", editable=True)
    monkeypatch.delitem(sys.modules, "regex", raising=False)
    assert not is_user_code(made("regex", "checkout"))


def test_a_host_in_a_checkout_counts_by_its_commit_and_its_changes(made, tmp_path):
    made("timm", "checkout")
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    environment._version.cache_clear()
    first = environment._version("timm", "timm")
    assert first.startswith("1.0 at commit ")
    (tmp_path / "checkout/timm/layers.py").write_text(f"{MODULE}\n# changed\n")
    environment._version.cache_clear()
    assert environment._version("timm", "timm").startswith(f"{first} with changes ")
    environment._version.cache_clear()


def outer(x):
    return inner(x)


def inner(x):
    return innermost(x)


def innermost(x):
    return x


class Calls(nn.Module):
    def forward(self, x):
        return outer(x)


def test_a_walk_that_reaches_its_bound_is_not_called_exact(monkeypatch, tmp_path):
    monkeypatch.setattr(source_code, "MAX_REACHED", 2)
    try:
        for _ in range(2):
            with Checkpointer(tmp_path, model=Calls()) as checkpointer:
                report = checkpointer.resume()
                checkpointer.save(1)
    finally:
        cut_off.clear()
    assert report.verdict == "not covered"
    assert any(line.startswith("code.Calls: not covered: it runs more") for line in report.lines())
