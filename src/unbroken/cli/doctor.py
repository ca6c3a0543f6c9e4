"""`unbroken doctor`: what this machine is, and what on it would break bit-exactness."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from unbroken.changes.rules import ENVIRONMENT_RULES, THREADS
from unbroken.checkpoint import environment_facts
from unbroken.cli.tables import (
    date_text,
    make_console,
    make_facts,
    print_json,
    print_table,
    size_text,
    value_text,
)
from unbroken.cli.trials import (
    Disk,
    Experiment,
    Finding,
    Severity,
    by_severity,
    check_disk,
    run_experiments,
)
from unbroken.fingerprint.environment import usable_cores

# Versions, switches and environment variables that cost bit-exactness, by the facts of a process.


Facts = Mapping[str, Any]

_OLDEST_TORCH = (2, 9)
_REPEATING_WORKSPACES = (":4096:8", ":16:8")
_HAVE_THEIR_OWN_CHECK = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OMP_DYNAMIC",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTHONHASHSEED",
)


def check_switches(facts: Facts) -> list[Finding]:
    """Return what is wrong, or good to know, about `environment_facts()`.

    Args:
        facts: Those of a process as a training would be started in.
    """
    return [finding for check in _CHECKS for finding in check(facts)]


@dataclass(frozen=True)
class _Check:
    """A finding, and for which facts it is one; `{f[name]}` in its words is a fact."""

    severity: Severity
    is_found: Callable[[Facts], bool]
    what: str
    why: str
    remedy: str

    def __call__(self, facts: Facts) -> Iterator[Finding]:
        if self.is_found(facts):
            what, remedy = (text.format(f=facts) for text in (self.what, self.remedy))
            yield Finding(self.severity, what, self.why, remedy)


def _tf32(facts: Facts) -> Iterator[Finding]:
    names = [path.removeprefix("float32.cuda.") for path in facts if path in _ON_CUDA]
    reduced = [name for name in names if facts[f"float32.cuda.{name}"] != "ieee"]
    if reduced and _has_gpu(facts):
        yield Finding(
            "note",
            f"TF32 is on for float32 on the GPU: {', '.join(reduced)}",
            "one GPU model repeats its bits with it; a model without TF32 cannot. (torch's default "
            "for cuDNN.)",
            'torch.backends.fp32_precision = "ieee", if GPUs of other kinds shall come near',
        )


def _set_variables(facts: Facts) -> Iterator[Finding]:
    """Name the variables by which a resume would judge another value to change bits."""
    prefix = "variables."
    names = [path.removeprefix(prefix) for path in facts if path.startswith(prefix)]
    rules = {name: ENVIRONMENT_RULES[prefix + name] for name in names}
    is_set = [n for n in names if _variable(facts, n) and n not in _HAVE_THEIR_OWN_CHECK]
    steering = [name for name in is_set if rules[name][0] != "harmless"]
    if steering:
        effects = dict.fromkeys(rules[name][1] for name in steering)
        yield Finding(
            "note",
            f"set: {', '.join(f'{name}={_variable(facts, name)}' for name in steering)}",
            f"with another value: {'; '.join(effects)}",
            "set them alike at every start of a run, in the script that starts the job",
        )


def _variable(facts: Facts, name: str) -> str | None:
    value: str | None = facts.get(f"variables.{name}")
    return value


def _has_gpu(facts: Facts) -> bool:
    return bool(facts["gpus"] != [])


def _is_old(facts: Facts) -> bool:
    return tuple(int(number) for number in re.findall(r"\d+", facts["torch"])[:2]) < _OLDEST_TORCH


_ON_CUDA = {"float32.cuda.matmul", "float32.cuda.conv", "float32.cuda.rnn"}
_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    _Check(
        "breaks",
        _is_old,
        "torch {f[torch]} is older than 2.9",
        "unbroken is made for, and tested with, torch 2.9 and newer",
        'pip install "torch>=2.9"',
    ),
    _Check(
        "breaks",
        lambda f: (_variable(f, "OMP_DYNAMIC") or "").strip().lower() in ("true", "1"),
        "OMP_DYNAMIC is on",
        "the number of threads follows the load of the machine, and with it the order of sums",
        "unset OMP_DYNAMIC",
    ),
    _Check(
        "risk",
        lambda f: not (_variable(f, "OMP_NUM_THREADS") or _variable(f, "MKL_NUM_THREADS")),
        "OMP_NUM_THREADS is not set: torch takes {f[num_threads]} threads, from the cores it sees",
        f"{THREADS[1]}; on a machine with other cores, or under torchrun (which sets 1), a run "
        "would go on with other bits",
        "export OMP_NUM_THREADS={f[num_threads]} in the script that starts the job",
    ),
    _Check(
        "note",
        lambda f: _has_gpu(f) and _variable(f, _WORKSPACE) is None,
        f"{_WORKSPACE} is not set",
        "without it, cuBLAS may not repeat its own bits. unbroken's Trainer sets it; a loop of "
        "your own does not",
        f"export {_WORKSPACE}=:4096:8",
    ),
    _Check(
        "breaks",
        lambda f: _has_gpu(f) and _variable(f, _WORKSPACE) not in (None, *_REPEATING_WORKSPACES),
        f"{_WORKSPACE} is {{f[variables.{_WORKSPACE}]}}",
        "with this workspace cuBLAS may not repeat its own bits, and the Trainer leaves what "
        "is set as it is",
        f"export {_WORKSPACE}=:4096:8",
    ),
    _Check(
        "risk",
        lambda f: f["cudnn.benchmark"] and _has_gpu(f),
        "torch.backends.cudnn.benchmark is on",
        "cuDNN takes the kernel that was the fastest just now: another one next time. "
        "unbroken's Trainer turns it off; a loop of your own does not",
        "torch.backends.cudnn.benchmark = False",
    ),
    _Check(
        "risk",
        lambda f: f["flush_denormal"],
        "the smallest numbers are flushed to zero in every new process",
        "something that Python loads at its start has switched the processor; where it is not "
        "loaded, the bits differ",
        "call torch.set_flush_denormal(...) at the top of the training script",
    ),
    _Check(
        "note",
        lambda f: f["num_threads"] > f["cores"],
        "torch takes {f[num_threads]} threads on {f[cores]} cores",
        "threads that wait for each other make it slow; the bits are not affected",
        "a new run: export OMP_NUM_THREADS={f[cores]}. A run that has begun keeps "
        "{f[num_threads]}: another number changes its bits",
    ),
    _Check(
        "note",
        lambda f: not f["deterministic"],
        "torch does not use deterministic algorithms by default",
        "some kernels do not repeat their own bits. unbroken's Trainer turns deterministic "
        "ones on (full_determinism=True, the default); a loop of your own does not",
        "torch.use_deterministic_algorithms(True) in a loop of your own",
    ),
    _tf32,
    _set_variables,
    _Check(
        "note",
        lambda f: _variable(f, "PYTHONHASHSEED") is None,
        "PYTHONHASHSEED is not set",
        "each start goes through a set of texts in another order. unbroken depends on none; "
        "data that your code gathers in a set may",
        "sort such sets, or export PYTHONHASHSEED=0",
    ),
)


# Room, load and clock of the machine: what makes a training slow, or end for no good reason.


_SHARED_MEMORY = "/dev/shm"  # noqa: S108  # its size alone is looked at
_LITTLE_SHARED_MEMORY = 1_000_000_000
_BUSY = 1.5  # runnable processes for each core
_EARLIEST, _LATEST = 1_735_689_600.0, 4_102_444_800.0  # 2025, 2100


@dataclass(frozen=True)
class Machine:
    """What is looked at.

    Attributes:
        cores: How many this process may use.
        load: Processes that ran or waited, on average over the last minute; None: unknown.
        shared_memory: The size of /dev/shm in bytes; None: there is none.
        clock: Seconds since 1970.
    """

    cores: int
    load: float | None
    shared_memory: int | None
    clock: float

    @classmethod
    def here(cls, cores: int) -> Machine:
        """Look at this machine."""
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        return cls(cores, load, _size_of(_SHARED_MEMORY), time.time())

    def check(self) -> list[Finding]:
        """Return what is wrong."""
        return [*self._check_shared_memory(), *self._check_load(), *self._check_clock()]

    def _check_shared_memory(self) -> Iterator[Finding]:
        if self.shared_memory is None or self.shared_memory >= _LITTLE_SHARED_MEMORY:
            return
        yield Finding(
            "risk",
            f"{_SHARED_MEMORY} has only {size_text(self.shared_memory)}",
            "workers of a DataLoader hand batches over there; when it is full, they die with "
            '"bus error"',
            "start the container with --shm-size=8g, or use dataloader_num_workers=0",
        )

    def _check_load(self) -> Iterator[Finding]:
        if self.load is None or self.load <= _BUSY * self.cores:
            return
        yield Finding(
            "note",
            f"the machine is busy: load {self.load:.1f} on {self.cores} cores",
            "training will be slow; the bits are not affected",
            "wait, or stop what else is running",
        )

    def _check_clock(self) -> Iterator[Finding]:
        if _EARLIEST <= self.clock <= _LATEST:
            return
        day = date_text(time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.clock)))
        yield Finding(
            "risk",
            f"the clock says {day}",
            "the end of a Slurm job is known by the clock, and checkpoints carry its dates. "
            "(Nothing in unbroken decides by date which checkpoint is newer.)",
            "set the clock",
        )


def _size_of(folder: str) -> int | None:
    try:
        found = os.statvfs(folder)
    except OSError:
        return None
    return found.f_blocks * found.f_frsize


# All that the doctor looks at, and how it reports it.


_ON_A_GPU = ("cudnn.", "float32.cuda.", "autocast.cuda", "reduced_sums.bf16", "reduced_sums.fp16")
_SECTIONS = {
    "software": "python torch numpy packages. blas mkl onednn openmp libc cuda hip cudnn nccl "
    "driver driver_cuda",
    "machine": "machine system cpu cpu_capability cores num_threads interop_threads gpus "
    "gpu_memory gpu_compute_capability world_size mesh",
    "variables that are set": "variables.",
}
_SWITCHES = "switches of torch in a new process"


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor has seen.

    Attributes:
        environment: `environment_facts()` of a process as a training would be started in.
        disk: What was seen of the run directory's file system; None: none was named.
        answers: What the experiments have shown.
        findings: What would break bit-exactness, or might; the gravest first.
    """

    environment: dict[str, Any]
    disk: Disk | None
    answers: list[Experiment]
    findings: list[Finding]

    @property
    def is_sound(self) -> bool:
        """Whether nothing would break bit-exactness."""
        return all(finding.severity != "breaks" for finding in self.findings)


