"""The facts about the machine that go with every figure, and the place for results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, object]:
    packages = ("torch", "transformers", "lightning", "accelerate", "numpy")
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def measured_in_a_fresh_process(script: str, *arguments: object, threads: int = 1) -> dict:
    """Run a script in a new interpreter; return the JSON on a line of its output, the last."""
    command = [sys.executable, script, *map(str, arguments)]
    environment = {**users_environment(), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def users_environment() -> dict[str, str]:
    """Return the environment of processes: bytecode is kept, as of packages that are installed."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def median(values: list[float]) -> float:
    return statistics.median(values)


def write(name: str, result: dict, folder: Path = RESULTS) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"machine": facts(), **result}, indent=2) + "\n")
    print(f"written: {path}")
