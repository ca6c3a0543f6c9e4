"""Rules that hold for the whole source: sizes, forbidden words, no pickle, named errors."""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

from unbroken import errors

SOURCE = Path(__file__).parent.parent / "src" / "unbroken"
FILES = sorted(SOURCE.rglob("*.py"))
IDS = [str(path.relative_to(SOURCE)) for path in FILES]


@pytest.fixture(params=FILES, ids=IDS)
def tree(request):
    return ast.parse(request.param.read_text())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_has_at_most_700_lines(path):
    assert len(path.read_text().splitlines()) <= 700


def test_a_function_has_at_most_60_lines_besides_its_docstring(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < 60, node.name


def test_nothing_imports_pickle_or_reads_it(tree):
    nodes = list(ast.walk(tree))
    names = {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    called = {ast.unparse(node.func) for node in calls if not is_for_a_peer(node)}
    assert not called & {"torch.load", "torch.save", "eval", "exec", "__import__"}


def is_for_a_peer(call):
    """Files of other trainers are archives of torch.save: read as weights alone, written so too."""
    function, keywords = ast.unparse(call.func), [ast.unparse(word) for word in call.keywords]
    if function == "torch.load":
        return "weights_only=True" in keywords
    return function == "torch.save" and ast.unparse(call.args[0]).startswith("plain_")


def test_every_error_that_a_docstring_names_exists():
    classes = re.compile(r"^class (\w+)", re.MULTILINE)
    known = {name for path in FILES for name in classes.findall(path.read_text())}
    known |= set(dir(builtins))
    for path in FILES:
        for name in re.findall(r"^\s+(\w+(?:Error|Stopped)):", path.read_text(), re.MULTILINE):
            assert name in known, f"{path.name}: {name}"


def test_no_folder_or_file_has_a_name_that_says_nothing():
    words = {"utils", "util", "helpers", "common", "core", "managers", "misc"}
    assert not words & {part.removesuffix(".py") for path in FILES for part in path.parts}


EXIT_CODES = {
    name: value.exit_code for name, value in vars(errors).items() if hasattr(value, "exit_code")
}


def test_every_error_has_an_exit_code_of_its_own():
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
