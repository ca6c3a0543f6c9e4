"""diff: what differs, from two paths of any kind to the words, the JSON and the exit status."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import struct

import pytest
import yaml
from rich.console import Console

from cli.sample_run import BEGUN, in_a_process, make_run
from cli.test_file_commands import check_golden, damage, sealed
from store.small_runs import PlainLeaf
from unbroken.cli.diff import compare, distances_of, open_side, print_page
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointWriter

CONFIG = {"learning_rate": 0.001, "batch_size": 8, "weight_decay": 0}
SETTINGS = {"model": {"dropout": 0.1, "n_layer": 2}, "data": {"train": ["a.txt"]}}
FACTS = {"config": CONFIG, "settings": SETTINGS, "environment": {"torch": "2.13.0"}}
STATE = {"scheduler": {"last_epoch": 5}, "betas": {"$": "tuple", "items": [0.9, 0.999]}}


def floats(*values):
    return struct.pack(f"<{len(values)}f", *values)


TENSORS = {
    "model.a": ("F32", (2, 2), floats(1.0, 2.0, 3.0, 4.0)),
    "model.b": ("F32", (1,), floats(0.0)),
    "optimizer.state.a.exp_avg": ("F32", (2, 2), floats(0.1, 0.2, 0.3, 0.4)),
    "rng.torch": ("U8", (4,), b"abcd"),
}


@pytest.fixture
def save(here):
    """Save a checkpoint of step 5 as a folder, with other facts, state or tensors if given."""
    now = itertools.count(BEGUN, 60.0)

    def save(name, *, facts=FACTS, state=STATE, tensors=TENSORS, shards=()):
        storage = LocalStorage(here / f"made-{name}")
        with CheckpointWriter(storage, step=5, run_id="ab" * 16, clock=lambda: next(now)) as writer:
            writer.write_leaves(
                [
                    PlainLeaf(p, f"{p.partition('.')[0]}.safetensors", p, *t)
                    for p, t in tensors.items()
                ]
            )
            writer.write_leaves(shards)
            writer.write_file("state.json", json.dumps(state).encode())
            writer.commit(facts)
        shutil.move(here / f"made-{name}" / "checkpoint-5", here / name)

    return save


@pytest.fixture
def diff(unbroken):
    """Compare two paths; return the status, and the differences as told in JSON."""

    def diff(a, b, *options):
        status, output, errors = unbroken("diff", a, b, "--json", *options)
        assert errors == ""
        found = json.loads(output)
        assert found["same"] == (status == 0)
        values = [one for group in found["groups"] for one in group["differences"]]
        return status, [*values, *found["tensors"]["differences"]]

    return diff


def paths(differences):
    return [(one["kind"], one["path"]) for one in differences]


def changed(part, **values):
    return {**FACTS, part: {**FACTS[part], **values}}


def test_the_same_content_is_the_same(save, diff, unbroken):
    save("a")
    save("b")
    assert diff("a", "b") == (0, [])
    assert (
        "the same: 4 tensors, 3 values, config, environment, settings"
        in unbroken("diff", "a", "b")[1]
    )


def in_rows(*rows):
    """Return model.a as two ranks hold it, a row each."""
    return [
        PlainLeaf(
            "model.a", f"model.rank{rank}.safetensors", "a", "F32", (1, 2), floats(*row), 64,
            (rank, 0), (2, 2),
        )
        for rank, row in enumerate(rows)
    ]  # fmt: skip


class TestShards:
    """What two ranks hold of a tensor, beside the whole one."""

    @pytest.fixture(autouse=True)
    def sides(self, save):
        rest = {path: tensor for path, tensor in TENSORS.items() if path != "model.a"}
        save("whole")
        save("same", tensors=rest, shards=in_rows((1.0, 2.0), (3.0, 4.0)))
        save("other", tensors=rest, shards=in_rows((1.0, 2.0), (3.5, 4.0)))

    def test_whether_they_differ_is_told_by_their_values_alone(self, unbroken):
        status, output, _ = unbroken("diff", "whole", "same")
        assert status == 1
        assert "0 of 4 differ, 1 may: model 1 of 2" in output
        assert "F32[2, 2]: whole in A, 2 shards in B" in output
        assert "whether those that are cut in another way differ: --values" in output

    def test_with_values_the_same_is_the_same(self, unbroken):
        status, output, _ = unbroken("diff", "whole", "same", "--values")
        assert status == 0
        assert "the same: 4 tensors" in output

    def test_with_values_the_difference_is_measured(self, unbroken):
        status, output, _ = unbroken("diff", "whole", "other", "--values")
        assert status == 1
        assert "tensors: 1 of 4 differs: model 1 of 2" in output
        assert "0.5" in output

    def test_shards_of_which_one_differs_are_other_bytes(self, unbroken):
        assert "F32[2, 2]: other bytes" in unbroken("diff", "same", "other")[1]
        output = unbroken("diff", "same", "other", "--values")[1]
        assert "0.5" in output


def test_a_run_is_the_same_as_itself(unbroken, run):
    status, output, _ = unbroken("diff", "gpt2", "gpt2")
    assert status == 0
    assert output.count("gpt2: checkpoint-20, the newest") == 2


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"facts": changed("config", learning_rate=3e-4)}, ("changed", "config.learning_rate")),
        (
            {"facts": changed("settings", model={"dropout": 0.2, "n_layer": 2})},
            ("changed", "settings.model.dropout"),
        ),
        (
            {"facts": {**FACTS, "fingerprint": {"code": {"digest": "3f"}}}},
            ("only in b", "fingerprint"),
        ),
        ({"state": {**STATE, "scheduler": {"last_epoch": 6}}}, ("changed", "scheduler.last_epoch")),
        (
            {"tensors": {**TENSORS, "model.b": ("F32", (1, 1), floats(0.0))}},
            ("type", "model.b"),
        ),
        ({"tensors": {**TENSORS, "model.b": ("F32", (1,), floats(-0.0))}}, ("bytes", "model.b")),
        ({"tensors": {**TENSORS, "model.c": ("U8", (1,), b"c")}}, ("only in b", "model.c")),
        (
            {"tensors": {path: TENSORS[path] for path in TENSORS if path != "model.b"}},
            ("only in a", "model.b"),
        ),
    ],
)
def test_a_difference_is_told_by_its_path_with_status_1(save, diff, other, expected):
    save("a")
    save("b", **other)
    status, differences = diff("a", "b")
    assert (status, paths(differences)) == (1, [expected])


class TestValues:
    """--values reads the tensors that differ, and no other."""

    def values_of(self, save, diff, path, *numbers):
        save("a")
        dtype, shape, _ = TENSORS[path]
        save("b", tensors={**TENSORS, path: (dtype, shape, floats(*numbers))})
        status, (difference,) = diff("a", "b", "--values")
        assert status == 1
        return difference["values"]

    def test_a_neighbour_is_one_ulp_away(self, save, diff):
        above = struct.unpack("<f", struct.pack("<I", 0x40400001))[0]
        values = self.values_of(save, diff, "model.a", 1.0, 2.0, above, 4.0)
        assert (values["max_ulp"], values["first"]) == (1, [1, 0])
        assert (values["differing"], values["count"]) == (1, 4)
        assert values["max_abs"] == 2.0**-22

    def test_zeros_of_other_signs_differ_by_no_step(self, save, diff):
        values = self.values_of(save, diff, "model.b", -0.0)
        assert (values["differing"], values["max_abs"], values["max_ulp"]) == (1, 0.0, 0)

    def test_a_nan_is_counted_on_its_side(self, save, diff):
        values = self.values_of(save, diff, "model.b", float("nan"))
        assert (values["nan_a"], values["nan_b"], values["max_abs"]) == (0, 1, None)

    def test_infinity_is_spelled_as_in_the_journals(self, save, diff):
        values = self.values_of(save, diff, "model.b", float("inf"))
        assert (values["max_abs"], values["max_rel"]) == ("Infinity", "Infinity")

    def test_a_tensor_that_differs_is_verified_when_it_is_read(self, save, unbroken, here):
        save("a")
        save("b", tensors={**TENSORS, "rng.torch": ("U8", (4,), b"abce")})
        with (here / "b" / "rng.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"f")
        assert unbroken("diff", "a", "b")[0] == 1  # the digests differ, whatever the bytes are
        status, output, errors = unbroken("diff", "a", "b", "--values")
        assert (status, output) == (2, "")
        assert "CorruptCheckpointError: b: rng.torch: is damaged" in errors

    def test_a_configuration_has_no_tensors_to_read(self, save, unbroken, here):
        save("a")
        (here / "config.yaml").write_text("batch_size: 8\n")
        status, _, errors = unbroken("diff", "a", "config.yaml", "--values")
        assert (status, "--values: expected two checkpoints" in errors) == (2, True)


class TestConfig:
    """Of a configuration file, what it names is compared."""

    def compare(self, save, diff, here, name="config.yaml", **config):
        save("a")
        write = json.dumps if name.endswith(".json") else yaml.safe_dump
        (here / name).write_text(write(config))
        return diff("a", name)

    def test_what_the_file_does_not_name_is_not_compared(self, save, diff, here):
        assert self.compare(save, diff, here, learning_rate=0.001) == (0, [])

    def test_numbers_and_lone_texts_are_compared_as_the_trainer_reads_them(self, save, diff, here):
        config = {"batch_size": 8.0, "weight_decay": 0.0, "data": {"train": "a.txt"}}
        assert self.compare(save, diff, here, **config) == (0, [])

    def test_a_changed_setting_is_told_from_either_side(self, save, diff, here):
        status, (there,) = self.compare(save, diff, here, model={"dropout": 0.2})
        assert (status, there["path"], there["a"], there["b"]) == (
            1,
            "settings.model.dropout",
            0.1,
            0.2,
        )
        status, (back,) = diff("config.yaml", "a")
        assert (status, back["a"], back["b"]) == (1, 0.2, 0.1)

    def test_a_setting_that_the_checkpoint_does_not_know_is_told(self, save, diff, here):
        _, differences = self.compare(save, diff, here, learning_rte=0.001)
        assert paths(differences) == [("only in b", "config.learning_rte")]

    def test_the_place_of_the_run_is_told_but_not_counted(self, save, unbroken, here):
        save("b", facts=changed("config", output_dir="runs/b"))
        (here / "config.yaml").write_text("output_dir: runs/a\nbatch_size: 8\n")
        status, output, _ = unbroken("diff", "b", "config.yaml")
        assert (status, "not counted: config.output_dir" in output) == (0, True)

    def test_json_is_a_configuration_too(self, save, diff, here):
        assert self.compare(save, diff, here, "config.json", batch_size=8) == (0, [])

    def test_two_files_are_compared_whole(self, diff, here):
        (here / "one.yaml").write_text("seed: 1\nbf16: true\n")
        (here / "two.yml").write_text("bf16: true\nlearning_rate: 3e-4\n")
        status, differences = diff("one.yaml", "two.yml")
        assert status == 1
        assert paths(differences) == [
            ("only in a", "config.seed"),
            ("only in b", "config.learning_rate"),
        ]


class TestRuns:
    """Of a run, the newest checkpoint that can be opened is taken, and named."""

    def test_a_run_is_compared_with_a_checkpoint(self, unbroken, run):
        status, output, _ = unbroken("diff", "gpt2", "gpt2/checkpoint-10")
        assert status == 1
        assert "A  gpt2: checkpoint-20, the newest" in output
        assert "B  gpt2/checkpoint-10" in output

    def test_a_checkpoint_that_cannot_be_opened_is_skipped_and_told(self, unbroken, run):
        damage(run / "checkpoint-20")
        output = unbroken("diff", "gpt2", "gpt2/checkpoint-10")[1]
        assert "A  gpt2: checkpoint-10, the newest" in output
        assert "not used: checkpoint-20: state.json: is missing" in output

    def test_a_copied_checkpoint_is_compared_outside_of_its_run(self, unbroken, run, here):
        shutil.copytree(run / "checkpoint-20", here / "elsewhere")
        assert unbroken("diff", "gpt2", "elsewhere")[0] == 0


TROUBLE = [
    ("gpt2 nothing", "RunDirectoryError: nothing: no such directory"),
    ("nothing gpt2", "RunDirectoryError: nothing: no such directory"),
    ("gpt2 gpt2/checkpoint-30", "CheckpointNotFoundError"),
    ("gpt2 nothing.yaml", "ConfigError: nothing.yaml: no such file"),
    ("gpt2 empty.yaml", "ConfigError: empty.yaml: names no setting"),
    ("gpt2 torn.yaml", "ConfigError: torn.yaml: cannot be read"),
    ("gpt2 list.json", "ConfigError: list.json: expected fields with values, found list"),
    ("gpt2 endless.yaml", "ConfigError: endless.yaml: cannot be compared: Circular reference"),
    ("gpt2 new", "CheckpointNotFoundError: new: there is no checkpoint yet"),
    ("gpt2 lost", "lost: no checkpoint can be opened"),
    ("gpt2 bad/checkpoint-20", "CorruptCheckpointError: checkpoint-20: manifest.json: is damaged"),
    ("gpt2 newer", "NewerFormatError: checkpoint-20"),
    ("gpt2 thesis", "thesis: is neither a run directory nor a checkpoint"),
    ("gpt2", "required"),
]


@pytest.fixture
def troubles(run, here):
    """All that cannot be compared."""
    texts = {"empty.yaml": "", "torn.yaml": "a: [", "list.json": "[]", "endless.yaml": "a: &a [*a]"}
    for name, text in texts.items():
        (here / name).write_text(text)
    for name in ("new", "lost", "bad", "newer"):
        make_run(here / name)
    for folder in ("checkpoint-0", "checkpoint-10", "checkpoint-20"):
        shutil.rmtree(here / "new" / folder)
        (here / "lost" / folder / "state.json").unlink()
    flipped = (
        (here / "bad" / "checkpoint-20" / "manifest.json").read_bytes().replace(b"cos", b"sin")
    )
    (here / "bad" / "checkpoint-20" / "manifest.json").write_bytes(flipped)
    newer = here / "newer" / "checkpoint-20" / "manifest.json"
    newer.write_bytes(sealed(newer.read_bytes().replace(b'"version":1', b'"version":2')))
    (here / "thesis").mkdir()


@pytest.mark.parametrize(("words", "sentence"), TROUBLE)
def test_trouble_has_status_2_and_one_sentence(unbroken, troubles, words, sentence):
    status, output, errors = unbroken("diff", *words.split())
    assert (status, "Traceback" in errors) == (2, False)
    assert sentence in output + errors


def test_what_the_disk_refuses_is_trouble_and_not_a_difference(unbroken, run):
    status, _, errors = unbroken("diff", "gpt2", "x" * 300)
    assert (status, errors.startswith("OSError: ")) == (2, True)


def test_the_status_of_a_real_process_is_that_of_diff(save, here):
    save("a")
    save("b", state={})
    ended = [in_a_process("diff", "a", other, cwd=here).returncode for other in ("a", "b", "c")]
    assert ended == [0, 1, 2]


class TestPage:
    """What people see."""

    @pytest.fixture
    def two(self, save, here):
        """Two checkpoints that differ in everything, and a configuration."""
        save("a")
        save(
            "b",
            facts={
                "config": {**CONFIG, "learning_rate": 3e-4, "bf16": True, "output_dir": "runs/b"},
                "settings": {**SETTINGS, "model": {"dropout": 0.2, "n_layer": 2}},
                "environment": {"torch": "2.13.0"},
                "fingerprint": {"code": {"digest": "3f9a71c2"}},
            },
            state={"scheduler": {"last_epoch": 6}, "betas": [0.9, 0.999]},
            tensors={
                "model.a": ("F32", (2, 2), floats(1.0, 2.5, 3.0, float("nan"))),
                "model.b": ("F32", (1, 1), floats(0.0)),
                "optimizer.state.a.exp_avg": ("F32", (2, 2), floats(0.1, 0.2, 0.3, 0.5)),
                "optimizer.state.b.exp_avg": ("F32", (1,), floats(0.0)),
                "rng.torch": ("U8", (4,), b"abce"),
            },
        )
        (here / "config.yaml").write_text("learning_rate: 1e-3\nmodel: {dropout: 0.3}\n")

    @pytest.mark.parametrize(
        ("golden", "words", "status"),
        [
            ("diff.txt", "a b", 1),
            ("diff.json", "a b --json", 1),
            ("diff-values.txt", "a b --values", 1),
            ("diff-values.json", "a b --values --json", 1),
            ("diff-same.txt", "a a", 0),
            ("diff-config.txt", "b config.yaml", 1),
        ],
    )
    def test_it_reads_as_in_the_golden_file(self, two, unbroken, here, golden, words, status):
        found, output, errors = unbroken("diff", *words.split())
        assert (found, errors) == (status, "")
        check_golden(golden, output, here)

    def test_a_long_table_is_cut_and_says_so(self, save, unbroken):
        save("a", state={f"x{i:02}": i for i in range(30)})
        save("b", state={f"x{i:02}": i + 1 for i in range(30)})
        output = unbroken("diff", "a", "b")[1]
        assert "x14" in output
        assert "x15" not in output
        assert "... and 15 more: --all" in output
        assert "x29" in unbroken("diff", "a", "b", "--all")[1]

    def test_all_shows_what_is_the_same_too(self, save, unbroken):
        for name, rate in (("a", 0.1), ("b", 0.2)):
            tensors = {"model.w": ("U8", (1,), b"a")}
            save(name, facts={"config": {"lr": rate, "seed": 7}}, tensors=tensors)
        rows = [line.split() for line in unbroken("diff", "a", "b", "--all")[1].splitlines()]
        for row in (["lr", "0.1", "0.2"], ["seed", "7", "same"], ["model.w", "same"]):
            assert row in rows
        groups = json.loads(unbroken("diff", "a", "b", "--all", "--json")[1])["groups"]
        assert groups[0]["same"] == {"config.seed": 7}
        assert "seed" not in unbroken("diff", "a", "b")[1]

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_no_line_is_wider_than_the_terminal(self, save, width):
        name = "transformer.h.10.mlp.c_proj.weight"
        tensors = {f"optimizer.state.{name}.{i}": ("U8", (1,), b"a") for i in range(3)}
        save("a", tensors=tensors, state={name: "a" * 90})
        others = dict.fromkeys(tensors, ("U8", (1,), b"b"))
        save("b", tensors=others, state={name: "b" * 90})
        console = Console(width=width, file=io.StringIO())
        sides = open_side("a"), open_side("b")
        diff = compare(*sides)
        for distances in ({}, distances_of(*sides, diff)):
            print_page(console, sides, diff, distances, show_all=False)
        lines = console.file.getvalue().splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.count("b") for line in lines) >= 180  # nothing was cut off
