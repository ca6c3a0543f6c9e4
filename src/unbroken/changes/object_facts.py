"""Fingerprints of two starts compared: what each difference means, in plain words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from unbroken.changes.differences import Difference, compare
from unbroken.changes.rules import rule_of
from unbroken.fingerprint import NOT_COMPARED, sampled_records

_REPEATABLE, _RECORDS = ".repeatable", ".records"
OWN_GENERATOR = (
    "record 0 is not the same twice under the same key: it draws from a generator of its own, "
    "which no checkpoint holds; draw from random, numpy.random or torch, which are keyed"
)
_OWN_BATCH = OWN_GENERATOR.replace("record 0 is", "a batch of the same records is")
_OF_CODE = (".name", ".source", ".class")
_HAVE_DIFFERENCES_OF_THEIR_OWN = {
    *("records", "repeatable", "fingerprint", "length", "source", "loader"),
    *("transform", "target_transform", "transforms", "collate_fn", "tokenizer"),
}
_OPTIONAL = ("transform", "target_transform", "transforms", "collate_fn", "tokenizer")


def fingerprint_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any], *, same_software: bool = False
) -> tuple[Difference, ...]:
    """Return what is not the same in two fingerprints.

    What only one of them has came or went with a version of some software; with the same
    software, the user has added it or taken it away: a hook, a method, a setting.

    Args:
        stored: From the checkpoint: groups ("model", "data", ...) of facts.
        now: Of this start.
        same_software: Whether both were taken by the same versions.

    Example:
        >>> stored = {"model": {"n_head": 2}, "data": {"length": 8}}
        >>> now = {"model": {"n_head": 4}, "data": {"length": 8}}
        >>> [(d.path, d.stored, d.now) for d in fingerprint_differences(stored, now)]
        [('model.n_head', 2, 4)]
    """
    before, after = _comparable(stored, now), _comparable(now, stored)
    unread = [_not_compared(path, before[path], after[path]) for path in _unread(before, after)]
    of_unread = {difference.path for difference in unread}
    read = {path: value for path, value in after.items() if path not in of_unread}
    compared = compare(before, read, rule_of, differs=_differs)
    found = [_with_records(difference, after) for difference in compared]
    if same_software:
        found += _came_or_went(before, after)
    own = [_unrepeatable(path) for path in after if _is_unrepeatable(path, before, after)]
    return (*_without_repeats(found, before, after), *own, *unread)


def _with_records(difference: Difference, after: Mapping[str, Any]) -> Difference:
    """Return how many records differ, and which is the first, in place of their digests."""
    path, stored, now = difference.path, difference.stored, difference.now
    length = after.get(f"{path.removesuffix(_RECORDS)}.length")
    lists = isinstance(stored, list) and isinstance(now, list)
    if not (path.endswith(_RECORDS) and lists and isinstance(length, int)):
        return difference
    pairs = list(zip(sampled_records(length), stored, now, strict=False))
    others = [index for index, one, other in pairs if one != other]
    found = f"{len(others)} of {len(pairs)} sampled records differ (first: record {others[0]})"
    effect = f"{difference.effect}; {_SEEDED}"
    return replace(difference, stored=f"{len(stored)} records", now=found, effect=effect)


_SEEDED = "is the data seeded?"


def _is_unrepeatable(path: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    return path.endswith(_REPEATABLE) and False in (before.get(path), after[path])


def _unrepeatable(path: str) -> Difference:
    effect = _OWN_BATCH if path.endswith(".collate_fn.repeatable") else OWN_GENERATOR
    return Difference(path, None, None, effect, "not covered")


def uncovered_facts(now: Mapping[str, Any]) -> tuple[Difference, ...]:
    """Return what a fingerprint says of itself that no checkpoint can hold.

    Example:
        >>> [d.path for d in uncovered_facts({"data": {"repeatable": False}})]
        ['data.repeatable']
    """
    facts = flat(now)
    return tuple(_unrepeatable(path) for path in facts if _is_unrepeatable(path, {}, facts))


def may_go_on(stored: Mapping[str, Any], callbacks: Mapping[str, Any]) -> bool:
    """Return whether a callback that could end a run is not what it was: then it goes on.

    Args:
        stored: The facts of the checkpoint.
        callbacks: The facts of the callbacks of this start, by name.

    Example:
        >>> facts = {"fingerprint": {"callbacks": {"Patience": {"stops": True}}}}
        >>> may_go_on(facts, {"Patience": {"stops": True}}), may_go_on(facts, {})
        (False, True)
    """
    prints = stored.get("fingerprint")
    known = prints.get("callbacks") if isinstance(prints, Mapping) else None
    before = known if isinstance(known, Mapping) else {}
    ended = {n: one for n, one in before.items() if isinstance(one, Mapping) and one.get("stops")}
    now: Any = json.loads(json.dumps({name: callbacks.get(name) for name in ended}))
    return any(now[name] != one for name, one in ended.items())


def _came_or_went(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Difference]:
    """Return what only one side has, where that says something of its own."""
    groups = {path.partition(".")[0] for path in before} & {
        path.partition(".")[0] for path in after
    }
    paths = [path for path in {**before, **after} if (path in before) != (path in after)]
    alone = [path for path in paths if _says_more(path, groups, before, after)]
    return [_one_sided(path, before.get(path), after.get(path)) for path in alone]


def _says_more(
    path: str, groups: set[str], before: Mapping[str, Any], after: Mapping[str, Any]
) -> bool:
    """Return whether no other difference tells of a fact that came or went."""
    group, _, name = path.partition(".")
    if group not in groups and group != "loss":
        return False  # evaluation data, say: nothing is compared with nothing
    if group == "callbacks":
        if name.partition(".")[0].isdigit() or name.endswith(".stops"):
            return False  # older versions knew callbacks by their places
        return before.get("callbacks.names") == after.get("callbacks.names")
    return group != "data" or name.partition(".")[0] not in _HAVE_DIFFERENCES_OF_THEIR_OWN


def _one_sided(path: str, stored: Any, now: Any) -> Difference:
    """A plain value that nothing names before does nothing: the code that names it is compared."""
    verdict, effect = rule_of(path)
    value = now if stored is None else stored
    is_setting = path.startswith(("model.", "data.values.")) and not path.endswith(_OF_CODE)
    is_plain = isinstance(value, bool | int | float | str | None)
    if verdict == "changed" and is_plain and is_setting:
        verdict, effect = "equivalent", "came or went: whether anything uses it cannot be seen"
    return Difference(path, stored, now, effect, verdict)


def _unread(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return the facts that one side could not take."""
    sides = (before, after)
    return [path for path in after if path in before and any(_is_unread(s[path]) for s in sides)]


