"""Fingerprints of two starts compared: what each difference means, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from unbroken.checkpoint.differences import Difference, Rule

RULES: tuple[tuple[str, Rule], ...] = (
    ("model.class", ("changed", "another class of model computes from here on")),
    ("model.source.*", ("changed", "the code of this class is not what it was")),
    ("model.structure", ("changed", "the model prints otherwise: a layer or a rate changed")),
    ("model.frozen", ("changed", "other parameters train from here on; all other state is kept")),
    ("model.*", ("changed", "the model computes something else; its weights are kept")),
    ("optimizer.*class", ("refused", 'its state means nothing to another; skip=["optimizer"]')),
    ("optimizer.*foreach", ("equivalent", "another kernel rounds in another order")),
    ("optimizer.*fused", ("equivalent", "another kernel rounds in another order")),
    ("optimizer.*capturable", ("equivalent", "another kernel rounds in another order")),
    ("optimizer.*", ("changed", "other updates from here on; the moments are kept")),
    ("scheduler.*", ("changed", "another learning rate from here on, at the same step")),
    ("loss.*", ("changed", "another loss is trained from here on")),
    ("data.length", ("changed", "another order of the samples; the position is kept in samples")),
    ("data.records", ("changed", "other samples from here on")),
    ("data.fingerprint", ("changed", "other samples from here on")),
    ("data.source.*", ("changed", "the code of the data set is not what it was")),
    ("data.*", ("changed", "other batches are made from here on")),
    ("callbacks.*", ("equivalent", "whether the training depends on it cannot be seen")),
    ("code.*", ("equivalent", "whether the training depends on it cannot be seen")),
)
"""What a difference means: the first pattern that fits the path counts."""

_OPTIONAL = ("transform", "target_transform", "transforms", "collate_fn", "tokenizer")


def fingerprint_differences(
    stored: Mapping[str, Any], now: Mapping[str, Any]
) -> tuple[Difference, ...]:
    """Return what is not the same in two fingerprints.

    What only one of them has is no difference (it came or went with a version), but for
    parts that a user adds or takes away: a transform, a collator, a tokenizer.

    Args:
        stored: From the checkpoint: groups ("model", "data", ...) of facts.
        now: Of this start.

    Example:
        >>> stored = {"model": {"n_head": 2}, "data": {"length": 8}}
        >>> now = {"model": {"n_head": 4}, "data": {"length": 8}}
        >>> [(d.path, d.stored, d.now) for d in fingerprint_differences(stored, now)]
        [('model.n_head', 2, 4)]
    """
    before, after = flat(_with_optional_parts(stored)), flat(_with_optional_parts(now))
    found = [
        Difference(path, before[path], value, *rule_of(path)[::-1])
        for path, value in after.items()
        if path in before and _differs(path, before[path], value)
    ]
    return tuple(_told_once(found, before, after))


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


def _with_optional_parts(groups: Mapping[str, Any]) -> dict[str, Any]:
    """Spell a part that is not there as None, and one that is by its name."""
    data = groups.get("data")
    if not isinstance(data, Mapping):
        return dict(groups)
    named = {f"{part}.is": _name_of(data.get(part)) for part in _OPTIONAL}
    return {**groups, "data": {**data, **named}}


def _name_of(part: Any) -> Any:
    return part.get("name") if isinstance(part, Mapping) else part and "given"


def rule_of(path: str) -> Rule:
    """Return what a difference at a path means.

    Example:
        >>> rule_of("optimizer.class")[0]
        'refused'
    """
    known = (rule for pattern, rule in RULES if fnmatchcase(path, pattern))
    return next(known, ("changed", "the training depends on it"))


def _differs(path: str, stored: Any, now: Any) -> bool:
    if path == "data.repeatable":
        return False
    if path == "data.records" and isinstance(stored, list) and isinstance(now, list):
        return any(before != after for before, after in zip(stored, now, strict=False))
    return bool(stored != now)


def _told_once(
    found: list[Difference], before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[Difference]:
    """Leave out what only says again, less well, what another difference says."""
    paths = {difference.path for difference in found}
    telling = {path for path in paths if path.startswith("model.")} - {"model.frozen"}
    if len(telling) > 1:
        paths.discard("model.structure")
    unclear = before.get("data.repeatable") is False or after.get("data.repeatable") is False
    if unclear or "data.length" in paths:
        paths.discard("data.records")  # cannot be compared, or other records by necessity
    same_records = "data.records" in before and "data.records" in after and not unclear
    kept = [difference for difference in found if difference.path in paths]
    if same_records and "data.records" not in paths and "data.length" not in paths:
        return [_softened(difference) for difference in kept]
    return kept


def _softened(difference: Difference) -> Difference:
    """New code of a data set that gives the same records is not another training."""
    if not difference.path.startswith("data.source."):
        return difference
    effect = "the code of the data set changed; the sampled records are the same"
    return replace(difference, verdict="equivalent", effect=effect)
