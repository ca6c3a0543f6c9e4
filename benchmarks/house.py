"""How much of the package a save, a resume and a refused change run through, and what they ask of the file system.

    python benchmarks/house.py                       print it
    python benchmarks/house.py --write FILE          ... and write it
    python benchmarks/house.py --beside FILE         ... beside what was measured before
    python benchmarks/house.py --structure SCRIPT    ... with the JSON that this script prints (`SCRIPT --json`)

A small model, one process, the CPU. The system's calls are those that strace sees. None of it is a time:
a busy machine gives the same numbers. `reference/flows_before.json` is of the code before it was laid out anew.
"""  # noqa: E501

from __future__ import annotations

import argparse
import collections
import contextlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

FLOWS = ("save", "resume", "refuse")
SYSTEM_CALLS = "%file,%desc"
NOT_OF_FILES = (
    "mmap",
    "munmap",
    "poll",
    "ppoll",
    "epoll_wait",
    "select",
    "ioctl",
    "fcntl",
    "lseek",
)
BEGIN, END = "/begin-of-measurement", "/end-of-measurement"
WIDTH, OF_A_TENSOR = 8192, 1 << 17  # bytes of one read or write; a manifest has fewer
WRITES = ("write", "pwrite", "pwritev", "writev")
READS = ("pread", "preadv", "readv")
NO_CALLS = {"_path_normpath", "fspath", "getpid", "getuid", "uname", "confstr", "urandom"}
NO_CALLS |= {"sched_getaffinity", "cpu_count"}


# What is measured: small runs


def small_trainer(folder: str, learning_rate: float = 1e-3, width: int = 32) -> Any:
    import torch

    from unbroken import Trainer, TrainerConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, width), torch.nn.Dropout(0.1), torch.nn.Linear(width, 2)
    )
    data = [(torch.ones(8) * i, torch.tensor(i % 2)) for i in range(64)]
    config = TrainerConfig(
        output_dir=folder,
        batch_size=16,
        micro_batch_size=8,
        max_steps=4,
        learning_rate=learning_rate,
        save_steps=2,
        logging_steps=None,
    )
    return Trainer(model, config, data, loss_fn=torch.nn.CrossEntropyLoss())


def small_drop_in(folder: str) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

    from unbroken.adapters.transformers import Trainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = torch.randint(0, 256, (32, 32))
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "vocab_size": 257, "n_positions": 32}
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)),
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
    )


TRAINERS = {"trainer": partial(small_trainer, width=WIDTH), "drop-in": small_drop_in}


# What runs of the package


class Trace:
    """Functions of the package that are entered, and the deepest stack at a tensor's way to a file.

    Args:
        calls: Names of the functions of the system that move bytes; a tensor's are many at once.
    """

    def __init__(self, calls: tuple[str, ...]) -> None:
        self._bytes = calls
        self.calls: list[tuple[str, str]] = []
        self.jumps = 0
        self.at_the_byte: list[tuple[str, str]] = []
        self.of_os: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Trace:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            self._note_call(frame, argument)
        if event != "call" or (entered := place_of(frame)) is None:
            return
        if any(part in entered[1] for part in ("<genexpr>", "<listcomp>", "<lambda>")):
            return
        if self.calls and self.calls[-1][0] != entered[0]:
            self.jumps += 1
        self.calls.append(entered)

    def _note_call(self, frame: FrameType, function: Any) -> None:
        name = function.__name__
        if function.__module__ != "posix" or name in NO_CALLS:
            return
        self.of_os[name] += 1
        moved = map(nbytes_of, frame.f_locals.values()) if name in self._bytes else ()
        if max(moved, default=0) >= OF_A_TENSOR:
            self.at_the_byte = max(stack_of(frame), self.at_the_byte, key=len)

    def told(self) -> dict[str, Any]:
        return {
            "calls": len(self.calls),
            "functions": len(set(self.calls)),
            "files": len({file for file, _ in self.calls}),
            "jumps": self.jumps,
            "frames at the byte": len(self.at_the_byte),
            "files at the byte": len({file for file, _ in self.at_the_byte}),
            "functions of os": {
                "all": sum(self.of_os.values()),
                **dict(sorted(self.of_os.items())),
            },
            "stack at the byte": [f"{file}:{name}" for file, name in self.at_the_byte],
        }


