"""What each rank of a run sees when one of them fails, differs, leaves, dies or stops."""

from __future__ import annotations

import json
import os
import select
import signal
from pathlib import Path

from distributed.ranks import run_ranks
from unbroken.distributed import join


def endings(folder: Path, *acts, timeout: float = 600.0, **options) -> list[dict | None]:
    """Run one act on each rank; return what each ended with, by rank (None: it did not end).

    With the usual timeout a rank that waits for it is killed at the end of the test, and is None.
    """
    never_end = [rank for rank, act in enumerate(acts) if act is stop_itself]
    arguments = (str(folder), timeout)
    run_ranks(
        _witness, *arguments, of_rank=acts, world_size=len(acts), never_end=never_end, **options
    )
    paths = [folder / f"rank-{rank}.json" for rank in range(len(acts))]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def _witness(act, folder: str, timeout: float) -> None:
    group, result, error = None, None, None
    try:
        group = join(timeout=timeout)
        result = act(group)
    except BaseException as raised:
        error = raised
    finally:
        if group is not None:
            group.close()
    seen = {
        "result": result,
        "error": type(error).__name__ if error is not None else None,
        "message": str(error),
        "ranks": list(getattr(error, "ranks", ())),
    }
    Path(folder, f"rank-{os.environ['RANK']}.json").write_text(json.dumps(seen))


def gather(group):
    return group.gather("loss", group.rank)


def gather_soon(group):
    return group.gather("loss", group.rank, within=1.0)


def vote(group):
    return group.any(False)


def kill_itself(group):
    os.kill(os.getpid(), signal.SIGKILL)


def stop_itself(group):
    os.kill(os.getpid(), signal.SIGSTOP)


def leave(group):
    return "left"


def save(group):
    group.run_on_all("save", lambda: None)


def fail_to_save(group):
    group.run_on_all("save", _full_disk)


def _full_disk():
    raise OSError(28, "No space left on device")


def fail_to_save_as_process(group):
    group.gather("pid", os.getpid())
    fail_to_save(group)


def save_when_rank_0_has_had_a_second_to_end(group):
    rank_0 = os.pidfd_open(group.gather("pid", os.getpid())[0])
    select.select([rank_0], [], [], 1.0)  # ready when it has ended
    save(group)


def be_interrupted_while_saving(group):
    def interrupted():
        raise KeyboardInterrupt

    group.run_on_all("save", interrupted)


def gather_while_saving(group):
    group.run_on_all("save", lambda: group.gather("digests", []))


def fail_before_gathering(group):
    group.run_on_all("save", lambda: (_full_disk(), group.gather("digests", [])))


def go_on_after(act):
    """Return an act that takes the error of another one, and goes on with the group."""
    return _GoOn(act)


class _GoOn:
    def __init__(self, act) -> None:
        self.act = act

    def __call__(self, group):
        try:
            self.act(group)
        except Exception as error:
            return [str(error), group.gather("loss", group.rank)]


class Agree:
    """An act: have this value of the settings."""

    def __init__(self, value) -> None:
        self.value = value

    def __call__(self, group):
        group.agree("settings", self.value)


def broadcast(group):
    return group.broadcast("run")


def gather_something_else(group):
    return group.gather("accuracy", group.rank)


def sum_two(group):
    return group.sum([1, 2])


def sum_three(group):
    return group.sum([1, 2, 3])


def use_after_close(group):
    group.close()
    group.any(True)


class Interrupt:
    """An act of two ranks: rank 1 interrupts rank 0, and answers only after it was interrupted."""

    def __init__(self, folder: Path) -> None:
        self.pipe = folder / "interrupted"
        os.mkfifo(self.pipe)

    def __call__(self, group):
        try:
            pid = group.gather("pid", os.getpid())[0]
            if group.rank == 1:
                os.kill(pid, signal.SIGINT)
                self.pipe.read_text()
            gather(group)
            gather(group)
        except KeyboardInterrupt:
            self.pipe.write_text("")
            raise
