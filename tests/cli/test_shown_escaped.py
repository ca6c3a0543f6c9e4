"""Whatever stands in the names and files of a run, it is shown as text: nothing obeys it."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from cli.sample_run import RUN_ID, make_run
from unbroken.checkpoint import Difference, ResumeReport
from unbroken.errors import ConfigError, printable
from unbroken.goodput import Observed, UsualCost
from unbroken.storage import LocalStorage
from unbroken.store import CheckpointWriter
from unbroken.training import Display

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x7f\u202eexe\ud800\0"
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
UNDECODABLE = os.fsdecode(b"caf\xe9\x1b[2J\xff")
FACTS = {"progress": {EVIL: EVIL}, "config": {"name": EVIL, "lines": "a\nb"}, "best_step": EVIL}


def spelled(text: str) -> str:
    """Return a text of JSON with the evil one in it, as far as files can hold it."""
    return text.replace('"EVIL"', json.dumps(EVIL)).replace("\\ud800", "")


@pytest.fixture
def evil_run(here):
    """A run whose name, date, metrics, history and facts are full of control characters."""
    folder = make_run(here / UNDECODABLE, steps=(0, 10))
    storage = LocalStorage(folder)
    with CheckpointWriter(storage, step=20, run_id=RUN_ID) as writer:
        writer.write_file("state.json", b'{"model":{}}')
        writer.commit(json.loads(spelled(json.dumps(FACTS))))
    identity = {**json.loads((folder / "run.json").read_text()), "created": EVIL}
    (folder / "run.json").write_text(spelled(json.dumps(identity)))
    for name, line in (
        ("metrics.jsonl", '{"step": 20, "loss": "EVIL", "EVIL": 1}'),
        ("history.jsonl", '{"event": "started", "checkpoint": "EVIL", "notes": ["EVIL"]}'),
        ("history.jsonl", '{"event": "failed", "by": "EVIL"}'),
        ("history.jsonl", '{"event": "EVIL"}'),
        ("history.jsonl", '{"event": "saved", "step": "EVIL", "cadence": {"text": "EVIL"}}'),
    ):
        with (folder / name).open("a") as file:
            file.write(spelled(line) + "\n")
    (folder / "checkpoint-10" / UNDECODABLE).touch()
    return folder


COMMANDS = [
    ["ls"],
    ["ls", "RUN"],
    ["ls", "RUN", "--json"],
    ["show", "RUN", "--history"],
    ["show", "RUN", "--history", "--json"],
    ["show", "RUN/checkpoint-20"],
    ["verify", "RUN"],
    ["verify", "RUN", "--json"],
    ["diff", "RUN/checkpoint-10", "RUN/checkpoint-20", "--all"],
    ["diff", "RUN/checkpoint-10", "RUN/checkpoint-20", "--json"],
    ["show", "RUN/checkpoint-99"],
    ["diff", "RUN", "RUN/missing" + UNDECODABLE],
    ["export", "RUN", "RUN"],
    ["show", "missing" + UNDECODABLE],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: ascii(" ".join(one)))
def test_no_command_writes_what_a_terminal_obeys(command, evil_run, unbroken):
    words = [word.replace("RUN", evil_run.name) for word in command]
    status, output, errors = unbroken(*words)
    assert not OBEYED.search(output + errors)
    assert "Traceback" not in errors
    if "--json" in command:
        json.loads(output)
    assert status in (0, 1, 2, 5, 9, 10)
    assert "\\u001b[2J" in output + errors


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
@pytest.mark.parametrize("command", ["ls", "show"])
def test_names_that_no_encoding_has_end_no_command(command, encoding, evil_run):
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    words = [sys.executable, "-m", "unbroken", command, evil_run.name]
    done = subprocess.run(words, capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"caf\\udce9" in done.stdout
    assert b"\x1b" not in done.stdout


def test_a_value_of_two_lines_is_one_row_of_a_table(evil_run, unbroken):
    _, output, _ = unbroken("show", evil_run.name)
    assert "lines" in output
    names = json.loads(unbroken("show", evil_run.name, "--json")[1])["checkpoint"]["facts"]
    assert names["config"]["lines"] == "a\nb"


def test_errors_and_their_hints_are_escaped_wherever_they_are_raised():
    error = ConfigError(EVIL, EVIL, expected=EVIL, found=EVIL, hint=EVIL)
    assert not OBEYED.search(str(error) + "".join(error.__notes__))
    assert error.found == EVIL


def test_what_a_trainer_shows_is_escaped():
    file = io.StringIO()
    found = Difference(EVIL, EVIL, EVIL, EVIL, "harmless")
    for is_terminal in (True, False):
        display = Display(
            Console(file=file, force_terminal=is_terminal, width=200, color_system=None)
        )
        display.note(EVIL)
        display.report(ResumeReport(5, EVIL, differences=(found,), notes=(EVIL,)))
    assert not OBEYED.search(file.getvalue())


@settings(max_examples=60)
@given(st.text())
def test_what_is_printable_stays_and_what_is_escaped_is_the_same_text_to_json(text):
    shown = printable(text)
    assert not OBEYED.search(shown)
    assert printable(shown) == shown
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text
    if text.isprintable():
        assert shown == text


def test_tabs_newlines_and_letters_of_all_scripts_stay():
    text = "ä ß 漢字 עברית 👩‍💻\n\tπ"
    assert printable(text) == text


NAMES = st.sampled_from([
    "event", "step", "at", "checkpoint", "rejected", "set_aside", "notes", "edited", "parent", "by",
    "cadence", "cost", "lost", "durable", "text", "previous_owner", "reason", "from", "to", "id",
])  # fmt: skip
ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["started", "saved", "branched", "given up", "failed", "stopped", EVIL[:-2]]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
EVENTS = st.sampled_from(["started", "saved", "branched", "given up", "failed", "stopped", "odd"])
RECORDS = st.lists(
    st.dictionaries(NAMES, ODD, max_size=6)
    | st.builds(lambda event, more: {**more, "event": event}, EVENTS, st.dictionaries(NAMES, ODD)),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("odd") / "run", steps=(0,))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=RECORDS, metrics=RECORDS)
def test_odd_records_in_journals_are_shown_and_never_a_traceback(
    history, metrics, plain_run, unbroken
):
    for name, records in (("history.jsonl", history), ("metrics.jsonl", metrics)):
        (plain_run / name).write_text("".join(json.dumps(one) + "\n" for one in records))
    for more in ([], ["--json"]):
        status, output, errors = unbroken("show", plain_run, "--history", *more)
        assert (status, errors) == (0, "")
        assert not OBEYED.search(output)
    assert unbroken("ls", plain_run)[0] == 0


@settings(max_examples=60)
@given(history=RECORDS)
def test_a_run_reads_its_own_history_whatever_stands_there(history):
    UsualCost.last_of(history)
    Observed.of(history)


ODD_DATES = ["0001-01-01T00:00:00", "9999-12-31T23:59:59-23:59", "20260131", "", "EVIL"]


@pytest.mark.parametrize("date", ODD_DATES)
def test_dates_of_no_calendar_are_left_out_of_what_a_run_observes(date):
    records = [{"event": "started", "at": date}, {"event": "saved", "at": date}]
    assert Observed.of(records).failures == 0


@pytest.mark.parametrize(
    "lines",
    [b"[1]\n", b'"text"\n', b'{"event": "started"}\n\xff\xfe\n', b"\x00" * 50, b"{" * 500 + b"\n"],
)
@pytest.mark.parametrize("name", ["history.jsonl", "metrics.jsonl"])
def test_journals_of_something_else_are_one_sentence(name, lines, plain_run, tmp_path, unbroken):
    run = shutil.copytree(plain_run, tmp_path / "run")
    (run / name).write_bytes(lines)
    status, _, errors = unbroken("show", run, "--history")
    assert status in (0, 5)
    assert errors.count("\n") <= 3
