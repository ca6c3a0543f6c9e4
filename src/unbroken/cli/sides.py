"""What can be compared: a checkpoint, the newest one of a run, or a configuration file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unbroken.cli.places import Place, open_place
from unbroken.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    NewerFormatError,
)
from unbroken.store import CheckpointReader, Json
from unbroken.store.config_file import read_mapping

_SUFFIXES = (".yaml", ".yml", ".json")
_GROUPS_IN_A_FILE = ("model", "data")  # all else in a configuration file is flat


@dataclass(frozen=True)
class CheckpointSide:
    """A checkpoint.

    Attributes:
        path: What the user named.
        reader: The checkpoint.
        is_newest: Whether it was taken as the newest of a run.
        skipped: Newer checkpoints of that run that cannot be opened, and why.
    """

    path: str
    reader: CheckpointReader
    is_newest: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ConfigSide:
    """A configuration file.

    Attributes:
        path: What the user named.
        config: What stands in it.
    """

    path: str
    config: Mapping[str, Json]


Side = CheckpointSide | ConfigSide


def open_side(text: str) -> Side:
    """Return what a path names.

    Raises:
        CheckpointError: It names a checkpoint that cannot be opened, or a run that has none.
        ConfigError: It names a configuration file that cannot be read, or says nothing.
        RunDirectoryError: It names nothing, or something else.
    """
    path = Path(text)
    if path.suffix in _SUFFIXES and not path.is_dir():
        return ConfigSide(text, _read_config(path))
    place = open_place(text)
    if place.folder is not None:
        return CheckpointSide(text, place.open(place.folder))
    return _newest(text, place)


def _newest(text: str, place: Place) -> CheckpointSide:
    skipped: dict[str, str] = {}
    for folder in reversed(place.folders):
        try:
            return CheckpointSide(text, place.open(folder), is_newest=True, skipped=skipped)
        except NewerFormatError:
            raise
        except CheckpointError as error:
            skipped[folder] = str(error).removeprefix(f"{folder}: ")
    what = "no checkpoint can be opened" if skipped else "there is no checkpoint yet"
    hint = "\n".join(f"{folder}: {reason}" for folder, reason in skipped.items()) or None
    raise CheckpointNotFoundError(text, what, hint=hint)


def _read_config(path: Path) -> dict[str, Json]:
    """Return the file's content as JSON has it; a date is its text."""
    values = read_mapping(path)
    if not values:
        raise ConfigError(str(path), "names no setting")
    try:
        text = json.dumps(values, default=str)
        plain: dict[str, Json] = json.loads(text, parse_constant=str)  # NaN as "NaN"
    except (TypeError, ValueError, RecursionError) as error:  # a key of a strange type, a cycle
        raise ConfigError(str(path), f"cannot be compared: {error}") from error
    return plain


def settings_of(config: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings of a configuration file as a manifest holds them.

    Example:
        >>> settings_of({"seed": 1, "model": {"n_layer": 2}})
        {'config': {'seed': 1}, 'settings': {'model': {'n_layer': 2}}}
    """
    nested = {name: config[name] for name in _GROUPS_IN_A_FILE if name in config}
    flat = {name: value for name, value in config.items() if name not in nested}
    return {"config": flat, "settings": nested}


def settings_named(facts: Mapping[str, Json], config: Mapping[str, Json]) -> dict[str, Json]:
    """Return those settings in the facts of a manifest that a configuration file names.

    One text in the file stands for a list of one, as the settings of the data take it.

    Args:
        facts: The facts.
        config: What the file holds.

    Example:
        >>> facts = {"config": {"seed": 1, "bf16": False}, "settings": {"data": {"train": ["a"]}}}
        >>> settings_named(facts, {"seed": 2, "data": {"train": "a"}})
        {'config': {'seed': 1}, 'settings': {'data': {'train': 'a'}}}
    """
    given = settings_of(config)
    stored = _mapping(facts.get("settings"))
    nested = {
        name: _named(_mapping(stored.get(name)), _mapping(values))
        for name, values in _mapping(given["settings"]).items()
    }
    flat = _named(_mapping(facts.get("config")), _mapping(given["config"]))
    return {"config": flat, "settings": nested}


def _named(stored: Mapping[str, Json], given: Mapping[str, Json]) -> dict[str, Json]:
    return {
        name: value if isinstance(value, str) and stored[name] == [value] else stored[name]
        for name, value in given.items()
        if name in stored
    }


def _mapping(value: Any) -> Mapping[str, Json]:
    return value if isinstance(value, Mapping) else {}
