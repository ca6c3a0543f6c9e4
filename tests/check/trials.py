"""Trying a script: its reference once, then a kill and a resume for each way to break it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from check.recorded_scripts import ScriptServer
from unbroken.check import Verdict
from unbroken.check.isolation import Workspace
from unbroken.check.judge import Kill, Reference, judge_killed, make_reference
from unbroken.check.launch import Launch, launch
from unbroken.check.prove import judge_launch
from unbroken.check.recording import read_recordings
from unbroken.recorder.protocol import RecordPlan

SCRIPTS = Path(__file__).parent / "scripts"
TIMEOUT = 120.0


@dataclass
class Trials:
    """A script, its reference, and the folders that its kills have left.

    Args:
        root: An empty folder.
        script: A file of `scripts`.
        kill_after: The step after which it is killed.
        server: Runs it in a fork; None: as `unbroken check` does, in a fresh interpreter.
        launcher: The words before the script, when there is no server.
        stop_after: End each run after so many steps.
    """

    root: Path
    script: str
    kill_after: int
    server: ScriptServer | None = None
    launcher: Sequence[str] = (sys.executable,)
    stop_after: int | None = None
    count: int = 0
    killed: dict[tuple[str, ...], Workspace] = field(default_factory=dict)
    kept: dict[tuple[str, ...], Reference | Verdict] = field(default_factory=dict)

    def verdict(self, *, broken: Sequence[str] = (), resumed: Sequence[str] = ()) -> Verdict:
        """Return what the check says.

        Args:
            broken: Words for each start of the script.
            resumed: Words for the resume only; the reference and the kill are shared with others.
        """
        reference = self.reference(*broken)
        if isinstance(reference, Verdict):
            return reference
        place = self.place_of_a_copy(self.after_the_kill(reference, *broken))
        param_bytes = max(one.param_bytes for one in reference.ranks.values())
        saved = place.bytes_written_since(0) >= param_bytes // 2
        run = self.launch(place, RecordPlan("", stop_after=self.stop_after), *broken, *resumed)
        return judge_launch(reference, run, Kill(self.kill_after, saved), is_last=True)

    def reference(self, *words: str) -> Reference | Verdict:
        if words not in self.kept:
            plan = RecordPlan("", stop_after=self.stop_after)
            runs = [self.launch(self.new_place(), plan, *words) for _ in range(2)]
            assert [run.status for run in runs] == [0, 0], runs[0].output
            self.kept[words] = make_reference(runs[0].ranks, runs[1].ranks)
        return self.kept[words]

    def after_the_kill(self, reference: Reference, *words: str) -> Workspace:
        """Return what a killed run has left."""
        if words not in self.killed:
            self.killed[words] = self.new_place()
            plan = RecordPlan("", kill_after=self.kill_after)
            run = self.launch(self.killed[words], plan, *words)
            assert run.is_killed, run.output
            assert judge_killed(reference, run.ranks) is None
        return self.killed[words]

    def launch(self, place: Workspace, plan: RecordPlan, *words: str) -> Launch:
        records = self.new_folder("records")
        words = (str(SCRIPTS / self.script), "--out", "{out}", *words)
        if self.server is None:
            plan = replace(plan, folder=str(records), parent=os.getpid())
            return launch([*self.launcher, *words], place, records, plan, TIMEOUT)
        plan = replace(plan, folder=str(records), parent=self.server.pid)
        plan.write(records / "plan.json")
        log = records / "output.log"
        status, seconds = self.server.run_script(
            place.command(words), place.folder, records / "plan.json", log
        )
        output = tuple(log.read_text().splitlines())
        return Launch(status, False, seconds, output, read_recordings(records))

    def place_of_a_copy(self, killed: Workspace) -> Workspace:
        place = self.new_place()
        shutil.copytree(killed.out, place.out, dirs_exist_ok=True)
        return place

    def new_place(self) -> Workspace:
        out = self.new_folder("out")
        return Workspace(self.root, out, (out,))

    def new_folder(self, name: str) -> Path:
        self.count += 1
        folder = self.root / f"{name}-{self.count}"
        folder.mkdir()
        return folder
