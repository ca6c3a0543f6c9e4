"""What differs between two checkpoints is found, is told once, and is told by its path."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from store.small_runs import PlainLeaf
from unbroken.errors import CorruptCheckpointError
from unbroken.storage import MemoryStorage
from unbroken.store import CheckpointReader, CheckpointWriter, diff_checkpoints, diff_facts
from unbroken.store.diff import diff_trees, plain_tree, state_tree
from unbroken.store.format.canonical_json import MalformedError

CLOCK = itertools.count(1e9, 60.0)  # no two checkpoints are made at the same time


def checkpoint(tensors=(), *, state=None, facts=None, files=(), run_id="a" * 32):
    """Return the reader of a checkpoint; a tensor is (path, dtype, shape, bytes)."""
    storage = MemoryStorage()
    with CheckpointWriter(storage, step=5, run_id=run_id, clock=lambda: next(CLOCK)) as writer:
        leaves = [PlainLeaf(p, "t.safetensors", p, d, s, b) for p, d, s, b in tensors]
        if leaves:
            writer.write_leaves(leaves)
        for name, data in dict(files).items():
            writer.write_file(name, data)
        if state is not None:
            writer.write_file("state.json", json.dumps(state).encode())
        writer.commit(facts or {})
    return CheckpointReader(storage, "checkpoint-5")


def told(a, b):
    """Return what is told of two checkpoints: kinds and paths."""
    diff = diff_checkpoints(a, b)
    values = [(one.kind, one.path) for group in diff.groups for one in group.differences]
    return values + [(one.kind, one.path) for one in diff.tensors]


def told_of_facts(a, b):
    return told(checkpoint(facts=a), checkpoint(facts=b))


def told_of_state(a, b):
    return told(checkpoint(state=a), checkpoint(state=b))


W = ("model.w", "F32", (2,), b"12345678")
WHOLE = {
    "tensors": [W],
    "state": {"step": 5, "model": {"w": {"$": "tensor", "leaf": "model.w"}}},
    "facts": {"config": {"learning_rate": 1e-3}, "best_step": None},
    "files": {"config.json": b'{"n_layer":2}'},
}


def test_the_same_content_is_the_same_whoever_wrote_it_whenever():
    a, b = checkpoint(**WHOLE), checkpoint(**WHOLE, run_id="b" * 32)
    assert a.manifest.created != b.manifest.created
    assert diff_checkpoints(a, b).is_same


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tensors": [("model.w", "F32", (2,), b"12345679")]}, ("bytes", "model.w")),
        ({"tensors": [("model.w", "F32", (2, 1), b"12345678")]}, ("type", "model.w")),
        ({"tensors": [("model.w", "I32", (2,), b"12345678")]}, ("type", "model.w")),
        ({"tensors": [W, ("model.b", "U8", (1,), b"1")]}, ("only in b", "model.b")),
        ({"state": {**WHOLE["state"], "step": 6}}, ("changed", "step")),
        ({"facts": {**WHOLE["facts"], "best_step": 5}}, ("changed", "best_step")),
        ({"facts": {**WHOLE["facts"], "loss": {"a": 1}}}, ("only in b", "loss")),
        ({"files": {"config.json": b'{"n_layer":3}'}}, ("changed", "n_layer")),
        ({"files": {"config.json": b'{"n_layer": 2}'}}, ("changed", "config.json")),
        ({"files": {**WHOLE["files"], "more.txt": b"more"}}, ("only in b", "more.txt")),
        ({"files": {}}, ("only in a", "config.json")),
    ],
)
def test_each_part_of_a_checkpoint_is_compared(changes, expected):
    found = told(checkpoint(**WHOLE), checkpoint(**{**WHOLE, **changes}))
    assert found == [expected]


def test_each_file_that_is_no_json_is_compared_by_its_bytes():
    a, b = (checkpoint(files={"notes.json": data}) for data in (b"no json", b"none"))
    assert told(a, b) == [("changed", "notes.json")]


class TestFacts:
    """Every group is compared without being known."""

    def test_a_value_is_told_by_its_path(self):
        a = {"fingerprint": {"optimizer": {"groups": [{"lr": 0.1}, {"lr": 0.2}]}}}
        b = {"fingerprint": {"optimizer": {"groups": [{"lr": 0.1}, {"lr": 0.3}]}}}
        assert told_of_facts(a, b) == [("changed", "fingerprint.optimizer.groups.1.lr")]

    def test_a_list_of_another_length_is_another_value(self):
        found = diff_facts({"config": {"allow": ["seed"]}}, {"config": {"allow": []}})
        (one,) = found.groups[0].differences
        assert (one.path, one.a, one.b) == ("config.allow", ["seed"], [])

    def test_a_value_that_one_side_lacks_is_not_null(self):
        found = told_of_facts({"config": {"bf16": None}}, {"config": {}})
        assert found == [("only in a", "config.bf16")]

    def test_an_empty_group_is_not_none(self):
        assert told_of_facts({"settings": {}}, {}) == [("only in a", "settings")]

    @pytest.mark.parametrize(("one", "other"), [(1, 1.0), (0.0, -0.0), (1e3, 1000)])
    def test_a_number_is_compared_as_a_number(self, one, other):
        assert told_of_facts({"config": {"x": one}}, {"config": {"x": other}}) == []

    @pytest.mark.parametrize(("one", "other"), [(1, True), (0, None), ("1", 1), (1, [1])])
    def test_other_types_are_other_values(self, one, other):
        assert len(told_of_facts({"config": {"x": one}}, {"config": {"x": other}})) == 1

    def test_the_count_is_of_the_values_of_the_larger_side(self):
        diff = diff_facts({"config": {"a": 1, "b": [2, 3]}}, {"config": {"a": 1}})
        assert [(group.name, group.count) for group in diff.groups] == [("config", 3)]

    def test_where_a_run_is_and_how_long_it_took_is_told_but_not_counted(self):
        a, b = (
            checkpoint(
                facts={"config": {"output_dir": run}, "metrics_bytes": len(run)},
                state={"statistics": {"seconds": len(run), "logged_seconds": 0.5 * len(run)}},
            )
            for run in ("a", "bb")
        )
        diff = diff_checkpoints(a, b)
        assert diff.is_same
        assert {one.path for one in diff.not_counted} == {
            "config.output_dir",
            "metrics_bytes",
            "statistics.seconds",
            "statistics.logged_seconds",
        }

    def test_other_measured_values_are_counted(self):
        a, b = ({"statistics": {"seconds": 1, "loss_sum": loss}} for loss in (0.5, 0.6))
        assert told_of_state(a, b) == [("changed", "statistics.loss_sum")]


def typed(tag, *items, **more):
    return {"$": tag, **more, "items": [*items]}


def captured(state, **facts):
    return {"$": "object", "kind": "module", "class": "M", "facts": facts, "state": state}


def tensor(leaf, **more):
    return {"$": "tensor", "leaf": leaf, "dtype": "float32", "shape": [2], **more}


class TestState:
    """The state is compared exactly, with the types that only Python has."""

    @pytest.mark.parametrize(
        ("a", "b", "expected"),
        [
            ({"n": 1}, {"n": 1.0}, ("changed", "n")),
            ({"x": 0.0}, {"x": -0.0}, ("changed", "x")),
            ({"p": [1, 2]}, {"p": typed("tuple", 1, 2)}, ("changed", "p")),
            ({"p": typed("tuple", 1, 2)}, {"p": typed("tuple", 1, 3)}, ("changed", "p.1")),
            ({"p": [1, 2]}, {"p": [1, 2, 3]}, ("changed", "p")),
            ({"a": 1, "b": 2}, {"b": 2, "a": 1}, ("order", "")),
            ({"d": {"a": 1, "b": 2}}, {"d": {"b": 2, "a": 1}}, ("order", "d")),
            ({"d": typed("dict", [1, 5])}, {"d": typed("dict", ["1", 5])}, ("only in a", "d.1")),
            ({"q": typed("deque", 1, maxlen=3)}, {"q": typed("deque", 1, maxlen=4)}, None),
            ({"o": captured({}, eval=[1])}, {"o": captured({}, eval=[2])}, ("changed", "o:eval.0")),
            ({"o": captured({"a": 1})}, {"o": captured({"a": 2})}, ("changed", "o.a")),
            ({"o": captured({})}, {"o": {**captured({}), "class": "N"}}, ("changed", "o:class")),
            ({"s": typed("set", 1, 2)}, {"s": typed("set", 1, 3)}, ("changed", "s")),
            ({"t": tensor("t")}, {"t": tensor("t", requires_grad=True)}, None),
            ({"t": tensor("t")}, {"t": tensor("t~2")}, ("changed", "t:leaf")),
        ],
    )
    def test_a_value_is_told_by_the_path_that_its_leaf_would_have(self, a, b, expected):
        found = told_of_state(a, b)
        assert len([one for one in found if one[0] != "only in b"]) <= 1
        assert found
        assert expected is None or expected in found

    def test_a_nan_with_another_payload_is_another_value(self):
        nans = ({"$": "float", "bits": bits} for bits in ("7ff8000000000000", "7ff8000000000001"))
        assert told_of_state(*({"x": nan} for nan in nans)) == [("changed", "x")]

    def test_a_reference_is_told_by_what_it_refers_to_not_by_its_number(self):
        a = {"x": [1], "y": {"$": "same", "as": 1}}
        b = {"new": [], "x": [1], "y": {"$": "same", "as": 2}}
        assert told_of_state(a, b) == [("only in b", "new")]

    def test_a_reference_to_another_object_is_another_value(self):
        a = {"x": [1], "y": [1], "z": {"$": "same", "as": 1}}
        b = {"x": [1], "y": [1], "z": {"$": "same", "as": 2}}
        assert told_of_state(a, b) == [("changed", "z")]

    def test_two_objects_at_one_path_are_two(self):
        lists = typed("dict", [1, []], ["1", []])
        a, b = ({"d": lists, "z": {"$": "same", "as": number}} for number in (2, 3))
        assert told_of_state(a, b) == [("changed", "z")]

    def test_what_the_manifests_tell_of_tensors_is_not_told_again(self):
        a = {"model": {"w": tensor("model.w"), "v": tensor("model.v")}}
        b = {"model": {"w": {**tensor("model.w"), "shape": [4]}}}
        one = checkpoint([W, ("model.v", "U8", (1,), b"v")], state=a)
        other = checkpoint([("model.w", "F32", (4,), 4 * b"1234")], state=b)
        assert sorted(told(one, other)) == [("only in a", "model.v"), ("type", "model.w")]

    def test_a_value_beside_a_tensor_that_is_gone_is_told(self):
        a, b = {"o": {"w": tensor("model.w"), "name": "w"}}, {}
        found = told(checkpoint([W], state=a), checkpoint(state=b))
        assert found == [("only in a", "o"), ("only in a", "model.w")]

    def test_the_progress_that_stands_in_the_facts_too_is_told_once(self):
        a, b = (
            checkpoint(facts={"progress": {"step": n}}, state={"values": {"progress": {"step": n}}})
            for n in (1, 2)
        )
        assert told(a, b) == [("changed", "progress.step")]

    def test_a_checkpoint_without_a_state_has_no_values(self):
        assert told(checkpoint(), checkpoint(state={"a": 1})) == [("only in b", "a")]

    @pytest.mark.parametrize("raw", [b"no json", b'{"a":1,"a":1}', b"[" * 90 + b"]" * 90])
    def test_a_state_that_is_none_is_an_error_with_its_place(self, raw):
        good, bad = checkpoint(state={}), checkpoint(files={"state.json": raw})
        with pytest.raises(CorruptCheckpointError, match=r"^checkpoint-5: state.json: "):
            diff_checkpoints(good, bad)

    def test_facts_that_are_nested_absurdly_deep_are_refused(self):
        deep = []
        for _ in range(500):
            deep = [deep]
        with pytest.raises(MalformedError, match="nested deeper"):
            plain_tree(deep)


TAGS = "tuple deque set dict OrderedDict object tensor quantized numpy.ndarray bytes same enum"
SCALARS = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text()
NAMES = st.sampled_from(["a", "b", "items", "leaf", "facts", "state", "as", "scale", "1"])


def nodes(children):
    pairs = st.lists(st.tuples(SCALARS, children).map(list), max_size=3)
    tagged = st.dictionaries(NAMES, children | pairs, max_size=4)
    tags = st.sampled_from(TAGS.split()) | SCALARS
    return (
        st.lists(children, max_size=3)
        | st.dictionaries(NAMES, children, max_size=3)
        | st.builds(lambda tag, fields: {"$": tag, **fields}, tags, tagged)
    )


STRUCTURES = st.recursive(SCALARS, nodes, max_leaves=12)


def places(value, path=()):
    """Yield the path of every value inside a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def put(value, path, new):
    """Return a copy of a JSON value with another value at a path."""
    if not path:
        return new
    changed = copy.deepcopy(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = new
    return changed


def differences(a, b):
    return diff_trees("state", state_tree(a), state_tree(b), exact=True).differences


@given(STRUCTURES)
def test_any_structure_is_the_same_as_itself(structure):
    assert differences(structure, copy.deepcopy(structure)) == ()


@given(STRUCTURES, SCALARS, st.data())
def test_no_change_to_any_value_of_any_structure_goes_unseen(structure, new, data):
    path = data.draw(st.sampled_from([*places(structure)]))
    changed = put(structure, path, new)
    assume(json.dumps(changed) != json.dumps(structure))
    assert differences(structure, changed) != ()
    assert differences(changed, structure) != ()
