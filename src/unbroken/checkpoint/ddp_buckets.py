"""The order in which `DistributedDataParallel` adds gradients, brought back by a resume.

It lays its buckets out anew after the first backward pass of a process, in the order in which the
gradients came. A ring adds each part of a bucket in an order of its own: so on more than two ranks
a process that resumes, whose buckets have the first layout again, would round in another order.
A checkpoint holds the layout; a resume makes the reducer of the module anew, with the parameters
in that order, and lets it lay its buckets out by it. Nothing of the user's is called for this: no
forward pass, no hook.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel as Ddp
from torch.utils.hooks import RemovableHandle

from unbroken.capture import named_objects
from unbroken.changes.differences import Difference, Rule, compare
from unbroken.distributed import Group

# ruff: noqa: SLF001 (PyTorch has no public names for any of this)


BUCKETS_KEY = "ddp"
"""Where the facts of a checkpoint hold what `DdpBuckets.facts` returns."""

_TWO = 2  # numbers have one sum, in whatever order
_OTHER: Rule = ("equivalent", "sums over the ranks are rounded in another order")
_TRIES = 4  # times that modules are looked for while there are none: twice a save
_NO_GROUP = "the Checkpointer does not know the ranks: ranks=join()"
_OLD = "the checkpoint does not hold how DistributedDataParallel has laid out its buckets"
_STATE = "{} keeps a state of its own, which no checkpoint holds"


class DdpBuckets:
    """What a run knows of the buckets of each `DistributedDataParallel` that trains its objects.

    Args:
        objects: What is saved, by name.
        group: The ranks that save and resume together.
        tell: Called with what is found after the resume, before the first step; may raise.
    """

    def __init__(
        self,
        objects: Mapping[str, object],
        group: Group,
        tell: Callable[[tuple[Difference, ...]], object],
    ) -> None:
        self._objects = objects
        self._group = group
        self._tell = tell
        self._known: WeakSet[Ddp] = WeakSet()
        self._orders: WeakKeyDictionary[Ddp, str] = WeakKeyDictionary()
        self._waiting: dict[str, Any] = {}  # what a checkpoint holds of those not built yet
        self._tries = _TRIES
        self._hook: RemovableHandle | None = None

    def facts(self) -> dict[str, Any]:
        """Return what a checkpoint is to hold; all ranks call this, where no pass is running."""
        if _ranks() == 1:
            return {}
        modules = self._found()
        self._lay_out(modules)
        entries = {name: self._entry(ddp) for name, ddp in modules.items()}
        return {BUCKETS_KEY: {**self._waiting, **entries}}

    def differences(self, stored: Mapping[str, Any]) -> tuple[Difference, ...]:
        """Return why sums will not be rounded as in the run that made a checkpoint.

        Args:
            stored: The facts of the checkpoint.
        """
        if _ranks() == 1:
            return ()
        self._look()
        modules, entries = self._modules(), stored.get(BUCKETS_KEY)
        if not isinstance(entries, Mapping):
            return tuple(
                _lost(n, "not known", _OLD) for n, ddp in modules.items() if _is_summed(ddp)
            )
        return (*self._all_differing(modules, entries), *self.uncovered())

    def uncovered(self) -> tuple[Difference, ...]:
        """Return what no checkpoint of this run holds."""
        modules = self._found() if _ranks() > 1 else {}
        return tuple(
            Difference(
                f"{BUCKETS_KEY}.{name}.comm_hook", None, None, _STATE.format(hook), "not covered"
            )
            for name, ddp in modules.items()
            for hook in _hooks(ddp, with_state=True)
        )

    def buffers_of_rank_0(self) -> set[tuple[int, int]]:
        """Return where buffers lie that every forward pass takes from rank 0, and copies of them.

        An average of a model in DDP copies its buffers on each rank, too.
        """
        if not any(ddp.broadcast_buffers for ddp in self._modules().values()):
            return set()
        modules = [one for _, one in named_objects(self._objects) if isinstance(one, nn.Module)]
        return {(b.data_ptr(), b.nbytes) for one in modules for b in one.buffers()}

    def bring_back(self, stored: Mapping[str, Any]) -> None:
        """Lay buckets out as they were, now or when a module is built; all ranks call this.

        Args:
            stored: The facts of the checkpoint that was resumed.
        """
        if _ranks() == 1:
            return
        entries = stored.get(BUCKETS_KEY)
        self._waiting = dict(entries) if isinstance(entries, Mapping) else {}
        self._look()
        self._bring_back(self._modules())
        if self._hook is None:
            self._hook = register_module_module_registration_hook(_announcing(ref(self)))

    def _bring_back(self, modules: Mapping[str, Ddp]) -> None:
        here = {name: self._waiting.pop(name) for name in modules if name in self._waiting}
        to_do = {n: one["order"] for n, one in here.items() if self._is_to_do(modules[n], one)}
        if to_do:
            self._group.agree("the buckets of DistributedDataParallel", to_do)
        for name, order in to_do.items():
            _make_reducer_anew(modules[name], order)
            self._orders.pop(modules[name], None)
            if order is not None:
                self._orders[modules[name]] = order

    def is_built(self, ddp: Ddp) -> bool:
        """Take note of a module; return whether its first forward pass is to be told."""
        self._known.add(ddp)
        return any(entry["ranks"] > _TWO for entry in self._waiting.values())

    def are_used(self) -> None:
        """Bring back the buckets of what was built after the resume; all ranks call this."""
        modules = self._modules()
        reported = [
            self._differing(n, self._waiting[n], d)
            for n, d in modules.items()
            if n in self._waiting
        ]
        self._tell((*(one for differing in reported for one in differing), *self.uncovered()))
        self._bring_back(modules)

    def close(self) -> None:
        """Look out for modules no longer."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook.remove()

    def _found(self) -> dict[str, Ddp]:
        if not self._known and self._tries > 0:
            self._tries -= 1
            self._look()
        return self._modules()

    def _look(self) -> None:
        """Find the modules that exist: a wrapper cannot be reached from what is inside of it."""
        # issubclass is too slow here: it asks Ddp's abstract base, 300,000 times
        found = [one for one in gc.get_objects() if Ddp in type(one).__mro__]
        self._known.update(found)
        if len({id(ddp.module) for ddp in found}) < len(found):
            found.clear()
            gc.collect()  # those that nobody has any longer

    def _modules(self) -> dict[str, Ddp]:
        """Return those that train the objects, under the names of the objects."""
        wrappers: dict[int, list[Ddp]] = {}
        for ddp in [one for one in self._known if hasattr(one, "_comm_hooks")]:  # whole ones
            for parameter in ddp.module.parameters():
                wrappers.setdefault(id(parameter), []).append(ddp)
        found: dict[str, Ddp] = {}
        for name, value in named_objects(self._objects) if wrappers else ():
            own = [wrappers[id(p)] for p in _parameters(value) if id(p) in wrappers]
            one_each = dict.fromkeys(_the_one(candidates, value) for candidates in own)
            new = [ddp for ddp in one_each if ddp is not None and ddp not in found.values()]
            found |= {f"{name}.{i}" if i else name: ddp for i, ddp in enumerate(new)}
        return found

    def _lay_out(self, modules: Mapping[str, Ddp]) -> None:
        """Let modules whose first backward pass has been lay out their buckets now."""
        if self._group.world_size <= _TWO:
            return
        waiting = {
            name: ddp for name, ddp in modules.items() if _is_summed(ddp) and not _is_laid_out(ddp)
        }
        if waiting:
            self._group.agree("what is in DistributedDataParallel", list(waiting))
        for ddp in waiting.values():
            ddp._has_rebuilt_buckets = ddp.reducer._rebuild_buckets()

    def _entry(self, ddp: Ddp) -> dict[str, Any]:
        if ddp not in self._orders and _is_summed(ddp) and _is_laid_out(ddp):
            self._orders[ddp] = _order(ddp)
        return {
            "ranks": ddp.process_group.size(),
            "order": self._orders.get(ddp),
            "why_not": self._why_not(ddp),
            **_settings(ddp),
        }

    def _why_not(self, ddp: Ddp) -> str | None:
        """Return why a checkpoint of this moment does not hold the order."""
        if not _is_summed(ddp) or ddp in self._orders:
            return None
        if self._group.world_size == 1:
            return _NO_GROUP
        if getattr(ddp, "_static_graph_delay_allreduce_enqueued", False):
            return "saved after the first step of a static graph, whose order the second one shows"
        return None

    def _is_to_do(self, ddp: Ddp, entry: Mapping[str, Any]) -> bool:
        """Return whether the buckets are not, and can be, laid out as an entry says."""
        if not _is_summed(ddp) or self._cannot(ddp, entry):
            return False
        order = entry["order"]
        return _is_laid_out(ddp) if order is None else self._orders.get(ddp) != order

    def _cannot(self, ddp: Ddp, entry: Mapping[str, Any]) -> str | None:
        """Return why the buckets cannot be laid out as an entry says."""
        if entry["why_not"] is not None:
            return str(entry["why_not"])
        if self._group.world_size == 1:
            return _NO_GROUP
        if entry["order"] is None:
            return None
        if ddp.mixed_precision is not None:
            return "DistributedDataParallel has mixed precision of its own"
        if not _hooks(ddp) and _logged(ddp, "comm_hook"):
            return "a communication hook of PyTorch's own cannot be moved to new buckets"
        if sorted(_numbers(entry["order"])) != list(range(len(_summed(ddp)))):
            return "other parameters are trained"
        return None

    def _all_differing(
        self, modules: Mapping[str, Ddp], entries: Mapping[str, Any]
    ) -> Iterator[Difference]:
        for name, ddp in modules.items():
            if name in entries:
                yield from self._differing(name, entries[name], ddp)

    def _differing(self, name: str, entry: Mapping[str, Any], ddp: Ddp) -> Iterator[Difference]:
        ranks = ddp.process_group.size()
        if ranks <= _TWO or entry["ranks"] != ranks:
            return  # that the ranks are others is told by itself
        now = _settings(ddp)
        for one in compare(entry, now, dict.fromkeys(now, _OTHER)):
            yield replace(one, path=f"{BUCKETS_KEY}.{name}.{one.path}")
        reason = self._cannot(ddp, entry) if _is_summed(ddp) else None
        if reason is not None:
            yield _lost(name, "the checkpoint's", reason)