def nbytes_of(value: Any) -> int:
    """Return how many bytes a buffer has, or a list of them."""
    if isinstance(value, list | tuple):
        return sum(map(nbytes_of, value))
    is_buffer = isinstance(value, bytes | bytearray | memoryview)
    return memoryview(value).nbytes if is_buffer else 0


def place_of(frame: FrameType) -> tuple[str, str] | None:
    """Return the file of the package, and the function, that a frame is in."""
    _, package, file = frame.f_code.co_filename.rpartition("/unbroken/")
    return (file, frame.f_code.co_qualname) if package else None


def stack_of(frame: FrameType | None) -> list[tuple[str, str]]:
    found = []
    while frame is not None:
        if (place := place_of(frame)) is not None:
            found.append(place)
        frame = frame.f_back
    return list(dict.fromkeys(found[::-1]))  # recursion counts once


def traced(flow: str) -> dict[str, Any]:
    """Return what of the package runs in a save, a resume, or a refusal."""
    from unbroken import DifferenceError

    folder = tempfile.mkdtemp()
    small = partial(small_trainer, width=WIDTH)
    first = small(folder)
    first.train()
    with Trace(WRITES if flow == "save" else READS) as trace:
        if flow == "save":
            first.save_checkpoint()
    first.checkpointer.close()
    if flow == "resume":
        second = small(folder)
        with trace:
            second.load_checkpoint("auto")
        second.checkpointer.close()
    if flow == "refuse":
        with trace, contextlib.suppress(DifferenceError):
            small(folder, 2e-3).train()
    shutil.rmtree(folder)
    return trace.told()


def save_marked() -> dict[str, Any]:
    """Save between two calls that strace sees."""
    folder = tempfile.mkdtemp()
    trainer = small_trainer(folder)
    trainer.train()
    os.path.exists(BEGIN)
    trainer.save_checkpoint()
    os.path.exists(END)
    trainer.checkpointer.close()
    shutil.rmtree(folder)
    return {}


def train_to_the_end(kind: str, folder: str) -> dict[str, Any]:
    TRAINERS[kind](folder).train()
    return {}


# What is asked of the file system


def calls_of_a_save() -> dict[str, int]:
    """Return how often a small save calls each function of the file system."""
    lines = straced(SYSTEM_CALLS, "save_marked")
    begin = next(n for n, line in enumerate(lines) if BEGIN in line)
    end = next(n for n, line in enumerate(lines) if END in line)
    counts: collections.Counter[str] = collections.Counter()
    for line in lines[begin + 1 : end]:
        if (name := called(line)) is None or name in NOT_OF_FILES:
            continue
        counts[name] += 1
        if name == "newfstatat":
            how = "lstat" if "AT_SYMLINK_NOFOLLOW" in line else "stat"
            counts["of them " + ("fstat" if "AT_EMPTY_PATH" in line else how)] += 1
    total = sum(n for name, n in counts.items() if not name.startswith("of them"))
    return {"all": total, **dict(sorted(counts.items()))}


def called(line: str) -> str | None:
    """Return the system call that begins in a line of strace.

    Example:
        >>> called('12 openat(AT_FDCWD</x>, "y", O_RDONLY) = 3</x/y>'), called("12 +++ exited")
        ('openat', None)
    """
    found = re.match(r"\d+ +(\w+)\(", line)
    return found[1] if found else None


