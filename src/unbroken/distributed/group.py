"""The ranks of a run: how a process finds the others, exchanges values, and fails with them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import ClassVar, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistNetworkError
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous

from unbroken.distributed.store_group import StoreGroup
from unbroken.errors import ConfigError, RankTimeoutError
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

    def gather(self, what: str, value: Json, *, within: float | None = None) -> list[Json]:
        """Return the values of all ranks, by rank, on every rank.

        Args:
            what: The name of the call.
            value: What this rank gives.
            within: Seconds to wait for the other ranks, where that is less than the timeout.

        Raises:
            RankTimeoutError: `ranks` did not answer in time.
            RankError: `ranks` have left the group, or made another call.
        """
        ...

    def broadcast(self, what: str, value: Json = None) -> Json:
        """Return the value of rank 0 on every rank; the values of the others are ignored.

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

    def gather(self, what: str, value: Json, *, within: float | None = None) -> list[Json]:
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


# How a process finds the other ranks: through what torchrun put into its environment.


_PAUSE = 0.05  # seconds
_TIMEOUT = 600.0  # seconds, as torch waits in a collective of NCCL


def join(*, device_type: str = "cpu", timeout: float = _TIMEOUT) -> Group:
    """Join the other ranks of this run: all of them have joined when it returns.

    The process group of `torch.distributed` is initialised from torchrun's environment (RANK,
    WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), and `Group.close` destroys it. One that is
    there already is used, and left alone.

    Args:
        device_type: "cuda" for NCCL beside gloo, with this rank's GPU made the current one;
            any other for gloo alone.
        timeout: Seconds to wait for the other ranks, here and in each call of the group.

    Returns:
        The group; `SingleProcess` where WORLD_SIZE is 1 or not set.

    Raises:
        ConfigError: The environment names no rank, or is no torchrun's; or there is no GPU for
            this rank.
        RankTimeoutError: Some ranks have not come in time.
        RankError: The process group could not be initialised on another rank.

    Example:
        >>> join()  # doctest: +ELLIPSIS
        <unbroken.distributed.group.SingleProcess object at ...>
    """
    if dist.is_initialized():
        return _over_the_users(timeout)
    if _number("WORLD_SIZE", default=1) == 1:
        return SingleProcess()
    return _initialised(device_type, timeout)


def _over_the_users(timeout: float) -> Group:
    if dist.get_world_size() == 1:
        return SingleProcess()
    group = StoreGroup(
        _own_part(_get_default_store(), dist.get_rank()),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=_number("LOCAL_RANK", default=0),
        timeout=timeout,
        store_on_rank_0=_store_on_rank_0(),
    )
    group.watch()
    return group


def _initialised(device_type: str, timeout: float) -> Group:
    rank, local_rank = _number("RANK"), _number("LOCAL_RANK", default=0)
    store = _own_part(_new_rendezvous(rank, timeout), rank)
    group = StoreGroup(
        PrefixStore("ranks", store),
        rank=rank,
        world_size=_number("WORLD_SIZE"),
        local_rank=local_rank,
        timeout=timeout,
        store_on_rank_0=_store_on_rank_0(),
        on_close=_destroy,
    )

    try:
        # The roll call: it names the ranks that are missing, which gloo could not.
        group.agree("device_type", device_type)
        group.watch()
        if device_type == "cuda":
            group.run_on_all("choose the GPU", lambda: _choose_gpu(local_rank))
        group.run_on_all(
            "initialise the process group", lambda: _start(group, store, device_type, timeout)
        )
    except BaseException:
        group.close()
        raise
    return group


def _choose_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            "LOCAL_RANK",
            "there is no GPU for this rank",
            expected=f"less than {count}",
            found=local_rank,
            hint="start as many ranks as there are GPUs: torchrun --nproc-per-node=gpu",
        )
    torch.cuda.set_device(local_rank)


def _start(group: Group, store: Store, device_type: str, timeout: float) -> None:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        # A part of its own: gloo would take what an earlier process group left for an answer.
        store=PrefixStore("torch", store),
        rank=group.rank,
        world_size=group.world_size,
        timeout=timedelta(seconds=timeout),
    )


def _new_rendezvous(rank: int, timeout: float) -> Store:
    """Return a store that this rank has not joined over yet.

    Where rank 0 holds it, that of an earlier group may still be there for a moment.
    """
    deadline = time.monotonic() + timeout
    while True:
        with suppress(DistNetworkError):  # it went away in this moment
            store = _rendezvous(timeout)
            if not _store_on_rank_0() or store.add(f"unbroken/joins/{rank}", 0) == 0:
                return store
        if time.monotonic() > deadline:
            raise RankTimeoutError("rank 0", f"has not left its old group within {timeout:g} s")
        time.sleep(_PAUSE)


def _rendezvous(timeout: float) -> Store:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ConfigError(name, "is not in the environment", hint="start with torchrun")
    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    except dist.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankTimeoutError(address, f"not all ranks came within {timeout:g} s") from error
    return cast("Store", store)


def _own_part(store: Store, rank: int) -> Store:
    """Return a part of the store that is this group's alone: each rank counts its joins."""
    return PrefixStore(f"unbroken/{store.add(f'unbroken/joins/{rank}', 1)}", store)


def _store_on_rank_0() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, default)
    if text is None or not str(text).isdecimal():
        raise ConfigError(
            name,
            "in the environment",
            expected="a number, as torchrun sets it",
            found=repr(text),
            hint="start with torchrun",
        )
    return int(text)
