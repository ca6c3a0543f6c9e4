"""What a launch of the script means: by how it ended and by what it did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from unbroken.check.alignment import states_before
from unbroken.check.judging import Reference, judge_resumed
from unbroken.check.launching import Launch
from unbroken.check.recorder.plan import state_keys
from unbroken.check.recording import Recording
from unbroken.check.restored_state import Kill
from unbroken.check.verdict import Culprit, Status, Verdict, not_exact, unknown


def states_of(recordings: Iterable[Recording]) -> dict[str, int]:
    """Return at which step each state of the reference stands, for the recorder."""
    table: dict[str, int] = {}
    for recording in recordings:
        for place, (optimizer, state) in enumerate(states_before(recording)):
            if optimizer == recording.steps[0].optimizer:
                for key in state_keys(state.params, state.moments, state.counts):
                    table.setdefault(key, place)
    return table


def failed(run: Launch, culprit: Culprit) -> Verdict:
    """Return what to say of a launch that went wrong by itself."""
    if run.is_timed_out:
        return unknown(Culprit.TIMED_OUT, f"not at its end after {run.seconds:.0f} s (--timeout)")
    return unknown(culprit, f"the script ended with status {run.status}", *run.output)


def not_hit(run: Launch) -> Verdict | None:
    """Return why a run that should have been killed was not."""
    if run.is_killed:
        return None
    if run.is_timed_out or run.status != 0:
        return failed(run, Culprit.SCRIPT_FAILED)
    return unknown(Culprit.NOT_KILLED, "the run came to its end before the kill")


def judge_launch(reference: Reference, run: Launch, kill: Kill, *, is_last: bool) -> Verdict:
    """Return the verdict on one resume: first by what it did, then by how it ended."""
    if run.is_timed_out:
        return failed(run, Culprit.TIMED_OUT)
    if not any(recording.steps for recording in run.ranks.values()):
        if run.status != 0:
            words = f"the resume command failed with status {run.status} before its first step"
            return not_exact(Culprit.RESUME_FAILED, words, *run.output)
        words = f"the resume command ended at once: after step {kill.after} nothing was trained"
        return not_exact(Culprit.NOTHING_TRAINED, words, *run.output)
    verdict = judge_resumed(reference, run.ranks, kill, is_whole=is_last and run.status == 0)
    if verdict.status is Status.EXACT and run.status != 0 and not (run.is_killed and not is_last):
        words = f"the resumed run ended with status {run.status}"
        return not_exact(Culprit.RESUME_FAILED, words, *run.output)
    return verdict


def summary_of(kills: Sequence[tuple[int, Verdict]]) -> Verdict:
    """Return the worst verdict; that nothing was saved before one kill is not the worst."""
    bad = [verdict for _, verdict in kills if verdict.status is Status.NOT_EXACT]
    unsure = [verdict for _, verdict in kills if verdict.status is Status.UNKNOWN]
    exact = [verdict for _, verdict in kills if verdict.status is Status.EXACT]
    if bad:
        return bad[0]
    if unsure and not (exact and all(one.culprit is Culprit.NEVER_SAVED for one in unsure)):
        return unsure[0]
    if unsure:
        note = f"{len(unsure)} of {len(kills)} kills came before the first checkpoint"
        return replace(exact[-1], evidence=(*exact[-1].evidence, note))
    return exact[-1]
