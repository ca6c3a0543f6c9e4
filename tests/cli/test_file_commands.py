"""ls, show and verify, held against golden files (to renew them: UNBROKEN_NEW_GOLDEN=1)."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from cli.sample_run import in_a_process, make_run
from unbroken.cli.ls import rows_of
from unbroken.cli.run_paths import open_run_path
from unbroken.cli.tables import make_table
from unbroken.store.format.canonical_json import digest_of

GOLDEN = Path(__file__).parent / "golden"


def damage(folder):
    """Flip one byte of a tensor, and lose a file."""
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-500, os.SEEK_END)
        file.write(b"!")
    (folder / "state.json").unlink()


def check_golden(name, text, here):
    text = text.replace(str(here), "/here")
    if os.environ.get("UNBROKEN_NEW_GOLDEN"):
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()


@pytest.mark.parametrize(
    ("golden", "command", "status"),
    [
        ("ls.txt", "ls gpt2", 0),
        ("ls.json", "ls gpt2 --json", 0),
        ("ls-overview.txt", "ls", 0),
        ("show.txt", "show gpt2 --history", 0),
        ("show.json", "show gpt2 --history --json", 0),
        ("show-checkpoint.txt", "show gpt2/checkpoint-10", 0),
        ("verify.txt", "verify gpt2", 0),
        ("verify-one.json", "verify gpt2/checkpoint-10 --json", 0),
    ],
)
def test_a_run_reads_as_in_the_golden_file(unbroken, run, here, golden, command, status):
    found, output, errors = unbroken(*command.split())
    assert (found, errors) == (status, "")
    check_golden(golden, output, here)


@pytest.mark.parametrize(
    ("golden", "command", "status"),
    [
        ("damaged-ls.txt", "ls gpt2", 0),
        ("damaged-show.txt", "show gpt2", 0),
        ("damaged-verify.txt", "verify gpt2", 10),
        ("damaged-verify.json", "verify gpt2 --step 20 --json", 10),
    ],
)
def test_damage_reads_as_in_the_golden_file(unbroken, run, here, golden, command, status):
    damage(run / "checkpoint-20")
    (run / "checkpoint-10" / "manifest.json").write_bytes(b"{}")
    (run / "checkpoint-0" / "notes.txt").write_text("mine")
    found, output, errors = unbroken(*command.split())
    assert (found, errors) == (status, "")
    check_golden(golden, output, here)


def test_verify_finds_a_flipped_bit_that_ls_cannot_see(unbroken, run):
    with (run / "checkpoint-20" / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"n")
    assert unbroken("ls", run)[1].count("not verified") == 3
    assert "optimizer.state.w.m: is damaged" in unbroken("verify", run)[1]


def test_a_checkpoint_of_another_run_is_damage(unbroken, run, here):
    other = make_run(here / "other", fill=8)
    identity = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(
        json.dumps({**identity, "id": "f" * 32}, sort_keys=True, separators=(",", ":")) + "\n"
    )
    status, output, _ = unbroken("verify", other, "--step", 10)
    assert status == 10
    assert "belongs to another run" in output


def test_a_stray_file_is_told_but_is_no_damage(unbroken, run):
    (run / "checkpoint-0" / "notes.txt").write_text("mine")
    status, output, _ = unbroken("verify", run)
    assert status == 0
    assert "notes.txt: is not in the manifest" in output


def test_a_copied_checkpoint_is_verified_outside_of_its_run(unbroken, run, here):
    shutil.copytree(run / "checkpoint-10", here / "elsewhere")
    assert unbroken("verify", "elsewhere")[0] == 0
    damage(here / "elsewhere")
    assert unbroken("verify", "elsewhere")[0] == 10


def test_a_newer_format_is_no_damage(unbroken, run):
    manifest = run / "checkpoint-10" / "manifest.json"
    newer = manifest.read_bytes().replace(b'"version":1', b'"version":2')
    manifest.write_bytes(sealed(newer))
    status, output, _ = unbroken("verify", run)
    assert status == 11
    assert "of a newer format" in output


def sealed(raw):
    """Return the bytes of a manifest with the digest that its body has."""
    body = raw.partition(b',"manifest":')[2][:-2]
    return b'{"digest":"' + digest_of(body).encode() + b'","manifest":' + body + b"}\n"


def test_ls_finds_runs_under_runs_and_here(unbroken, here):
    make_run(here / "runs" / "one")
    make_run(here / "two")
    output = unbroken("ls")[1]
    assert [line.split()[0] for line in output.splitlines()] == ["run", "runs/one", "two"]


def test_ls_shows_the_run_that_is_the_current_directory(unbroken, run, monkeypatch):
    monkeypatch.chdir(run)
    assert "not verified" in unbroken("ls")[1]


def test_a_run_without_checkpoints_says_so(unbroken, here):
    make_run(here / "gpt2")
    for folder in (here / "gpt2").glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert "no checkpoint yet" in unbroken("ls", "gpt2")[1]
    assert "none yet" in unbroken("show", "gpt2")[1]
    assert unbroken("verify", "gpt2")[0] == 9


def test_a_table_keeps_every_word_in_a_narrow_terminal(run):
    console = Console(width=30, record=True, file=io.StringIO())
    rows = [(row.folder, row.state) for row in rows_of(open_run_path(str(run)))]
    console.print(make_table(("checkpoint", "state"), rows, ()))
    shown = "".join(console.export_text().split())
    assert "checkpoint-10" in shown
    assert shown.count("notverified") == 3


def test_a_closed_pipe_ends_ls_quietly(run, here):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as pipe:
        ended = subprocess.run(
            [sys.executable, "-m", "unbroken", "ls", "gpt2"],
            cwd=here,
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert ended.stderr == b""
    assert ended.returncode == 141


def test_the_module_and_the_function_are_the_same_command(unbroken, run, here):
    ended = in_a_process("show", "gpt2", cwd=here)
    assert (ended.returncode, ended.stdout) == unbroken("show", "gpt2")[:2]