def bytes_of_a_resume(kind: str) -> dict[str, float]:
    """Return what a resume by a fresh process reads of its checkpoint, and the size of that."""
    folder = Path(tempfile.mkdtemp())
    in_a_process("train_to_the_end", kind, str(folder))
    shutil.rmtree(folder / "checkpoint-4")
    size = sum(file.stat().st_size for file in (folder / "checkpoint-2").rglob("*"))
    lines = straced("read,pread64,preadv,preadv2,readv,mmap", "train_to_the_end", kind, str(folder))
    shutil.rmtree(folder)
    of_it = [line for line in lines if "/checkpoint-2/" in line]
    mapped = [re.search(r"mmap\(\S+ (\d+),", line) for line in of_it]
    read = [re.search(r"\) = (\d+)$", line) for line in of_it if called(line) != "mmap"]
    found = {"size": size, "read": sum(int(one[1]) for one in read if one)}
    found["mapped"] = sum(int(one[1]) for one in mapped if one)
    return {**found, "read over size": round((found["read"] + found["mapped"]) / size, 3)}


# Processes


def in_a_process(function: str, *arguments: str, before: tuple[str, ...] = ()) -> dict[str, Any]:
    """Call a function of this script in a fresh process; return what it returned."""
    command = [*before, sys.executable, __file__, "--call", function, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def straced(calls: str, function: str, *arguments: str) -> list[str]:
    """Return the system calls of a function, with what was unfinished put together."""
    if shutil.which("strace") is None:
        raise SystemExit("strace is not installed, and the system's calls cannot be counted")
    with tempfile.TemporaryDirectory() as folder:
        log = str(Path(folder, "log"))
        before = ("strace", "-f", "-y", "-qq", "-s", "0", "-e", f"trace={calls}", "-o", log)
        in_a_process(function, *arguments, before=before)
        return joined(Path(log).read_text().splitlines())


def joined(lines: list[str]) -> list[str]:
    """Return lines of strace in which a call that another process broke up is one line.

    Example:
        >>> joined(["1 read(3, <unfinished ...>", "2 close(4) = 0", '1 <... read resumed>"") = 0'])
        ['2 close(4) = 0', '1 read(3, "") = 0']
    """
    begun: dict[str, str] = {}
    found = []
    for line in lines:
        process = line.partition(" ")[0]
        if line.endswith("<unfinished ...>"):
            begun[process] = line.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line):
            found.append(begun.pop(process, f"{process} ") + resumed[1])
        else:
            found.append(line)
    return found


def parameters_of_checkpointer() -> int:
    """Return how many keyword parameters a Checkpointer has."""
    from unbroken import Checkpointer

    parameters = inspect.signature(Checkpointer).parameters.values()
    return sum(one.kind is inspect.Parameter.KEYWORD_ONLY for one in parameters)


def structure(script: Path) -> Any:
    command = [sys.executable, str(script), "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measured() -> dict[str, Any]:
    return {
        "flows": {flow: in_a_process("traced", flow) for flow in FLOWS},
        "system calls of a small save": calls_of_a_save(),
        "bytes of a resume": {kind: bytes_of_a_resume(kind) for kind in TRAINERS},
        "keyword parameters of Checkpointer": parameters_of_checkpointer(),
    }


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested values by joined names, without lists.

    Example:
        >>> flat({"flows": {"save": {"files": 74}}})
        {'flows: save: files': 74}
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}: ")
        elif not isinstance(value, list):
            found[before + name] = value
    return found


CALLED: Mapping[str, Callable[..., dict[str, Any]]] = {
    "traced": traced,
    "save_marked": save_marked,
    "train_to_the_end": train_to_the_end,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", type=Path, metavar="FILE")
    parser.add_argument("--beside", type=Path, metavar="FILE")
    parser.add_argument("--structure", type=Path, metavar="SCRIPT")
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.call:
        print("\n" + json.dumps(CALLED[given.call[0]](*given.call[1:])), flush=True)
        return
    found = measured()
    if given.structure is not None:
        found["structure"] = structure(given.structure)
    before = {} if given.beside is None else flat(json.loads(given.beside.read_text()))
    for name, value in flat(found).items():
        print(f"{name:70} {value}", f"(before: {before.get(name)})" if before else "")
    if given.write is not None:
        given.write.write_text(json.dumps(found, indent=1) + "\n")
        print(f"written: {given.write}")


if __name__ == "__main__":
    main()