def _announcing(buckets: ref[DdpBuckets]) -> Callable[[nn.Module, str, nn.Module | None], None]:
    """Return a hook that tells of each module that is built, and of its first forward pass."""
    handles: list[RemovableHandle] = []

    def is_registered(parent: nn.Module, name: str, _: nn.Module | None) -> None:
        there = buckets()
        if there is None or not isinstance(parent, Ddp) or name != "module":
            return
        if there.is_built(parent):
            handles.append(parent.register_forward_pre_hook(is_called))

    def is_called(ddp: nn.Module, _: object) -> None:
        there = buckets()
        if there is not None and torch.is_grad_enabled():
            while handles:
                handles.pop().remove()
            there.are_used()

    return is_registered


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _parameters(value: object) -> Iterator[nn.Parameter]:
    return value.parameters() if isinstance(value, nn.Module) else iter(())


def _the_one(wrappers: list[Ddp], given: object) -> Ddp | None:
    """Return the wrapper that trains a parameter; of two the one that was given, if any."""
    if len(wrappers) == 1:
        return wrappers[0]
    return next((ddp for ddp in wrappers if ddp is given), None)


def _is_summed(ddp: Ddp) -> bool:
    """Return whether the layout decides how sums are rounded, and changes after the first pass."""
    lays_out = ddp.static_graph or not ddp.find_unused_parameters
    has_own = hasattr(ddp, "reducer") and not ddp._use_python_reducer
    return lays_out and has_own and ddp.process_group.size() > _TWO


