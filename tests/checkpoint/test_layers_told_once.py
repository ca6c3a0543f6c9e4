"""A layer that changed as the configuration says is told once; any other by its own name."""

from __future__ import annotations

import pytest

from unbroken.changes.rules import fingerprint_differences

WITH = {
    "model": {"pdrop": 0.1, "act": "gelu", "layer": {"a": "Dropout(p=0.1)", "b": "Linear(8, 4)"}}
}


def paths_of(**changes):
    now = {"model": {**WITH["model"], **changes}}
    return [difference.path for difference in fingerprint_differences(WITH, now)]


CASES = {
    "as the configuration says": (
        {"pdrop": 0.2, "layer": {"a": "Dropout(p=0.2)", "b": "Linear(8, 4)"}},
        ["model.pdrop"],
    ),
    "another number than the configuration's": (
        {"pdrop": 0.2, "layer": {"a": "Dropout(p=0.5)", "b": "Linear(8, 4)"}},
        ["model.pdrop", "model.layer.a"],
    ),
    "a second layer beside the configuration": (
        {"pdrop": 0.2, "layer": {"a": "Dropout(p=0.2)", "b": "Linear(8, 5)"}},
        ["model.pdrop", "model.layer.b"],
    ),
    "another kind, as the configuration says": (
        {"act": "relu", "layer": {"a": "Dropout(p=0.1)", "b": "Conv1D(8, 4)"}},
        ["model.act"],
    ),
    "another kind, while only a number is told": (
        {"pdrop": 0.2, "layer": {"a": "AlphaDropout(p=0.2)", "b": "Linear(8, 4)"}},
        ["model.pdrop", "model.layer.a"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_told_where_the_configuration_does_not_tell_it(case):
    changes, paths = CASES[case]
    assert paths_of(**changes) == paths
