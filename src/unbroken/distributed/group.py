"""The ranks of a run: they exchange values, agree on them, and fail together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol, TypeVar

from unbroken.store import Json

T = TypeVar("T")


class Group(Protocol):
    """The ranks of one run; all of them make the same calls in the same order.

    A call returns on all ranks or raises on all of them, and never waits longer than the
    timeout of the group. Values are JSON: what comes back is what JSON keeps (tuples are lists,
    keys are strings), on every rank the same, the sender included. Each call has a name, `what`;
    where the calls of ranks differ, the error has both names.

    Once a call has raised for an answer that did not come, the ranks can no longer be in step:
    all later calls raise the same error, and only `close` is left to do.

    Attributes:
        rank: The number of this process, from 0.
        world_size: How many ranks there are.
        local_rank: The number of this process on its machine, from 0.

    Example:
        >>> from unbroken.distributed import join
        >>> group = join()  # torchrun did not start this process: it is alone
        >>> group.rank, group.world_size, group.gather("step", 7)
        (0, 1, [7])
    """

    @property
    def rank(self) -> int: ...  # noqa: D102 - an attribute

    @property
    def world_size(self) -> int: ...  # noqa: D102 - an attribute

    @property
    def local_rank(self) -> int: ...  # noqa: D102 - an attribute

    def gather(self, what: str, value: Json) -> list[Json]:
        """Return the values of all ranks, by rank, on every rank.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: `ranks` have left the group, or made another call.
        """
        ...

    def broadcast(self, what: str, value: Json = None) -> Json:
        """Return the value of rank 0 on every rank; those of the others are not looked at.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: `ranks` have left the group, or made another call.
        """
        ...

    def agree(self, what: str, value: Json) -> None:
        """Return only if all ranks have the same value.

        Same is the same JSON text: 1, 1.0 and True are three values.

        Raises:
            RankError: `ranks` have another value than most; on every rank, with all values.
                Of values that are mappings only the part that differs is shown.
            RankTimeoutError: `ranks` did not answer in time.
        """
        ...

    def run_on_all(self, what: str, action: Callable[[], T]) -> T:
        """Run an action on every rank and return its own result, if it succeeded on all ranks.

        Raises:
            RankError: The action failed on `ranks`; the message is the lowest one's. A rank on
                which it failed raises its own error instead.
            RankTimeoutError: `ranks` did not answer in time.
        """
        ...

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; cheap enough for once a step.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: `ranks` have left the group, or made another call.
        """
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums over the ranks of each value, as float64.

        They are added in the order of the ranks: the same bits on all ranks and in every run.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: `ranks` have left the group, made another call, or gave more or fewer
                values than the others.
        """
        ...

    def new_subgroup(self) -> Group:
        """Return a group of the same ranks for another thread; all ranks make it.

        Its calls and those of this group never meet: each keeps its own order. It is to be
        closed before this one is.
        """
        ...

    def close(self) -> None:
        """Leave the group; closing twice is allowed. Ranks that wait for it get an error."""
        ...


# A run of one process, which has nobody to ask.


class SingleProcess:
    """The group of one process, without `torch.distributed`; never waits.

    Example:
        >>> SingleProcess().sum([0.5, 2])
        [0.5, 2.0]
    """

    rank: ClassVar[int] = 0
    world_size: ClassVar[int] = 1
    local_rank: ClassVar[int] = 0

    def gather(self, what: str, value: Json) -> list[Json]:
        """Return the value, as JSON keeps it."""
        return [json.loads(json.dumps(value))]

    def broadcast(self, what: str, value: Json = None) -> Json:
        """Return the value, as JSON keeps it."""
        return self.gather(what, value)[0]

    def agree(self, what: str, value: Json) -> None:
        """Agree with itself."""
        self.gather(what, value)

    def run_on_all(self, what: str, action: Callable[[], T]) -> T:
        """Run the action."""
        return action()

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return bool(flag)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values, as float64."""
        return [float(value) for value in values]

    def new_subgroup(self) -> SingleProcess:
        """Return another one that is alone."""
        return SingleProcess()

    def close(self) -> None:
        """Do nothing: there is no group to leave."""