def print_diagnosis(path: str | None, *, thorough: bool, as_json: bool) -> int:
    """Look at this machine, print what was seen, and return the exit status.

    Args:
        path: A run directory, there or not yet, whose file system is tried out; or None.
        thorough: Also train in fresh processes.
        as_json: Print JSON.

    Returns:
        0: nothing here would break bit-exactness; 1: something would.

    Raises:
        RunDirectoryError: The path names a file.
        UnbrokenError: A training of an experiment failed.
    """
    diagnosis = _diagnose(path, thorough=thorough)
    if as_json:
        print_json(_as_json(diagnosis))
    else:
        _print(make_console(), diagnosis)
    return 0 if diagnosis.is_sound else 1


def _diagnose(path: str | None, *, thorough: bool) -> Diagnosis:
    disk = None if path is None else check_disk(path)
    if torch.cuda.is_available():
        torch.cuda.init()  # type: ignore[no-untyped-call]  # else the facts leave the GPUs alone
    facts: dict[str, Any] = dict(environment_facts())
    cores = usable_cores()
    machine = Machine.here(cores)  # before the experiments, which are a load themselves
    answers = run_experiments(cores=cores, thorough=thorough)
    findings = [finding for answer in answers for finding in answer.findings()]
    findings += [*check_switches(facts), *([] if disk is None else disk.findings)]
    return Diagnosis(facts, disk, answers, by_severity([*findings, *machine.check()]))


