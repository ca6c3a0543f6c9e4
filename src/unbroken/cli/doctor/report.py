"""All that the doctor looks at, and how it tells it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console

from unbroken.checkpoint import environment_facts
from unbroken.cli.doctor.checks import Machine, check_switches
from unbroken.cli.doctor.experiment import Experiment, run_experiments
from unbroken.cli.doctor.filesystem import Disk, check_disk
from unbroken.cli.doctor.finding import Finding, by_severity
from unbroken.cli.tables import (
    make_console,
    make_facts,
    print_json,
    print_table,
    size_text,
    value_text,
)
from unbroken.fingerprint.environment import usable_cores

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
