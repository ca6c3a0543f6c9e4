"""Every N-th step is run twice and compared; weights and moments are, while nothing writes them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from unbroken.capture import named_parameters, unwrapped
from unbroken.checkpoint.coverage.owners import Known
from unbroken.distributed import Group
from unbroken.errors import ConfigError, StepVerificationError
from unbroken.verification.pass_record import Entry, PassRecord, recording
from unbroken.verification.pass_state import PassState, has_lazy_parts
from unbroken.verification.resting import MemoryChange, RestingTensors, weights_and_moments

Pass = Callable[[], Tensor | None]
"""Runs the forward and backward of a step; returns its loss."""

_HINT = (
    "a bit flipped in memory or in a computation{kernels}; nothing of this step was saved: the "
    "same command goes on from the last checkpoint. Where it comes again, test the machine"
)
_KERNELS = ", or a kernel is not deterministic (set full_determinism=True)"
_BY_DATA = (
    "a bit flipped in memory; the same command goes on from the last checkpoint. Code that writes "
    "weights on purpose is known as such under torch.no_grad(), and not through `.data`"
)


@dataclass(frozen=True)
class Subject:
    """What is verified in a step.

    Attributes:
        model: As it is called.
        optimizer: Its parameters and its state rest between two steps.
        objects: Further objects that a pass may change: the loss, callbacks, a trainer.
        has_user_code: Whether code of the user's runs between two steps.
        is_deterministic: Whether only deterministic kernels are used.
        unobserved: Opens a scope in which whatever looks at the training sees nothing.
    """

    model: nn.Module
    optimizer: Optimizer
    objects: Mapping[str, object]
    has_user_code: bool
    is_deterministic: bool
    unobserved: Callable[[], AbstractContextManager[None]]

    def parameters(self) -> dict[str, Tensor]:
        """Return all parameters of the model, and what else the optimizer trains, each once."""
        found: dict[int, tuple[str, Tensor]] = {}
        for name, parameter in named_parameters(unwrapped(self.model)):
            found.setdefault(id(parameter), (name, parameter))
        for at, group in enumerate(self.optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                found.setdefault(id(parameter), (f"optimizer.{at}.{number}", parameter))
        return dict(found.values())


class StepVerifier:
    """Verifies the steps whose number is a multiple of `every`.

    A pass is run twice from the same state, and both are compared before the optimizer sees a
    gradient. What rests is compared from the end of the step before to the optimizer's step, and
    from there to the beginning of the next step. All ranks come to the same end.

    Args:
        every: Each so manieth step.
        group: The ranks.
        subject: Returns what is verified; called in each verified step.
        tell: Called with a line for the user, where a step could not be verified.

    Attributes:
        is_repeating: Whether a pass is being run again: what it logs was logged.
        is_busy: Whether a step is being verified.
    """

    def __init__(
        self,
        every: int,
        group: Group,
        subject: Callable[[], Subject],
        tell: Callable[[str], None],
    ) -> None:
        if type(every) is not int or every < 1:
            raise ConfigError("verify_steps", expected="a positive number, or None", found=every)
        self._every, self._group, self._subject, self._tell = every, group, subject, tell
        self.is_repeating = self.is_busy = False
        self._resting: RestingTensors | None = None
        self._gradients: RestingTensors | None = None
        self._written: set[str] = set()
        self._known: Known = {}
        self._lines: set[str] = set()
        self._has_stepped = False

    def is_due(self, step: int) -> bool:
        """Return whether a step is verified: the one that makes `step` the number of steps."""
        return step % self._every == 0

    def forget(self) -> None:
        """Forget what rests: it is about to be replaced, by a load."""
        self._resting = None

    # Memory between two steps.

    def step_begins(self, step: int) -> None:
        """Compare what rested since the step before.

        Raises:
            StepVerificationError: Memory changed.
        """
        self._gradients = None
        if not (self.is_due(step) or self.is_due(step - 1)):
            return
        self.compare_resting(step - 1)
        self._resting = self._rest() if self.is_due(step) else None

    def step_ends(self, step: int) -> None:
        """Take the digests of what rests from here on."""
        self._has_stepped = True
        self._resting = self._rest() if self.is_due(step) or self.is_due(step + 1) else None

    def compare_resting(self, step: int) -> None:
        """Compare what rests after a step; before a save, too, so that no flipped bit is saved.

        Raises:
            StepVerificationError: Memory changed.
        """
        if self._resting is None:
            return
        subject, found = self._subject(), self._changes()
        flips = [one for one in found if one.flip is not None or not subject.has_user_code]
        self._tell_of_edits(step, [one.name for one in found if one not in flips])
        what = "memory changed after it, and nothing wrote it"
        rows = self._of_all(step, [0, flips[0].name, str(flips[0])] if flips else None)
        self._raise(step, rows, what, _BY_DATA)

    def _tell_of_edits(self, step: int, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._tell_once(
                f"verify_steps: step {step}: {names[0]}{more} changed after it, by no operation "
                "that PyTorch counts: edits through `.data`, or damage; such are not judged",
                key="edits",
            )

    def _rest(self) -> RestingTensors:
        return RestingTensors(self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        subject = self._subject()
        return weights_and_moments(subject.parameters(), subject.optimizer)

    def _changes(self) -> list[MemoryChange]:
        return [] if self._resting is None else self._resting.changes(self._tensors())

    # A step that is run twice.

    def verify(self, step: int, first: Pass, again: Pass, *, is_last: bool = True) -> None:
        """Run the forward and backward of a step twice, and leave what they leave.

        Args:
            step: Its number.
            first: Runs them as in any other step.
            again: Runs them again, on the same data; all that they change has been put back.
            is_last: Whether the optimizer comes next, and not another part of the step.

        Raises:
            StepVerificationError: They gave other bits, or weights changed meanwhile.
            ConfigError: An optimizer steps inside of them.
        """
        with self._busy():
            self._compare_gradients(step)
            self._verify(step, first, again)
            if not is_last:
                self._gradients = RestingTensors(_gradients_of(self._subject().parameters()))

    def _compare_gradients(self, step: int) -> None:
        resting, self._gradients = self._gradients, None
        if resting is None:
            return
        found = resting.changes(_gradients_of(self._subject().parameters()))
        flips = [one for one in found if one.flip is not None]
        row = [0, flips[0].name, str(flips[0])] if flips else None
        what = "memory changed between two of its backward passes, and nothing wrote it"
        self._raise(step, self._of_all(step, row), what, _BY_DATA)

    def _verify(self, step: int, first: Pass, again: Pass) -> None:
        subject = self._subject()
        parameters, reasons = subject.parameters(), _reasons_before(subject, self._has_stepped)
        if self._group.any(bool(reasons)):
            self._not_verified(step, reasons)
            first()
            return
        state = PassState(
            subject.model,
            parameters,
            subject.optimizer,
            subject.objects,
            self._written,
            self._known,
        )
        compiled = _compilations()
        one = self._recorded(subject, parameters, first)
        _refuse_moved_optimizer(state)
        reasons = state.obstacles()
        if _compilations() != compiled:
            reasons.append("code was compiled in it")
        by_data = [change for change in self._changes() if change.flip is None]
        reasons += [f"it writes {change.name} through .data" for change in by_data]
        self._written |= state.newly_written() | {change.name for change in by_data}
        if self._group.any(bool(reasons)):
            self._not_verified(step, reasons)
            return
        two = self._again(state, subject, parameters, again)
        self._judge(step, subject, one, two, lambda: self._again(state, subject, parameters, again))

    def _judge(
        self,
        step: int,
        subject: Subject,
        one: PassRecord,
        two: PassRecord,
        third: Callable[[], PassRecord],
    ) -> None:
        """Raise where two passes differ, or weights changed; a third pass tells which was odd.

        Of several ranks the one is named that differs first: its fault reaches the others by sums.
        """
        differing = one.differences(two)
        changes = self._changes()
        if not self._group.any(bool(differing or changes)):
            return
        row: Any = None
        if changes:
            row = [0, changes[0].name, f"memory that nothing wrote: {changes[0]}"]
        three = third()
        if differing and not changes:
            entry, third_is = differing[0], _odd_one(one, two, three)
            row = [
                1 + one.position(entry),
                entry.name or entry.kind,
                _sentence(differing, third_is),
            ]
        hint = _HINT.format(kernels="" if subject.is_deterministic else _KERNELS)
        what = "its forward and backward pass gave other bits when it was run again"
        if self._group.world_size == 1 and changes:
            what = "weights changed during its forward and backward pass"
        self._raise(step, self._of_all(step, row), what, hint)

    def _recorded(
        self, subject: Subject, parameters: Mapping[str, Tensor], run: Pass
    ) -> PassRecord:
        with recording(subject.model, parameters) as record:
            loss = run()
        record.add("loss", "", loss)
        record.add_results(parameters, subject.model)
        return record

    def _again(
        self, state: PassState, subject: Subject, parameters: Mapping[str, Tensor], again: Pass
    ) -> PassRecord:
        state.put_back()
        self.is_repeating = True
        try:
            with subject.unobserved():
                return self._recorded(subject, parameters, again)
        finally:
            self.is_repeating = False

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False

    def _not_verified(self, step: int, reasons: Sequence[str]) -> None:
        why = "; ".join(reasons) or "another rank cannot run it again"
        self._tell_once(f"verify_steps: step {step} was not run twice: {why}", key=why)

    def _tell_once(self, line: str, key: str | None = None) -> None:
        if (key or line) not in self._lines:
            self._lines.add(key or line)
            self._tell(line)

    # All ranks raise the same error, or none.

    def _of_all(self, step: int, row: Any) -> list[Any]:
        if self._group.world_size == 1:
            return [row]
        return self._group.gather(f"the verification of step {step}", row)

    def _raise(self, step: int, rows: Sequence[Any], what: str, hint: str) -> None:
        found = [(row[0], rank, row) for rank, row in enumerate(rows) if row is not None]
        if not found:
            return
        _, rank, (_, tensor, sentence) = min(found)
        on_rank = f" on rank {rank}" if len(rows) > 1 else ""
        raise StepVerificationError(
            f"step {step}{on_rank}",
            what,
            found=sentence,
            hint=hint,
            step=step,
            tensor=tensor,
            rank=rank,
        )


def _gradients_of(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"gradient of {n}": p.grad for n, p in parameters.items() if p.grad is not None}


def _reasons_before(subject: Subject, has_stepped: bool) -> list[str]:
    """Return why a step cannot be run twice, as far as that is known before it."""
    found = []
    if has_lazy_parts(subject.model):
        found.append("parameters get their shapes in it")
    if isinstance(subject.model, DistributedDataParallel) and not has_stepped:
        found.append("DistributedDataParallel lays out its buckets in the first step of a process")
    return found


def _refuse_moved_optimizer(state: PassState) -> None:
    if (name := state.moved_optimizer) is not None:
        raise ConfigError(
            "verify_steps",
            f"{name} steps inside of the forward and backward pass, which cannot be run twice then",
            hint="leave verify_steps out",
        )


def _compilations() -> int:
    """Return how often this process has compiled code for a model."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return 0 if dynamo is None else sum(dynamo.counters["frames"].values())


def _odd_one(one: PassRecord, two: PassRecord, three: PassRecord) -> str:
    if not three.differences(one):
        return "a third pass gave the first result again"
    if not three.differences(two):
        return "a third pass gave the second result again"
    return "a third pass gave a third result"


def _sentence(differing: Sequence[Entry], third: str) -> str:
    more = len(differing) - 1
    others = f", and {more} more after it" if more else ""
    return f"another {differing[0]}{others}; {third}"
