"""`unbroken show`: what a run, or one checkpoint of it, is."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from rich.console import Console

from unbroken.cli.ls import lineage_of, origin_of
from unbroken.cli.run_paths import RunPath, best_step_of, is_pinned, open_run_path
from unbroken.cli.tables import (
    date_text,
    make_console,
    make_facts,
    make_table,
    print_json,
    print_table,
    size_text,
    value_text,
)
from unbroken.errors import CheckpointError
from unbroken.store import CheckpointReader, Json, Manifest, RunDirectory


@dataclass(frozen=True)
class RunSummary:
    """All that `show` prints.

    Attributes:
        run_path: What the path named.
        reader: The checkpoint; None if the run has none that can be opened.
        skipped: Newer checkpoints that cannot be opened, and why.
        metrics: The newest record of each kind: with a training loss, with evaluation metrics.
        history: Every record of history.jsonl.
    """

    run_path: RunPath
    reader: CheckpointReader | None
    skipped: dict[str, str]
    metrics: list[dict[str, Json]]
    history: list[dict[str, Json]]


def print_run(path: str, *, with_history: bool, as_json: bool) -> int:
    """Print the summary of the run or checkpoint that a path names.

    Raises:
        CheckpointError: The path names a checkpoint that cannot be opened.
        RunDirectoryError: The path names no run and no checkpoint.
    """
    summary = _read(open_run_path(path))
    if as_json:
        print_json(_as_json(summary, with_history=with_history))
    else:
        _print(summary, with_history=with_history)
    return 0


def _read(run_path: RunPath) -> RunSummary:
    skipped: dict[str, str] = {}
    reader = None
    for folder in reversed(run_path.folders):
        try:
            reader = run_path.open(folder)
            break
        except CheckpointError as error:
            if run_path.folder is not None:
                raise
            skipped[folder] = f"cannot be opened: {str(error).removeprefix(f'{folder}: ')}"
    if run_path.run is None:
        return RunSummary(run_path, reader, skipped, [], [])
    upto = None if run_path.folder is None or reader is None else reader.step
    metrics = _newest_metrics(run_path.run.metrics.records(), upto)
    return RunSummary(run_path, reader, skipped, metrics, list(run_path.run.history.records()))


def _newest_metrics(records: Iterable[dict[str, Json]], upto: int | None) -> list[dict[str, Json]]:
    """Return the newest record with a loss and the newest of an evaluation, up to a step."""
    newest: dict[str, dict[str, Json]] = {}
    for record in records:
        step = record.get("step")
        if upto is None or (isinstance(step, int) and step <= upto):
            newest["training" if "loss" in record else "evaluation"] = record
    return list(newest.values())


def _print(summary: RunSummary, *, with_history: bool) -> None:
    console = make_console()
    print_table(console, make_facts(_identity(summary)))
    if summary.reader is not None:
        manifest = summary.reader.manifest
        for title in ("progress", "config", "environment"):
            _print_facts(console, title, manifest.facts.get(title))
        _print_files(console, manifest)
    for record in summary.metrics:
        _print_facts(console, "last evaluation" if "loss" not in record else "last metrics", record)
    if with_history:
        _print_history(console, summary.history)


def _identity(summary: RunSummary) -> dict[str, str]:
    run_path, run = summary.run_path, summary.run_path.run
    facts = {"path": str(run_path.path)}
    if run is not None:
        facts |= {"run": run.run_id, "begun": date_text(run.created)}
        origin = origin_of(run_path)
        facts |= {} if origin is None else {"branch of": origin}
        facts["checkpoints"] = str(len(run.catalog.folders()))
        starts = [record for record in summary.history if record.get("event") == "started"]
        facts["segments"] = str(len(starts))
        facts |= _resumes(summary.history)
        cadence = _cadence(summary)
        facts |= {} if cadence is None else {"cadence": str(cadence.get("text"))}
    if summary.reader is None:
        return {**facts, "checkpoint": "none yet" if not summary.skipped else "none can be opened"}
    return facts | _checkpoint_identity(summary, summary.reader) | summary.skipped


def _resumes(history: Iterable[Mapping[str, Json]]) -> dict[str, str]:
    """Return how many resumes there were, and whether repeated steps were the same."""
    resumes, same, differing = 0, 0, []
    for record in history:
        if record.get("event") == "started" and record.get("checkpoint") is not None:
            resumes += 1
        elif record.get("event") != "repeated":
            continue
        elif record.get("same") is True and "parts" not in record:  # else only those were compared
            first, last = record.get("from"), record.get("to")
            same += last - first + 1 if isinstance(first, int) and isinstance(last, int) else 0
        elif record.get("same") is False:
            differing.append(str(record.get("step")))
    if not resumes:
        return {}
    steps = "no repeated steps were compared"
    if same:
        steps = f"{same} repeated steps, all with the same bits"
    if differing:
        steps = f"{same} repeated steps with the same bits; others from step {', '.join(differing)}"
    return {"resumes": f"{resumes}; {steps}"}


def _cadence(summary: RunSummary) -> Mapping[str, Json] | None:
    """Return how often the run was saved by itself, as its last record says."""
    recorded = [record["cadence"] for record in summary.history if "cadence" in record]
    return recorded[-1] if recorded and isinstance(recorded[-1], Mapping) else None


def _checkpoint_identity(summary: RunSummary, reader: CheckpointReader) -> dict[str, str]:
    manifest = reader.manifest
    marks = [mark for mark, is_set in _marks(summary, reader).items() if is_set]
    return {
        "checkpoint": ", ".join([reader.folder, *marks]),
        "step": str(manifest.step),
        "saved": date_text(manifest.created),
        "size": f"{size_text(manifest.nbytes)} in {len(manifest.tensors)} tensors",
        "format": f"version {manifest.version}",
        "state digest": manifest.state_digest,
        **_covers(manifest),
        **_not_judged(manifest),
    }


def _covers(manifest: Manifest) -> dict[str, str]:
    """Return what a checkpoint holds, and what its training had that it does not hold."""
    stored = manifest.facts.get("covers")
    covers = stored if isinstance(stored, Mapping) else {}
    seen = manifest.facts.get("not_given")
    lacks = [one.get("path") for one in seen if isinstance(one, Mapping)] if _is_list(seen) else []
    prints = manifest.facts.get("fingerprint")
    data = prints.get("data") if isinstance(prints, Mapping) else None
    if isinstance(data, Mapping) and data.get("repeatable") is False:
        lacks.append("data.repeatable")
    held = [f"{name} ({kind})" for name, kind in covers.items()]
    rows = {"covers": ", ".join([*held, "random generators"] if held else [])}
    rows["not covered"] = ", ".join(map(str, lacks))
    return {name: text for name, text in rows.items() if text}


def _is_list(fact: Json) -> TypeGuard[list[Json]]:
    return isinstance(fact, list)


def _not_judged(manifest: Manifest) -> dict[str, str]:
    """Return what training may depend on and a save could not judge, in one line."""
    found = manifest.facts.get("not_judged")
    if not isinstance(found, Mapping) or not found:
        return {}
    return {"not judged": "; ".join(f"{path} ({why})" for path, why in found.items())}


def _marks(summary: RunSummary, reader: CheckpointReader) -> dict[str, bool]:
    whole = RunPath(summary.run_path.path, summary.run_path.run)
    return {"best": best_step_of(whole) == reader.step, "pinned": is_pinned(reader)}


def _print_facts(console: Console, title: str, facts: Json) -> None:
    if isinstance(facts, Mapping) and facts:
        console.print(f"\n{title}", style="bold")
        known = {name: value for name, value in facts.items() if value is not None}
        unset = {} if title == "environment" else facts  # of many variables few are ever set
        texts = {name: value_text(value) for name, value in {**unset, **known}.items()}
        print_table(console, make_facts(texts))


def _print_files(console: Console, manifest: Manifest) -> None:
    console.print("\nfiles", style="bold")
    rows = [
        (file.name, size_text(file.nbytes), str(sum(r.path is not None for r in file.regions)))
        for file in manifest.files
    ]
    print_table(console, make_table(("file", "size", "tensors"), rows, ("size", "tensors")))


def _print_history(console: Console, records: Iterable[Mapping[str, Any]]) -> None:
    """Print the segments: how each start began, what it saved, how it ended."""
    console.print("\nhistory", style="bold")
    number, saved = 0, _Saved(console)
    for record in records:
        event = record.get("event")
        if event == "saved":
            saved.steps.append(str(record.get("step")))
            continue
        saved.print()
        number += event == "started"
        console.print("\n".join(_lines_of(number, record)))
    saved.print()


def _lines_of(number: int, record: Mapping[str, Any]) -> list[str]:
    """Return a record in words; as it stands where no version writes one like it."""
    event = record.get("event")
    if not isinstance(event, str) or not _is_as_written(record):
        return [f"   {value_text(dict(record))}"]
    if event == "started":
        return _start_lines(number, record)
    if event == "branched":
        parent = record.get("parent") or {}
        return [f"branched from run {parent.get('id')} at step {parent.get('step')}"]
    if event == "given up":
        modified = ", ".join(map(str, record.get("edited") or []))
        return [f"   gave up step {record.get('step')}: changed while copied: {modified}"]
    if event == "repeated":
        return [f"   {_repeated(record)}"]
    if event == "compared" and isinstance(same := record.get("same"), list):
        return [f"   as at the stop: {' and '.join(map(str, same))}"]
    if event == "failed":
        return [f"   failed: {record.get('by')}"]
    if event == "stopped":
        return [f"   stopped by {record.get('by')} after step {record.get('step')}"]
    return [f"   {value_text(dict(record))}"]


def _repeated(record: Mapping[str, Any]) -> str:
    if record.get("same") is True:
        parts = record.get("parts", "bits")
        return f"steps {record.get('from')} to {record.get('to')} repeated with the same {parts}"
    return str(record.get("words"))


def _is_as_written(record: Mapping[str, Any]) -> bool:
    """Return whether what is to be walked through can be; files are edited by hand, too."""
    lists = [record.get(name) or [] for name in ("rejected", "set_aside", "notes", "edited")]
    if not all(isinstance(one, list) for one in lists):
        return False
    parts = [record.get("parent") or {}, *lists[0], *lists[1]]
    return all(isinstance(one, Mapping) for one in parts)


class _Saved:
    """Gathers the saves of a segment into one line."""

    def __init__(self, console: Console) -> None:
        self.steps: deque[str] = deque()
        self._console = console

    def print(self) -> None:
        """Print and forget what was gathered."""
        if self.steps:
            self._console.print(f"   saved at step {', '.join(self.steps)}")
            self.steps.clear()


def _start_lines(number: int, record: Mapping[str, Any]) -> list[str]:
    source = record.get("checkpoint")
    begin = "at the beginning" if source is None else f"from {source}"
    lines = [f"{number}. started {begin} (step {record.get('step')})"]
    lines += [
        f"   not used: {item.get('checkpoint')}: {item.get('reason')}"
        for item in record.get("rejected") or []
    ]
    lines += [
        f"   set aside: {item.get('from')} is now {item.get('to')}"
        for item in record.get("set_aside") or []
    ]
    if record.get("previous_owner"):
        lines.append(f"   took over from a process that died: {record['previous_owner']}")
    return lines + [f"   {note}" for note in record.get("notes") or []]


def _as_json(summary: RunSummary, *, with_history: bool) -> dict[str, object]:
    run, reader = summary.run_path.run, summary.reader
    document: dict[str, object] = {
        "path": str(summary.run_path.path),
        "run": None if run is None else _run_json(summary, run),
        "checkpoint": None if reader is None else _checkpoint_json(summary, reader),
        "unreadable": summary.skipped,
        "metrics": summary.metrics,
    }
    return {**document, "history": summary.history} if with_history else document


def _run_json(summary: RunSummary, run: RunDirectory) -> dict[str, object]:
    lineage = lineage_of(summary.run_path)
    parent = None if lineage is None else lineage.to_json()
    cadence = _cadence(summary)
    return {"id": run.run_id, "created": run.created, "parent": parent, "cadence": cadence}


def _checkpoint_json(summary: RunSummary, reader: CheckpointReader) -> dict[str, object]:
    manifest = reader.manifest
    return {
        "folder": reader.folder,
        "step": manifest.step,
        "created": manifest.created,
        "version": manifest.version,
        "nbytes": manifest.nbytes,
        "state_digest": manifest.state_digest,
        "tensors": len(manifest.tensors),
        **_marks(summary, reader),
        "facts": manifest.facts,
        "files": [{"name": file.name, "nbytes": file.nbytes} for file in manifest.files],
    }
