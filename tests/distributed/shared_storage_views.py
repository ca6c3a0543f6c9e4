"""Ranks that see the run directory each in their own way.

The run directory is /proc/self/cwd/run: under one path, each process has that of its own current
folder. A rank whose folder has no run in it cannot see the run at all.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from distributed.training import Samples
from unbroken import Checkpointer
from unbroken.capture import capture, encode
from unbroken.checkpoint import RankPolicy
from unbroken.data.keyed_rng import seed_ambient
from unbroken.distributed import join
from unbroken.errors import DataError, UnbrokenError
from unbroken.store.format.canonical_json import Digester
from unbroken.training import NoDisplay, Trainer, TrainerConfig

RUN = "/proc/self/cwd/run"
STEPS = 6


def wide_model() -> nn.Module:
    """A model of two tensors that are worth dividing, and small ones."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 128), nn.Linear(128, 256), nn.Linear(256, 128), nn.Linear(128, 4)
    )


def go_to(folder: str) -> None:
    """Make this the current folder; rank 0 has a run directory in it (/proc cannot be synced)."""
    os.chdir(folder)
    if os.environ["RANK"] == "0":
        os.makedirs("run", exist_ok=True)


def train_there(folder: str, settings: dict) -> None:
    """Train on this rank, from its own folder; leave an error in it.

    The folder may hold a package of its own, as the environment of a machine might.
    """
    go_to(folder)
    if Path("timm.py").exists():
        sys.path.insert(0, folder)
        import timm  # noqa: F401
    config = TrainerConfig(
        **{
            "output_dir": RUN,
            "batch_size": 8,
            "max_steps": STEPS,
            "learning_rate": 0.01,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 2,
            **settings,
        }
    )
    trainer = Trainer(
        wide_model(), config, Samples(), loss_fn=nn.CrossEntropyLoss(), display=NoDisplay()
    )
    try:
        trainer.train()
    except UnbrokenError as error:
        notes = "\n".join(getattr(error, "__notes__", []))
        Path("error").write_text(f"{type(error).__name__}: {error}\n{notes}")
        os._exit(3)


def folders(where: Path, copies: int) -> list[str]:
    """Return a folder for each rank; the run in the first is copied to so many others."""
    made = [where / str(rank) for rank in range(1 + copies)]
    for folder in made[1:]:
        shutil.copytree(made[0], folder)
    return [str(folder) for folder in made]


