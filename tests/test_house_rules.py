"""Rules that hold for the whole source: sizes, circles, names, words, no pickle, named errors.

Each list of exceptions may only shrink.
"""

from __future__ import annotations

import ast
import builtins
import re

import pytest

from house_graph import (
    SOURCE,
    circles,
    identifiers,
    imports,
    module_of,
    only_importers,
    public_classes,
    read_source,
)
from unbroken import errors

FILES = sorted(SOURCE.rglob("*.py"))
IDS = [str(path.relative_to(SOURCE)) for path in FILES]


TREES = read_source()


@pytest.fixture(params=FILES, ids=IDS)
def tree(request):
    return ast.parse(request.param.read_text())


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_a_file_has_at_most_700_lines(path):
    assert len(path.read_text().splitlines()) <= 700


def test_a_function_has_at_most_60_lines_with_its_signature_and_docstring():
    long = {
        f"{module_of(path)}.{node.name}"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > 60
    }
    assert long == set()


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


# The map of the source: who imports whom


def test_no_modules_import_each_other_in_a_circle():
    """An import for an annotation alone counts: who reads the one has to read the other."""
    assert circles(imports(TREES)) == []


TWICE = {"Trainer"}  # ours, and the drop-in for that of transformers


def test_no_public_class_name_stands_twice():
    twice = {name: where for name, where in public_classes(TREES).items() if len(where) > 1}
    assert set(twice) == TWICE, twice


PARTS = {  # modules that serve one other module, each an idea of its own
    "unbroken.capture.tensor_distance": "how far apart two tensors are",
    "unbroken.check.diagnose": "why a step differs",
    "unbroken.check.judge": "from recordings to a verdict",
    "unbroken.recorder.live_objects": "what takes part in a training, found without asking",
    "unbroken.cli.check": "a command",
    "unbroken.cli.demo": "a command",
    "unbroken.cli.diff": "a command",
    "unbroken.cli.doctor": "a command",
    "unbroken.cli.export": "a command",
    "unbroken.cli.main": "the command line",
    "unbroken.cli.plan": "a command",
    "unbroken.cli.show": "a command",
    "unbroken.cli.trials": "what is tried out on a machine",
    "unbroken.cli.verify": "a command",
    "unbroken.data.sources.order_state": "what gives an epoch its order keeps, and gets back",
    "unbroken.language_model.corpus": "text as a data set",
    "unbroken.language_model.tokenizer": "tokens of a text, and back",
    "unbroken.language_model.train": "a command and its settings",
    "unbroken.adapters.transformers.dataloader": "the host's loader, rebuilt",
    "unbroken.adapters.transformers.keyed_iterable": "the batches of an iterable",
    "unbroken.adapters.transformers.hf_checkpoint": "a checkpoint of the host's own, read",
    "unbroken.adapters.transformers.verified_steps": "between the host's loop and its step",
    "unbroken.verification.pass_record": "what a pass computed",
    "unbroken.verification.pass_state": "what a pass changes, put back",
    "unbroken.checkpoint.coverage.around": "what objects hold in the frames of a loop",
    "unbroken.checkpoint.coverage.replays": "how a script's text brings back its objects by itself",
    "unbroken.checkpoint.loop.training_loop": "the loop of a script: what counts, when it saves",
    "unbroken.checkpoint.resume.resume": "checks, then the load",
    "unbroken.checkpoint.run_access": "one rank owns the run directory, the others look",
    "unbroken.checkpoint.save.staging": "a copy of the state, and whether it changed meanwhile",
    "unbroken.step_records.compare": "what a resume must repeat, and what differed first",
    "unbroken.step_records.observer": "what a step is made of, seen while training goes on",
    "unbroken.training.checkpoints": "what a Trainer saves and resumes",
    "unbroken.training.evaluation": "when, over which data, and what follows",
    "unbroken.training.trainer": "the loop",
    "unbroken.testing.assertions": "what users assert in their own tests",
}


def test_a_module_that_serves_one_other_is_an_idea_of_its_own():
    """If it is not, it belongs into the file of the one that uses it."""
    assert set(only_importers(TREES)) == PARTS.keys()


# Words


RETIRED = {  # in the place of words that the field has
    "afresh",
    "ambient",
    "anew",
    "appointment",
    "as_built",
    "beside",
    "blind",
    "consoles",
    "desk",
    "edited",
    "elsewhere",
    "given_up",
    "going_on",
    "gone",
    "gravest",
    "homeless",
    "news",
    "own_state",
    "passes",
    "reaching",
    "restless",
    "speaks_for",
    "told",
    "wanted",
}


def test_no_identifier_is_a_retired_word():
    found = {
        f"{module_of(path)}: {name}"
        for path, tree in TREES.items()
        for name in identifiers(tree)
        if name in RETIRED
    }
    assert found == set()


EXIT_CODES = {
    name: value.exit_code for name, value in vars(errors).items() if hasattr(value, "exit_code")
}


def test_every_error_has_an_exit_code_of_its_own():
    assert len(set(EXIT_CODES.values())) == len(EXIT_CODES)
