"""Which stock configurations of transformers, Lightning and Accelerate resume exactly.

    python benchmarks/stock_trainers.py [TRAINER ...]

`unbroken check` is run on each; the page docs/stock-trainers.md is written from what it found.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from machine import RESULTS
from unbroken.check import CheckRequest, CheckResult, Status, check_script

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs/stock-trainers.md"
STORED = RESULTS / "stock_trainers.json"
DROPOUT = "dropout 0.1, shuffling"

# trainer: (case, killed after step, what it is)
CASES = {
    "transformers": [
        ("defaults", 8, f"{DROPOUT}; checkpoint in epoch 1"),
        ("in epoch 2", 18, f"{DROPOUT}; checkpoint in epoch 2"),
        ("epoch end", 15, f"{DROPOUT}; checkpoint at the end of epoch 1"),
        ("accumulation", 8, "the same, 2 accumulation steps"),
        ("workers", 8, "the same, 2 data workers"),
        ("iterable data", 8, "the same, an `IterableDataset`"),
        ("random collator", 8, "a collator that masks at random; in epoch 1"),
        ("random collator, epoch end", 15, "the same; at the end of epoch 1"),
        ("random collator, workers", 8, "the same, 2 data workers; in epoch 1"),
        ("length groups", 18, '`train_sampling_strategy="group_by_length"`; in epoch 2'),
        ("ignore_data_skip", 8, "`ignore_data_skip=True`; in epoch 1"),
        (
            *("resume_from_checkpoint in TrainingArguments", 8),
            "the checkpoint is given in `TrainingArguments(resume_from_checkpoint=...)`",
        ),
    ],
    "lightning": [
        ("plain", 11, "neither shuffling nor dropout; end of epoch 1"),
        ("shuffling", 11, "shuffling; end of epoch 1"),
        ("dropout", 11, "dropout; end of epoch 1"),
        ("mid-epoch", 13, "neither; in the middle of epoch 2"),
        ("window", 5, "neither; saved inside an accumulation window of 4"),
    ],
    "accelerate": [
        ("epoch end", 11, "`save_state`, dropout, shuffling; end of epoch 1"),
        ("middle, no shuffling", 13, "dropout, no shuffling, `skip_first_batches`; in epoch 2"),
        ("middle of epoch 1", 7, "dropout, shuffling, `skip_first_batches`; in epoch 1"),
        ("middle", 13, "dropout, shuffling, `skip_first_batches`; in epoch 2"),
        ("epoch end, seedable", 11, "`use_seedable_sampler=True`; end of epoch 1"),
        ("middle, seedable", 13, "`use_seedable_sampler=True`; in epoch 2"),
    ],
}


def ask(trainer: str, case: str, kill_after: int) -> CheckResult:
    script = HERE / f"stock/{trainer}_script.py"
    command = (sys.executable, str(script), "--out", "{out}", "--case", case)
    return check_script(CheckRequest(command, at=(kill_after,), timeout=300))


HEAD = """# Which stock trainers resume exactly

Found by `unbroken check` on {date}, with torch {torch}, Python {python}, on CPU with one thread.
Written by `python benchmarks/stock_trainers.py`, which runs the scripts in `benchmarks/stock/`.

*Exact* means: after a SIGKILL the same command, in a fresh process, goes on with the same data,
losses, learning rates, gradients, weights, buffers and optimizer state in every bit, to the end.
A **no** is no reproach: most of these trainers promise less. The scripts are as small as they can
be (8 to 36 steps), on one process.
"""


def row(what: str, found: dict) -> str:
    sign = "yes" if found["status"] == Status.EXACT else "**no**"
    culprit = "" if found["status"] == Status.EXACT else f"`{found['culprit']}`: "
    words = found["words"].partition(" in every bit")[0]
    if found["status"] == Status.EXACT and found["evidence"]:
        words += f" ({found['evidence'][0].partition(':')[0]})"
    return f"| {what} | {found['after']} | {sign} | {culprit}{words} |"


def page(result: dict) -> str:
    lines = [HEAD.format(**result)]
    for trainer, cases in CASES.items():
        lines += [f"## {trainer} {result[trainer]}", ""]
        lines += ["| configuration | killed after step | exact | what the check says |"]
        lines += ["|---|---|---|---|"]
        found = result["cases"][trainer]
        lines += [row(what, found[case]) for case, _, what in cases if case in found]
        lines += [""]
    return "\n".join(lines)


def measure(trainers: list[str]) -> dict:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    cases: dict[str, dict] = {}
    for trainer in trainers:
        cases[trainer] = {}
        for case, kill_after, _ in CASES[trainer]:
            verdict = ask(trainer, case, kill_after).verdict
            print(f"{trainer:13} {case:40} {verdict}", *verdict.evidence, sep="\n    ", flush=True)
            cases[trainer][case] = {
                "after": kill_after,
                "status": verdict.status,
                "culprit": verdict.culprit,
                "words": verdict.words,
                "evidence": list(verdict.evidence),
            }
    date = dt.datetime.now(tz=dt.UTC).date().isoformat()
    versions = {name: version(name) for name in ("torch", *CASES)}
    return {"date": date, "python": platform.python_version(), **versions, "cases": cases}


def main() -> None:
    """Ask about the trainers that are named, or all; the others keep their stored answers."""
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    result = measure(sys.argv[1:] or list(CASES))
    result["cases"] = {**stored.get("cases", {}), **result["cases"]}
    RESULTS.mkdir(exist_ok=True)
    STORED.write_text(json.dumps(result, indent=2) + "\n")
    PAGE.write_text(page(result))


if __name__ == "__main__":
    main()
