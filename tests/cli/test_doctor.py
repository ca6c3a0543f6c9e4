"""`unbroken doctor`: what it sees, what it tries, and that it sees what is broken."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from unbroken.checkpoint import environment_facts
from unbroken.cli.doctor import Diagnosis, Machine, _print, check_switches
from unbroken.cli.trials import (
    Disk,
    Experiment,
    check_disk,
    mount_of,
    run_experiments,
    train,
    train_in_a_process,
)
from unbroken.errors import UnbrokenError
from unbroken.storage import LocalStorage

ONE_GPU = {"gpus": ["NVIDIA H200"], "variables.CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
HEALTHY = {
    **dict.fromkeys(path for path in environment_facts() if path.startswith("variables.")),
    **{path: "ieee" for path in environment_facts() if path.startswith("float32.")},
    "torch": "2.13.0+cpu",
    "num_threads": 2,
    "cores": 2,
    "gpus": [],
    "deterministic": True,
    "cudnn.benchmark": False,
    "flush_denormal": False,
    "variables.OMP_NUM_THREADS": "2",
    "variables.PYTHONHASHSEED": "0",
}


def test_it_tells_the_environment_tries_the_disk_and_trains(unbroken, here, monkeypatch):
    monkeypatch.delenv("OMP_DYNAMIC", raising=False)
    status, output, errors = unbroken("doctor", here / "runs" / "new", "--json")
    told = json.loads(output)
    assert (status, errors, told["is_sound"]) == (0, "", True)
    assert told["environment"]["torch"] == torch.__version__
    assert told["run_directory"]["locks"] == "yes"
    (twice, *_) = told["experiments"]
    assert (twice["question"], twice["yes"]) == ("the same bits twice", True)


def test_its_exit_status_says_that_something_would_break(unbroken, here, monkeypatch):
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    status, output, _ = unbroken("doctor")
    assert status == 1
    assert "breaks: OMP_DYNAMIC is on" in output
    assert "1 thing here would break bit-exactness" in output


def test_its_help_does_not_load_torch():
    probe = "import sys; from unbroken.cli.main import main\ntry: main(['doctor', '--help'])\n"
    probe += "except SystemExit: sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"bit-exactness" in done.stdout


def test_a_path_that_is_a_file_is_refused(unbroken, here):
    (here / "file").touch()
    status, _, errors = unbroken("doctor", "file")
    assert status == 5
    assert "is not a directory" in errors


def test_a_healthy_machine_has_no_findings():
    assert check_switches(HEALTHY) == []
    assert check_switches({**HEALTHY, **ONE_GPU}) == []
    assert Machine(cores=4, load=4.0, shared_memory=10**10, clock=1.8e9).check() == []


@pytest.mark.parametrize(
    ("change", "severity", "what"),
    [
        ({"torch": "2.8.1+cu126"}, "breaks", "older than 2.9"),
        ({"variables.OMP_DYNAMIC": "TRUE"}, "breaks", "OMP_DYNAMIC is on"),
        ({"variables.OMP_NUM_THREADS": None}, "risk", "torch takes 2 threads"),
        ({"num_threads": 3}, "note", "3 threads on 2 cores"),
        ({"deterministic": False}, "note", "deterministic algorithms"),
        ({"flush_denormal": True}, "risk", "flushed to zero"),
        ({"variables.PYTHONHASHSEED": None}, "note", "PYTHONHASHSEED"),
        ({"variables.ATEN_CPU_CAPABILITY": "avx2"}, "note", "set: ATEN_CPU_CAPABILITY=avx2"),
        ({**ONE_GPU, "variables.NVIDIA_TF32_OVERRIDE": "1"}, "note", "NVIDIA_TF32_OVERRIDE=1"),
        ({"gpus": ["H200"]}, "note", "CUBLAS_WORKSPACE_CONFIG is not set"),
        (
            {**ONE_GPU, "variables.CUBLAS_WORKSPACE_CONFIG": ":0:0"},
            "breaks",
            "CUBLAS_WORKSPACE_CONFIG is :0:0",
        ),
        ({**ONE_GPU, "cudnn.benchmark": True}, "risk", "cudnn.benchmark is on"),
        (
            {**ONE_GPU, "float32.cuda.conv": "tf32"},
            "note",
            "TF32 is on for float32 on the GPU: conv",
        ),
    ],
)
def test_what_is_wrong_is_found_with_its_remedy(change, severity, what):
    (found,) = check_switches({**HEALTHY, **change})
    assert found.severity == severity
    assert what in found.what
    assert found.why
    assert found.remedy


@pytest.mark.parametrize(
    "change",
    [{"cudnn.benchmark": True}, {"float32.cuda.matmul": "tf32"}, {"torch": "2.10.0"}],
)
def test_what_harms_nothing_here_is_not_told(change):
    assert check_switches({**HEALTHY, **change}) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"shared_memory": 64 << 20}, "/dev/shm has only 67.1 MB"),
        ({"load": 9.0}, "load 9.0 on 4 cores"),
        ({"clock": 60.0}, "the clock says 1970-01-01 00:01:00 UTC"),
    ],
)
def test_room_load_and_clock_are_looked_at(change, what):
    sound = {"cores": 4, "load": 1.0, "shared_memory": None, "clock": 1.8e9}
    (found,) = Machine(**{**sound, **change}).check()
    assert what in found.what


@pytest.fixture
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_the_small_training_gives_the_same_bits_in_another_process(two_threads):
    assert train_in_a_process("cpu") == train("cpu")


def test_the_small_training_would_show_randomness_that_is_not_seeded(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    assert train("cpu") != train("cpu")


def test_a_training_that_fails_in_another_process_is_an_error():
    with pytest.raises(UnbrokenError, match="in a fresh process on nowhere: failed"):
        train_in_a_process("nowhere")


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    ("here", "afresh", "expected"),
    [
        (lambda device: "a", lambda device: "a", [True, True, False]),
        (lambda device: str(torch.get_num_threads()), lambda device: "2", [True, True, True]),
        (lambda device: "a", lambda device: "b", [True, False, False]),
    ],
)
def test_the_answers_are_what_the_experiments_show(here, afresh, expected):
    answers = run_experiments(cores=2, thorough=True, train=here, train_in_child=afresh)
    assert [answer.yes for answer in answers if answer.device == "cpu"] == expected
    assert torch.get_num_threads() == 2


def test_bits_that_do_not_repeat_break_exactness():
    numbers = itertools.count()
    answers = run_experiments(cores=2, thorough=False, train=lambda device: str(next(numbers)))
    (found,) = answers[0].findings()
    assert (answers[0].yes, found.severity) == (False, "breaks")


def test_that_the_bits_depend_on_the_threads_breaks_nothing_by_itself():
    assert list(Experiment("depends on the number of threads", "cpu", True, None).findings()) == []


def test_the_disk_is_tried_and_left_as_it_was(here):
    disk = check_disk(str(here / "runs" / "new"))
    tried = {name: disk.facts[name].partition(",")[0] for name in ("fsync", "rename", "locks")}
    assert tried == {"fsync": "yes", "rename": "yes", "locks": "yes"}
    assert os.listdir(here) == []


def test_in_a_run_directory_nothing_is_written(run, here):
    before = run.stat().st_mtime_ns
    assert check_disk(str(run)).facts["tried in"] == str(here)
    assert run.stat().st_mtime_ns == before


class NoLinks(LocalStorage):
    def link(self, source, target):
        raise OSError(errno.EPERM, "Operation not permitted")


class NoSync(LocalStorage):
    def sync_folder(self, path):
        raise OSError(errno.EINVAL, "Invalid argument")


class Replacing(LocalStorage):
    def rename(self, source, target):
        os.rename(self.describe(source), self.describe(target))


class LocksThatHoldNothing(LocalStorage):
    def lock(self, path, owner):
        Path(self.describe(path)).write_text(owner)
        return SimpleNamespace(release=lambda: None)


class Full(LocalStorage):
    def free_bytes(self):
        return 1000


class Unwritable(LocalStorage):
    def __init__(self, root):
        raise OSError(errno.EROFS, "Read-only file system")


@pytest.mark.parametrize(
    ("storage", "severity", "what"),
    [
        (NoLinks, "note", "hard links: Operation not permitted"),
        (NoSync, "breaks", "fsync: Invalid argument"),
        (Replacing, "breaks", "rename: replaces what stands there"),
        (LocksThatHoldNothing, "breaks", "locks: two processes hold one lock"),
        (Full, "risk", "room for only 1.0 kB"),
        (Unwritable, "breaks", "nothing can be written: Read-only file system"),
    ],
)
def test_a_disk_that_does_not_keep_its_promises_is_found(here, storage, severity, what):
    kind = {finding.what for finding in check_disk(str(here)).findings}
    (found,) = [f for f in check_disk(str(here), storage=storage).findings if f.what not in kind]
    assert found.severity == severity
    assert what in found.what


@pytest.mark.parametrize(
    ("mounted", "what"),
    [
        ("tmpfs /data tmpfs rw", "is in memory (tmpfs)"),
        ("overlay /data overlay rw", "container's own layer"),
        ("server:/x /data nfs4 rw,hard", "on a network file system (nfs4)"),
        ("s3fs /data fuse.s3fs rw", "object store"),
        ("mountpoint-s3 /data fuse rw", "object store"),
        ("/dev/sdb /data ext4 rw,nobarrier", "without write barriers"),
        ("x /data lustre rw,localflock", "network file system (lustre)"),
    ],
)
def test_the_kind_of_file_system_is_told(mounted, what):
    mounts = f"/dev/sda / ext4 rw 0 0\n{mounted} 0 0\n"
    assert what in next(mount_of(Path("/data/runs"), mounts).check()).what


def test_the_mount_that_is_seen_is_the_last_and_deepest_one():
    mounts = "a / ext4 rw\nb /my\\040data xfs rw\nc /my\\040data nfs rw,nolock\nd /my btrfs rw\n"
    assert mount_of(Path("/my data/runs"), mounts).source == "c"
    assert mount_of(Path("/mydata"), mounts).source == "a"
    assert list(mount_of(Path("/mydata"), mounts).check()) == []
    assert [f.severity for f in mount_of(Path("/my data"), mounts).check()] == ["risk", "risk"]


def test_the_page_fits_into_80_columns(here):
    facts = {**environment_facts(), "cpu": "A Processor of a Rather Long Name " * 4}
    findings = [*check_switches({**facts, "gpus": ["H200"]}), *Machine(1, 9.0, 9, 0.0).check()]
    page = io.StringIO()
    answers = [Experiment("the same bits in two other processes", "cuda", yes=False, expected=True)]
    disk = Disk({"tried in": f"/{'long/' * 30}"}, [])
    _print(Console(width=80, file=page), Diagnosis(facts, disk, answers, findings))
    assert max(len(line) for line in page.getvalue().splitlines()) <= 80
    assert page.getvalue().count("  do  ") == len(findings)