def _is_unread(fact: Any) -> bool:
    return isinstance(fact, str) and fact.startswith(NOT_COMPARED)


def _not_compared(path: str, stored: Any, now: Any) -> Difference:
    """Tell of facts that one side could not take: whatever changed there would not be seen."""
    before, after = _in_short(stored), _in_short(now)
    return Difference(path, before, after, _UNSEEN.get(path, "is not compared"), "equivalent")


def _in_short(fact: Any) -> Any:
    return fact.removeprefix(NOT_COMPARED) if _is_unread(fact) else f"{len(fact)} digests"


_GIVEN = "records are not compared; a string `fingerprint` of the data set would be"
_UNSEEN = {"data.records": _GIVEN, "eval_data.records": _GIVEN}


def flat(groups: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"model": {"n_head": 2}} as {"model.n_head": 2}, at any depth.

    Example:
        >>> flat({"data": {"collate_fn": {"name": "pad"}, "length": 3}})
        {'data.collate_fn.name': 'pad', 'data.length': 3}
    """
    found: dict[str, Any] = {}
    for name, value in groups.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            found.update(flat(value, f"{path}."))
        else:
            found[path] = value
    return found


def _comparable(groups: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Return all facts by path; a layer, or an optional part, that is missing is None."""
    facts = flat(groups)
    layers = (path for path in flat(others) if path.startswith("model.layer."))
    missing = dict.fromkeys(path for path in layers if path not in facts)
    missing |= {path: none for path, none in _NO_RECORDS.items() if _lacks(path, facts, others)}
    data = groups.get("data")
    if not isinstance(data, Mapping):
        return {**facts, **missing}
    parts = {f"data.{part}.is": _name_of(data.get(part)) for part in _OPTIONAL}
    return {**facts, **missing, **parts}


