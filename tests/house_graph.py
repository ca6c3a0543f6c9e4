"""The source as a graph: which module takes names from which, annotations counted."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "unbroken"
Graph = Mapping[str, set[str]]


def module_of(path: Path) -> str:
    """Return the dotted name of a file; that of a package for its `__init__.py`."""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_source() -> dict[Path, ast.Module]:
    """Return all files of the package, parsed."""
    return {path: ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))}


def is_face(path: Path) -> bool:
    """Return whether a file is the face of a package: it hands names on, and uses none."""
    return path.name == "__init__.py"


def imports(trees: Mapping[Path, ast.Module]) -> Graph:
    """Return the modules that each module takes names from.

    Imports inside of functions and under `TYPE_CHECKING` count. A name that is taken from the face
    of a package counts for the module behind it.
    """
    known = {module_of(path) for path in trees}
    faces = {
        module_of(path): _handed_on(path, tree, known)
        for path, tree in trees.items()
        if is_face(path)
    }
    return {
        module_of(path): _imported(path, tree, known, faces) - {module_of(path)}
        for path, tree in trees.items()
    }


def _from(node: ast.ImportFrom, path: Path) -> str:
    """Return the module that `from X import name` names, be it relative."""
    if not node.level:
        return node.module or ""
    package = module_of(path) if is_face(path) else module_of(path).rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package


def _handed_on(path: Path, tree: ast.Module, known: set[str]) -> dict[str, str]:
    return {
        alias.asname or alias.name: base
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (base := _from(node, path)) in known
        for alias in node.names
    }


def _imported(
    path: Path, tree: ast.Module, known: set[str], faces: Mapping[str, Mapping[str, str]]
) -> set[str]:
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            base = _from(node, path)
            for alias in node.names:
                module = f"{base}.{alias.name}"
                modules.add(module if module in known else _behind(base, alias.name, faces))
    return modules & known


def _behind(base: str, name: str, faces: Mapping[str, Mapping[str, str]]) -> str:
    seen = set()
    while base not in seen and name in faces.get(base, {}):
        seen.add(base)
        base = faces[base][name]
    return base


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of modules in which each one reaches each other one."""
    reached = {module: _reached_from(module, graph) for module in graph}
    groups = {
        frozenset(other for other in reached[module] if module in reached[other])
        for module in graph
    }
    return sorted(sorted(group) for group in groups if group)


def _reached_from(module: str, graph: Graph) -> set[str]:
    reached: set[str] = set()
    rest = list(graph[module])
    while rest:
        one = rest.pop()
        if one not in reached:
            reached.add(one)
            rest += graph[one]
    return reached


def only_importers(trees: Mapping[Path, ast.Module]) -> dict[str, str]:
    """Return the modules that one other module imports and no third, each with that one."""
    faces = {module_of(path) for path in trees if is_face(path)}
    users: dict[str, set[str]] = defaultdict(set)
    for module, others in imports(trees).items():
        for other in others if module not in faces else ():
            users[other].add(module)
    return {
        module: next(iter(found))
        for module, found in sorted(users.items())
        if len(found) == 1 and module not in faces
    }


def public_classes(trees: Mapping[Path, ast.Module]) -> dict[str, list[str]]:
    """Return the public class names, each with the modules that define it."""
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(module_of(path))
    return places


def identifiers(tree: ast.AST) -> Iterable[str]:
    """Yield every name in a file: of functions, classes, parameters, variables, attributes."""
    for node in ast.walk(tree):
        for field in ("name", "id", "attr", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                yield name.strip("_")
