"""Hints name only what exists where the user is: a Trainer, the drop-in, a loop, a command line.

All texts in the source that name a setting are collected. Each place in which one can be shown
takes all names in it, as it is spelled there.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import transformers

import unbroken
from unbroken import (
    Checkpointer,
    KeepPolicy,
    RankPolicy,
    ResumePolicy,
    RunFacts,
    SavePolicy,
    batch_source,
)
from unbroken.adapters.transformers import Trainer as DropIn
from unbroken.adapters.transformers.trainer import naming_what_exists_here
from unbroken.errors import StateMismatchError, spelled
from unbroken.training import Trainer, TrainerConfig

SOURCE = Path(unbroken.__file__).parent


def parameters(*things: object) -> set[str]:
    return {name for one in things for name in inspect.signature(one).parameters}


SETTINGS = {one.name for one in fields(TrainerConfig)}
OF_THE_HOST = {one.name for one in fields(transformers.TrainingArguments)}
TAKEN = {
    "loop": parameters(Checkpointer),
    "trainer": parameters(Trainer) | SETTINGS,
    "host": parameters(DropIn, transformers.Trainer) | OF_THE_HOST,
    "command": set[str](),
}
CALLED = {
    one.__name__: parameters(one)
    for one in (SavePolicy, ResumePolicy, RankPolicy, RunFacts, KeepPolicy, batch_source)
} | {"Checkpointer": parameters(Checkpointer)}
"""What a loop calls, and what each takes."""

FREE = {"model", "optimizer", "scheduler", "data", "steps", "settings"}
"""Names that the user may give to anything."""

NAMES = set.union(*TAKEN.values(), *CALLED.values()) - FREE
NAMED = re.compile(r"(?<![\w.-])([a-z_]+)=(?=[\w\"'\[(])")
CALL = re.compile(rf"\b({'|'.join(CALLED)})\(([^()]*(?:\(\))?)\)")
OPTION = re.compile(r"--([a-z][a-z-]+)")
SHOWN_IN = {
    "adapters/": ("host",),
    "training/": ("trainer", "command"),
    "language_model/": ("command",),
    "cli/doctor": (),  # speaks of any program
    "cli/trials": (),
    "cli/plan": (),
    "cli/": ("command",),
    "checkpoint/arguments.py": ("trainer or loop",),
    "/unregistered.py": ("loop",),
    "verification/": ("trainer", "host", "command"),
    "": ("loop", "trainer", "host", "command"),
}
"""Where the texts of a part of the source can be seen."""

ONLY_IN = {
    "if the ranks should not be alike: ": ("loop",),  # asks whether the caller can say it
    "; or take rank 0's for all: ": ("loop",),  # likewise
    "the Checkpointer does not know the ranks": ("loop",),
    "put the run directory where all ranks see it; read_from=": ("loop", "trainer", "command"),
    "give the module itself; TrainerConfig": ("trainer",),
}
"""Where some of them can be seen that stand beside others: by how they begin."""


def texts(path: Path) -> Iterator[str]:
    """Yield the texts in a file, without docstrings; what an f-string computes is "x"."""
    tree = ast.parse(path.read_text())
    parts = [node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)]
    left_out = {id(one) for part in parts for one in ast.walk(part) if one is not part}
    left_out |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in left_out:
            continue
        if isinstance(node, ast.JoinedStr):
            yield whole(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def whole(text: ast.JoinedStr) -> str:
    found = ""
    for part in text.values:
        is_list = found.endswith(("allow=", "skip="))
        found += part.value if isinstance(part, ast.Constant) else "['x']" if is_list else "'x'"
    return found


def shown_in(path: str, text: str) -> tuple[str, ...]:
    places = next(places for part, places in SHOWN_IN.items() if part in path)
    return next((some for start, some in ONLY_IN.items() if text.startswith(start)), places)


def hints() -> Iterator[tuple[str, str, str]]:
    """Yield each text that names a setting, its file, and a place where it may be shown."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        for text in texts(path) if name != "errors.py" else ():
            if NAMES & {*NAMED.findall(text)}:
                yield from ((name, place, text) for place in shown_in(name, text))


def is_wrong(text: str, place: str) -> bool:
    """Return whether a text names what does not exist in a place."""
    if " or " in place:
        return all(is_wrong(text, one) for one in place.split(" or "))
    found = text if place == "trainer" else spelled(text, place)
    while (call := CALL.search(found)) is not None:
        if place != "loop" or not NAMES & {*NAMED.findall(call[2])} <= CALLED[call[1]]:
            return True
        found = found.replace(call[0], "it")
    if place == "command" and not {*OPTION.findall(found)} <= OPTIONS:
        return True
    return not NAMES & {*NAMED.findall(found)} <= TAKEN[place]


OPTIONS = {name.replace("_", "-") for name in SETTINGS} | {"resume", "data", "model"}


def test_hints_name_only_what_exists_where_they_are_shown():
    found = [*hints()]
    wrong = [f"{path} in a {place}: {text}" for path, place, text in found if is_wrong(text, place)]
    assert not wrong, "\n".join(wrong)
    assert len(found) > 40


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("types=[Name]", "host"),
        ("a folder that only rank 0 sees, so read_from='rank0'", "host"),
        ("per_rank=()", "trainer"),
        ("save_total_limit=3", "loop"),
        ("loss_fn=...", "command"),
        ("resume=ResumePolicy(allow=['seed'])", "trainer"),
        ("group=join()", "loop"),
        ("per_rank=()", "loop"),
        ("save=SavePolicy(last=3)", "loop"),
        ("pass --of-nothing", "command"),
    ],
)
def test_a_name_that_a_place_does_not_take_is_found(text, place):
    assert is_wrong(text.replace("...", "f"), place)


def test_the_drop_in_and_a_command_offer_no_types():
    hint = "pass the class itself: types=[Level]"
    with pytest.raises(StateMismatchError) as caught, naming_what_exists_here():
        raise StateMismatchError("state.level", "is of a class that was not given", hint=hint)
    assert caught.value.hint == "let what is saved hold plain values in place of Level"
    assert caught.value.__notes__ == [caught.value.hint] == [spelled(hint, "command")]