def _lacks(path: str, facts: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether the other side alone has records of data that are on both."""
    group, _, name = path.partition(".")
    there = others.get(group)
    has_data = f"{group}.length" in facts
    return has_data and path not in facts and isinstance(there, Mapping) and name in there


_NO_RECORDS = dict.fromkeys(_UNSEEN, f"{NOT_COMPARED}none were read")


def _name_of(part: Any) -> Any:
    return part.get("name") if isinstance(part, Mapping) else part and "given"


def _differs(path: str, stored: Any, now: Any) -> bool:
    if path.endswith(_REPEATABLE):
        return False  # a difference of its own says so, whatever it was before
    if path.endswith(_RECORDS) and isinstance(stored, list) and isinstance(now, list):
        return any(before != after for before, after in zip(stored, now, strict=False))
    return bool(stored != now)


def _without_repeats(
    found: list[Difference], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[Difference]:
    """Leave out what only says again, less well, what another difference says."""
    paths = {difference.path for difference in found}
    paths -= _repeated_layers(found)
    unclear = {
        path.removesuffix(_REPEATABLE) for path in after if _is_unrepeatable(path, before, after)
    }
    paths -= {f"{group}.records" for group in unclear}  # cannot be compared
    longer = [path.removesuffix(".length") for path in paths if path.endswith(".length")]
    paths -= {f"{group}{_RECORDS}" for group in longer}  # other records by necessity
    same_records = "data.records" in before and "data.records" in after and "data" not in unclear
    kept = [difference for difference in found if difference.path in paths]
    if same_records and "data.records" not in paths and "data.length" not in paths:
        return [_softened(difference) for difference in kept]
    return kept


def _repeated_layers(found: list[Difference]) -> set[str]:
    """Return the layers that changed as another one did, or as the configuration tells."""
    layers = [d for d in found if d.path.startswith("model.layer.")]
    others = [d for d in found if d.verdict == "changed" and d not in layers]
    of_model = [d for d in others if d.path.startswith("model.")]
    unclear = [layer for layer in layers if not _is_explained(layer, of_model)]
    first = {(str(layer.stored), str(layer.now)): layer.path for layer in reversed(unclear)}
    return {layer.path for layer in layers} - set(first.values())


def _is_explained(layer: Difference, others: Sequence[Difference]) -> bool:
    """Return whether a layer's difference is one of the others: its numbers, or its kind."""
    known = {(str(one.stored), str(one.now)) for one in others}
    kinds = [one for one in others if not isinstance(one.now, int | float)]
    before, after = (_WORD.findall(str(text)) for text in (layer.stored, layer.now))
    if len(before) != len(after):
        return bool(kinds)
    changed = {pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]} - known
    return all(kinds and not pair[1][0].isdigit() for pair in changed)


_WORD = re.compile(r"-?\d[\w.+-]*|\w+")


def _softened(difference: Difference) -> Difference:
    """New code of a data set that gives the same records is not another training."""
    if not difference.path.startswith("data.source."):
        return difference
    effect = "the code of the data set changed; the sampled records are the same"
    return replace(difference, verdict="equivalent", effect=effect)
