"""What the text of a script says of how it comes to the step where a resumed run goes on.

A loop may bring its own objects there by itself: `for _ in range(report.step): noise.step()`. What
it brings there must not be brought there twice.
"""

from __future__ import annotations

import ast
import linecache
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_SKIPS = re.compile(r"\w*(skip|forward|advance|replay|fast|seek|catch|restor|load)\w*")


@dataclass(frozen=True)
class Replays:
    """What scripts do with the step of a resume.

    Attributes:
        any: Whether something is repeated up to it, or nobody can say.
        counted_from_it: Names of attributes that are added to it: they count steps of a process.
    """

    any: bool
    counted_from_it: frozenset[str] = frozenset()


def replays_in(files: Iterable[str]) -> Replays:
    """Return what these scripts do with the step of a resume, as far as their text shows it.

    Args:
        files: Where they stand, and what they import; the first one calls `resume`.
    """
    scripts = []
    for place, path in enumerate(files):
        try:
            tree = ast.parse("".join(linecache.getlines(path)))
        except (SyntaxError, ValueError):
            return Replays(any=True)
        if not tree.body and place == 0:
            return Replays(any=True)  # there is no text
        scripts.append(_Script(tree))
    names: set[str] = set()
    for script in scripts:
        script.use_functions_of(scripts)
        if any(script.repeats(node) for node in script.nodes):
            return Replays(any=True)
        names |= {name for node in script.nodes for name in script.added_to_the_step(node)}
    return Replays(any=False, counted_from_it=frozenset(names))


class _Script:
    """The text of one file, and the names in it that hold the step of a resume."""

    def __init__(self, tree: ast.Module) -> None:
        self.nodes = [*ast.walk(tree)]
        called = (node.func for node in self.nodes if isinstance(node, ast.Call))
        self._called = {id(one) for one in called}
        self._names: set[str] = set()
        for _ in range(2):  # a name of a name
            self._names |= {name for node in self.nodes for name in self._set_by(node)}
        functions = [node for node in self.nodes if isinstance(node, ast.FunctionDef)]
        self._repeating = {one.name for one in functions if _repeats_by_a_parameter(one)}
        self._setting = {one.name: {*_attributes_set_in(one)} for one in functions}

    def use_functions_of(self, scripts: Iterable[_Script]) -> None:
        """Take note of what functions of other files do: this one may call them."""
        for one in scripts:
            self._repeating |= one._repeating  # noqa: SLF001 (of its own class)
            self._setting = {**one._setting, **self._setting}  # noqa: SLF001

    def _set_by(self, node: ast.AST) -> Iterator[str]:
        """Yield the names that a statement sets to what comes from a resume."""
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            targets = [node.target]
        else:
            return
        if node.value is not None and self._is_of_a_resume(node.value):
            parts = (part for target in targets for part in ast.walk(target))
            yield from (_name(part) for part in parts if isinstance(part, ast.Name | ast.Attribute))

    def _is_of_a_resume(self, value: ast.AST) -> bool:
        return any(self._holds_the_step(part) for part in ast.walk(value))

    def _holds_the_step(self, part: ast.AST) -> bool:
        if isinstance(part, ast.Attribute) and id(part) not in self._called:
            return part.attr in ("step", "values") or part.attr in self._names
        return isinstance(part, ast.Name) and part.id in self._names

    def repeats(self, node: ast.AST) -> bool:
        """Return whether this does something as often as the run has steps, or skips them."""
        if isinstance(node, ast.For | ast.comprehension):
            call = node.iter
            is_range = isinstance(call, ast.Call) and _is_range_from_zero(call)
            return is_range and self._is_of_a_resume(call)
        if isinstance(node, ast.While):
            return any(self._is_below_the_step(part) for part in ast.walk(node.test))
        if not isinstance(node, ast.Call):
            return False
        name = _name(node.func)
        is_skip = name in self._repeating or _SKIPS.fullmatch(name) is not None
        return is_skip and any(map(self._is_of_a_resume, ast.iter_child_nodes(node)))

    def _is_below_the_step(self, part: ast.AST) -> bool:
        return isinstance(part, ast.Compare) and any(map(self._is_of_a_resume, part.comparators))

    def added_to_the_step(self, node: ast.AST) -> Iterator[str]:
        """Yield the attributes in a sum with the step of a resume, or set by what is given it."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            given = (one for one in node.value.args if isinstance(one, ast.Attribute))
            if any(map(self._holds_the_step, given)):
                yield from self._setting.get(_name(node.value.func), ())
        if not isinstance(node, ast.BinOp | ast.AugAssign):
            return
        sides = (
            [node.left, node.right] if isinstance(node, ast.BinOp) else [node.target, node.value]
        )
        for one, other in (sides, sides[::-1]):
            if self._is_of_a_resume(one):
                yield from (p.attr for p in ast.walk(other) if isinstance(p, ast.Attribute))


def _is_range_from_zero(call: ast.Call) -> bool:
    first = call.args[0] if len(call.args) > 1 else None
    is_from_zero = first is None or (isinstance(first, ast.Constant) and first.value == 0)
    return _name(call.func) == "range" and is_from_zero


def _repeats_by_a_parameter(function: ast.FunctionDef) -> bool:
    """Return whether a function does something as often as one of its arguments says."""
    names = {one.arg for one in (*function.args.args, *function.args.kwonlyargs)}
    for node in ast.walk(function):
        ends: list[ast.expr] = []
        if isinstance(node, ast.For | ast.comprehension) and isinstance(node.iter, ast.Call):
            ends = node.iter.args if _is_range_from_zero(node.iter) else []
        elif isinstance(node, ast.While) and isinstance(node.test, ast.Compare):
            ends = node.test.comparators
        if any(_name(part) in names for end in ends for part in ast.walk(end)):
            return True
    return False


def _attributes_set_in(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