def _print(console: Console, diagnosis: Diagnosis) -> None:
    for title, facts in _sections(diagnosis.environment).items():
        _print_section(console, title, facts)
    if diagnosis.disk is not None:
        _print_section(console, "run directory", diagnosis.disk.facts)
    _print_section(
        console,
        "a small training, tried here",
        {f"{one.device}: {one.question}": "yes" if one.yes else "no" for one in diagnosis.answers},
    )
    for finding in diagnosis.findings:
        console.print(f"{finding.severity}: {finding.what}", style="bold")
        print_table(console, make_facts({"  why": finding.why, "  do": finding.remedy}))
        console.print()
    console.print(_summary(diagnosis.findings))


def _print_section(console: Console, title: str, facts: Mapping[str, str]) -> None:
    if facts:
        console.print(title, style="bold")
        print_table(console, make_facts({f"  {name}": value for name, value in facts.items()}))
        console.print()


def _sections(facts: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return the facts that say something here, in groups."""
    hidden = () if facts["gpus"] else _ON_A_GPU
    rest = {
        name: _text(name, value)
        for name, value in facts.items()
        if value is not None and value != [] and not name.startswith(hidden)
    }
    rest.setdefault("gpus", "none")
    sections: dict[str, dict[str, str]] = {}
    for title, names in _SECTIONS.items():
        chosen = [name for one in names.split() for name in rest if _fits(name, one)]
        sections[title] = {name.removeprefix("variables."): rest.pop(name) for name in chosen}
    return {**sections, _SWITCHES: rest}


def _fits(name: str, expected: str) -> bool:
    return name.startswith(expected) if expected.endswith(".") else name == expected


def _text(name: str, value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_text(name, item) for item in value)
    return size_text(value) if name == "gpu_memory" else value_text(value)


def _summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.severity for finding in findings)
    others = f"{_counted(counts['risk'], 'risk')}, {_counted(counts['note'], 'note')}"
    if counts["breaks"] == 0:
        return f"nothing here would break bit-exactness ({others})"
    return f"{_counted(counts['breaks'], 'thing')} here would break bit-exactness ({others})"


def _counted(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _as_json(diagnosis: Diagnosis) -> dict[str, object]:
    return {
        "is_sound": diagnosis.is_sound,
        "environment": diagnosis.environment,
        "run_directory": None if diagnosis.disk is None else diagnosis.disk.facts,
        "experiments": [asdict(answer) for answer in diagnosis.answers],
        "findings": [asdict(finding) for finding in diagnosis.findings],
    }
