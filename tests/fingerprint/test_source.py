"""Digests of code: what runs counts, how it is written does not."""

from __future__ import annotations

import functools
import importlib.util
import itertools

import pytest
import torch
from torch import nn

from unbroken.fingerprint import callable_facts, is_user_code, qualified_name, source_digest

_NUMBERS = itertools.count()
BASE = '''
LIMIT = 3
def helper(x):
    return x + 1
def work(x, scale=2):
    """Works."""
    return helper(x) * scale + LIMIT
class Net:
    """A net."""
    def __init__(self):
        self.n = 1
    def forward(self, x):
        return helper(x)
'''


@pytest.fixture
def load(tmp_path):
    """Makes a module of a text, as an edited script would be loaded by a new process."""

    def make(text: str):
        path = tmp_path / f"script{next(_NUMBERS)}.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("script", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return make


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Works."""', '"""Works well."""'),
        ("    return helper(x) * scale", "    # a comment\n    return helper(x)*scale"),
        ("def work", "\n\n\ndef work"),
        ("LIMIT = 3", "OTHER = 4\nLIMIT = 3"),
        ("def work(x, scale=2):", "def work(x: float, scale: int = 2) -> float:"),
    ],
    ids=["docstring", "comment and spaces", "lines", "an unused global", "type hints"],
)
def test_how_code_is_written_does_not_count(old, new, load):
    before, after = load(BASE), load(BASE.replace(old, new, 1))
    assert callable_facts(before.work) == callable_facts(after.work)
    assert source_digest(before.Net) == source_digest(after.Net)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("* scale", "/ scale", "source"),
        ("x + 1", "x + 2", "source"),
        ("LIMIT = 3", "LIMIT = 4", "values"),
        ("scale=2", "scale=3", "values"),
    ],
    ids=["its own code", "a function that it calls", "a global", "a default"],
)
def test_what_runs_counts(old, new, key, load):
    before, after = load(BASE), load(BASE.replace(old, new, 1))
    assert callable_facts(before.work)[key] != callable_facts(after.work)[key]


def test_a_method_can_be_left_out(load):
    before, after = load(BASE), load(BASE.replace("self.n = 1", "self.n = 2"))
    assert source_digest(before.Net) != source_digest(after.Net)
    digests = [source_digest(m.Net, leave_out="__init__") for m in (before, after)]
    assert digests[0] == digests[1]


def test_lambdas_count_by_their_own_code_and_what_they_close_over(load):
    text = "def make(n):\n    return [lambda s: s / n,\n            lambda s: s * n]\n"
    first, second = (callable_facts(f) for f in load(text).make(4))
    assert first["source"] != second["source"]
    assert callable_facts(load(text).make(5)[0])["values"] == {"n": 5}
    assert callable_facts(load("\n" + text).make(4)[0]) == first


def test_code_without_a_source_counts_by_its_instructions():
    space, other = {"__name__": "prompt"}, {"__name__": "prompt"}
    exec("def f(x):\n    return x + 1", space)
    exec("def f(x):\n    return x + 2", other)
    assert source_digest(space["f"]) != source_digest(other["f"])
    assert source_digest(space["f"]) == source_digest(space["f"])


def test_partials_and_methods_count_by_what_they_call(load):
    module = load(BASE)
    partial = functools.partial(module.work, scale=5)
    assert callable_facts(partial)["values"]["scale"] == 5
    assert callable_facts(partial)["source"] == callable_facts(module.work)["source"]
    assert callable_facts(module.Net().forward)["source"] is not None


def test_installed_code_is_told_by_its_version_alone():
    assert not is_user_code(nn.Linear)
    assert callable_facts(torch.relu)["source"] is None
    loss = callable_facts(nn.CrossEntropyLoss(label_smoothing=0.1))
    assert loss["source"] is None
    assert loss["values"]["label_smoothing"] == 0.1


def test_a_hint_inside_a_function_does_not_count(load):
    texts = [f"def f(x):\n    y{hint} = x\n    return y\n" for hint in ("", ": int")]
    first, second = (source_digest(load(text).f) for text in texts)
    assert first == second


def test_a_class_that_moves_from_the_script_to_a_module_is_the_same(load):
    here, there = load(BASE), load(BASE)
    for thing in (here.Net, here.Net.forward, here.work, here.helper):
        thing.__module__ = "__main__"
    assert qualified_name(here.Net) == qualified_name(there.Net) == "Net"
    assert source_digest(here.Net) == source_digest(there.Net)
    assert callable_facts(here.work) == callable_facts(there.work)


def test_two_functions_of_one_name_do_not_hide_each_other(load):
    def using(one, two):
        module = load("import functools\ndef loss(x):\n    return first(x) + second(x)\n")
        module.first = load(f"def scale(x):\n    return {one}\n").scale
        module.second = load(f"def scale(x):\n    return {two}\n").scale
        return source_digest(module.loss)

    assert using("x", "x * 2") != using("x", "x * 3")
    assert using("x", "x * 2") != using("x + 1", "x * 2")


def test_a_decorator_of_an_installed_package_shows_what_it_decorates(load):
    text = "import torch\n@torch.no_grad()\ndef f(x):\n    return x * {}\n"
    digests = [source_digest(load(text.format(k)).f) for k in (2, 3)]
    assert None not in digests
    assert digests[0] != digests[1]