def _is_laid_out(ddp: Ddp) -> bool:
    return bool(ddp._has_rebuilt_buckets)


def _settings(ddp: Ddp) -> dict[str, Any]:
    caps = getattr(ddp, "bucket_bytes_cap_list", None) or [ddp.bucket_bytes_cap]
    return {
        "find_unused_parameters": ddp.find_unused_parameters,
        "static_graph": ddp.static_graph,
        "bucket_bytes": list(caps),
        "comm_hook": ", ".join(_hooks(ddp)) or None,
    }


def _hooks(ddp: Ddp, *, with_state: bool = False) -> list[str]:
    """Return the names of communication hooks."""
    return [
        str(getattr(hook, "__qualname__", type(hook).__qualname__))
        for hook, state in getattr(ddp, "_comm_hooks", ())
        if not with_state or not (state is None or isinstance(state, dist.ProcessGroup))
    ]


def _lost(name: str, stored: str, reason: str) -> Difference:
    effect = f"{_OTHER[1]}: {reason}"
    return Difference(
        f"{BUCKETS_KEY}.{name}.order", stored, "that of a new process", effect, "equivalent"
    )


def _summed(ddp: Any) -> list[nn.Parameter]:
    """Return the parameters whose gradients are added, in the order of their numbers."""
    parameters, _ = ddp._build_params_for_reducer()
    return list(parameters)


def _logged(ddp: Any, name: str) -> str | None:
    """Return what is known of a module; much only after its tenth step or never."""
    value: str | None = ddp._get_ddp_logging_data().get(name)
    return value


def _order(ddp: Any) -> str:
    """Return the numbers of the parameters, bucket by bucket: "1 0, 3 2"."""
    known = _logged(ddp, "rebuilt_per_bucket_param_indices")
    if known:
        return known
    numbers = {id(p): str(i) for i, p in enumerate(_summed(ddp))}
    buckets = ddp.reducer._get_zeros_like_grad_buckets()
    return ", ".join(" ".join(numbers[id(p)] for p in one.parameters()) for one in buckets)


def _numbers(order: str) -> list[int]:
    return [int(number) for number in order.replace(",", " ").split()]


def _make_reducer_anew(ddp: Any, order: str | None) -> None:
    """Give a module a reducer that lays its buckets out in an order; None: in the first one."""
    parameters, sparse = ddp._build_params_for_reducer()
    numbers = range(len(parameters)) if order is None else _numbers(order)
    parameters, sparse = [parameters[i] for i in numbers], [sparse[i] for i in numbers]
    ddp.reducer._remove_autograd_hooks()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    if ddp.static_graph:
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
        ddp._static_graph_delay_allreduce_enqueued = False
    for hook, state in ddp._comm_hooks:
        torch._C._distributed_c10d._register_comm_hook(ddp.reducer, state, hook)
    if order is not None:
        ddp.reducer._push_all_rebuilt_params()
        ddp.reducer._rebuild_buckets()
    ddp._has_rebuilt_buckets = order is not None
