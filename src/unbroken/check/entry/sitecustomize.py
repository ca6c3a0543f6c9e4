"""Python imports this file at its start when its folder is on PYTHONPATH: the recorder's way in.

`unbroken check` puts it there for the script and for every process that the script starts. It
loads the recorder by its path, so that `unbroken` itself need not be installed for the
interpreter of the script; then it hands over to the `sitecustomize` that would have been imported
without it. Without the variable UNBROKEN_CHECK_PLAN it does nothing.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

_HERE = os.path.dirname(os.path.abspath(__file__))
_RECORDER = "_unbroken_recorder"


def _enter(plan: str) -> None:
    folder = os.path.join(os.path.dirname(os.path.dirname(_HERE)), "recorder")
    spec = spec_from_file_location(
        _RECORDER, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if spec is not None and _RECORDER not in sys.modules:
        _load(spec, _RECORDER).enter(plan)


def _hand_over() -> None:
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    spec = PathFinder.find_spec("sitecustomize", sys.path)
    if spec is not None:
        _load(spec, "sitecustomize")


def _load(spec: ModuleSpec, name: str) -> ModuleType:
    module = module_from_spec(spec)
    sys.modules[name] = module
    if spec.loader is not None:
        spec.loader.exec_module(module)
    return module


if "UNBROKEN_CHECK_PLAN" in os.environ and __name__ == "sitecustomize":
    _enter(os.environ["UNBROKEN_CHECK_PLAN"])
    _hand_over()