def flip(run: Path, step: int, path: str) -> None:
    """Change one bit of a tensor."""
    text = (run / f"checkpoint-{step}" / "manifest.json").read_text()
    for file in json.loads(text)["manifest"]["files"]:
        for region in file["regions"]:
            if region.get("path") == path:
                target = run / f"checkpoint-{step}" / file["name"]
                raw = bytearray(target.read_bytes())
                raw[region["offset"] + region["nbytes"] // 2] ^= 1
                target.write_bytes(raw)
                return
    raise KeyError(path)


def starts(run: Path) -> list[dict]:
    events = map(json.loads, (run / "history.jsonl").read_text().splitlines())
    return [event for event in events if event["event"] == "started"]


def everything(objects: dict[str, object]) -> str:
    """Return a digest of the whole state of live objects."""
    encoded = encode(capture(objects))
    digester = Digester()
    digester.update(json.dumps(encoded.structure, sort_keys=True).encode())
    for leaf in encoded.leaves:
        for chunk in leaf.chunks():
            digester.update(chunk)
    return digester.digest()


def objects_of_many_kinds(seed: int) -> dict[str, object]:
    model = wide_model()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    strided = torch.randn(300, 200).t()
    return {"model": model, "optimizer": optimizer, "strided": strided}


def resume_there(folder: str, which: str | int) -> None:
    """Save on all ranks, then resume into other objects; leave what is here then."""
    go_to(folder)
    group = join(timeout=30.0)
    saved = objects_of_many_kinds(1)
    with Checkpointer(
        RUN, ranks=RankPolicy(group=group, read_from="rank0"), **saved
    ) as checkpointer:
        seed_ambient(1)
        checkpointer.save(1, {"numbers": (1, None), "bytes": b"\0" * 100_000})
    others = objects_of_many_kinds(2)
    with Checkpointer(
        RUN, ranks=RankPolicy(group=group, read_from="rank0"), **others
    ) as checkpointer:
        before = everything(others)
        checkpointer.resume(which)
        told = [everything(saved), everything(others), before, repr(checkpointer.values)]
    Path("resumed").write_text(json.dumps(told))
    group.close()
    os._exit(0)


PIECE, PIECES = 8 << 20, 16  # bytes of a tensor, and how many there are


def peak() -> int:
    """Return the most memory that this process ever had, in bytes, since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    sys.exit("no VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure_resume(folder: str, holds_all: bool) -> None:
    """Leave by how much a resume raised the peak of this rank."""
    go_to(folder)
    group = join(timeout=30.0)
    model = nn.ParameterList([torch.full((PIECE // 4,), 1.0 + i) for i in range(PIECES)])
    with Checkpointer(
        RUN, ranks=RankPolicy(group=group, read_from="rank0"), model=model
    ) as checkpointer:
        seed_ambient(1)
        checkpointer.save(1)
        forget_peak()
        before = peak()
        kept = [parameter.clone() for parameter in model] if holds_all else []
        checkpointer.resume("must")
        Path("growth").write_text(str(peak() - before))
    assert len(kept) == (PIECES if holds_all else 0)
    group.close()
    os._exit(0)


class Picky:
    """An object that takes no state on one of the ranks, and says so before it does."""

    def __init__(self, refuses: bool) -> None:
        self._refuses = refuses

    def state_dict(self) -> dict:
        return {"any": 1}

    def check_state_dict(self, state: dict) -> None:
        if self._refuses:
            raise DataError("picky", "takes no state")

    def load_state_dict(self, state: dict) -> None:
        self.check_state_dict(state)


def resume_what_rank_1_refuses(folder: str, read_from: str) -> None:
    """Save and resume; then with an object that refuses on rank 1. Tell what each rank then has."""
    group = join()
    seed_ambient(3)

    def checkpointer(refuses: bool) -> Checkpointer:
        objects = {"model": nn.Linear(2, 1), "picky": Picky(refuses)}
        return Checkpointer(
            f"{folder}/run", ranks=RankPolicy(group=group, read_from=read_from), **objects
        )

    with checkpointer(False) as first:
        nn.init.ones_(first.objects["model"].weight)
        first.save(1)
        first.save(2)
    with checkpointer(group.rank == 1) as second:
        error = None
        try:
            second.resume(1)
        except UnbrokenError as caught:
            error = type(caught).__name__
        weight = second.objects["model"].weight
        told = {"error": error, "changed": bool((weight == 1).all())}
    (Path(folder) / f"told-{group.rank}").write_text(json.dumps(told))
    group.close()


def begin_elsewhere_and_go_on(folder: str, read_from: str, how: str) -> None:
    """Begin a run in a checkpoint of another one, by its path or as a copy, and start it again."""
    group = join()
    seed_ambient(3)

    def saved_at(place: str, which: str, step: int) -> list[object]:
        torch.manual_seed(3)
        model = nn.Linear(2, 1)
        with Checkpointer(
            place, ranks=RankPolicy(group=group, read_from=read_from), model=model
        ) as checkpointer:
            report = checkpointer.resume(which)
            checkpointer.save(step)
        return [report.step, *report.notes]

    old, new = f"{folder}/old", f"{folder}/new"
    saved_at(old, "auto", 8)
    if how == "copy" and group.rank == 0:
        shutil.copytree(f"{old}/checkpoint-8", f"{new}/checkpoint-8")
    group.gather("copied", None)
    which = "auto" if how == "copy" else f"{old}/checkpoint-8"
    told = [saved_at(new, which, step)[0] for step in (10, 12)]
    (Path(folder) / f"told-{group.rank}").write_text(json.dumps(told))
    group.close()
