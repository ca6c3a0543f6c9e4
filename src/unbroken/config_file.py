"""Reading and writing configuration files: YAML and JSON, nothing else."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from unbroken.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number, as YAML 1.2 does (PyYAML reads a string)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a `.yaml`, `.yml` or `.json` file.

    Raises:
        ConfigError: If the file is missing or unreadable, or holds no mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except FileNotFoundError:
        raise ConfigError(str(path), "no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(str(path), f"cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(str(path), expected="fields with values", found=type(values).__name__)
    return values


def write_mapping(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping to a `.yaml`, `.yml` or `.json` file."""
    path.write_text(to_text(values, path.suffix), encoding="utf-8")


def to_text(values: dict[str, Any], suffix: str) -> str:
    """Return a mapping as the text of a file with this suffix."""
    if suffix == ".json":
        return json.dumps(values, indent=2) + "\n"
    if suffix in (".yaml", ".yml"):
        return yaml.safe_dump(values, sort_keys=False)
    raise ConfigError(f"configuration file *{suffix}", expected=".yaml, .yml or .json")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the question "did you mean ...?", if a known name is near."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else None
