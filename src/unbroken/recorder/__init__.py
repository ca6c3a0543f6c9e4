"""The recorder: sits in a training process, sees every optimizer step, and changes nothing.

It is a package of its own: it imports nothing of `unbroken` (only its own files, by relative
names), so that it can be loaded by path into any interpreter that has torch. What it needs
stands in a plan, what it sees goes to one file of JSON lines for each process (`protocol.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from .protocol import RecordPlan

__all__ = ["enter"]


def enter(path: str) -> None:
    """Wait in this process until torch is imported, then record as the plan at `path` says."""

    def attach() -> None:
        from .recorder import Recorder

        Recorder(RecordPlan.read(path)).attach()

    _after_import("torch", attach)


def _after_import(name: str, then: Callable[[], None]) -> None:
    """Call `then` once, when `name` has been imported; at once if it has been already."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(name, then))


class _Finder(MetaPathFinder):
    """Finds one module as Python would, with another loader; then it is gone."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name = name
        self._then = then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's own spec, wrapped."""
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenLoader(spec.loader, self._then)
        return spec


class _ThenLoader(Loader):
    """The module's own loader, and something after it; it leaves no trace in the module."""

    def __init__(self, inner: Loader, then: Callable[[], None]) -> None:
        self._inner = inner
        self._then = then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module with its own loader in place, then do what was asked."""
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._then()
