"""Values of a state, which are typed JSON, as a person reads them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping

from unbroken.store import Json

_TAG = "$"
_LONGEST = 60  # of a list or mapping that is written out
_WIDEST = 200  # characters of one value
_QUIET_NAN = "7ff8000000000000"
_NUMPY = {
    "<f2": "<e", "<f4": "<f", "<f8": "<d",
    "|i1": "<b", "<i2": "<h", "<i4": "<i", "<i8": "<q",
    "|u1": "<B", "<u2": "<H", "<u4": "<I", "<u8": "<Q",
    "|b1": "<?",
}  # fmt: skip
_BRACKETS = {"tuple": "()", "namedtuple": "()", "torch.Size": "()", "set": "{}", "frozenset": "{}"}


def texts_of(a: Json, b: Json) -> tuple[str, str]:
    """Return two values that differ as texts that differ; of long ones, the place where they do.

    Example:
        >>> texts_of("cosine", None), texts_of("1", 1)
        (('cosine', 'null'), ('"1"', '1'))
    """
    one, other = text_of(a), text_of(b)
    if one == other:
        one, other = json.dumps(a), json.dumps(b)
    pairs = enumerate(zip(one, other, strict=False))
    shared = next((i for i, (x, y) in pairs if x != y), min(len(one), len(other)))
    start = max(0, shared - 20)
    return _cut(one, start), _cut(other, start)


def _cut(text: str, start: int) -> str:
    """Return the part of a long text from `start` on."""
    if len(text) <= _WIDEST:
        return text
    part = text[start : start + _WIDEST]
    return ("" if start == 0 else "...") + part + ("..." if len(text) > start + _WIDEST else "")


def text_of(value: Json, *, quoted: bool = False) -> str:
    """Return a value on one line: as JSON, or as Python writes what JSON does not have.

    Args:
        value: JSON, or the typed JSON of `state.json`.
        quoted: Whether text stands in quotes.

    Example:
        >>> text_of({"$": "tuple", "items": [0.9, {"$": "float", "bits": "7ff0000000000000"}]})
        '(0.9, inf)'
        >>> text_of(list(range(100)))
        'a list of 100'
    """
    if isinstance(value, str) and not quoted:
        return value
    if isinstance(value, Mapping):
        return _typed(value) if _TAG in value else _mapping(value)
    if isinstance(value, list):
        return _listed(value, "[]", "list")
    return json.dumps(value, ensure_ascii=False)


def _typed(value: Mapping[str, Json]) -> str:
    """Return a typed value; as JSON where it is not what unbroken writes."""
    try:
        return _known(value, str(value[_TAG]))
    except (AttributeError, KeyError, TypeError, ValueError, struct.error):
        return json.dumps(value, ensure_ascii=False)


def _known(value: Mapping[str, Json], tag: str) -> str:
    if tag in _BRACKETS:
        return _listed(_list(value["items"]), _BRACKETS[tag], tag)
    if tag in ("tensor", "numpy.ndarray"):
        return f"{tag.removeprefix('numpy.nd')} {value['dtype']}{value['shape']}"
    if tag in ("int", "float", "complex", "numpy.scalar"):
        return _number(value, tag)
    if tag == "object":
        return f"{value['kind']} {value['class']}"
    if tag == "same":
        return f"the same object as {value['as']}"
    if tag in ("bytes", "bytearray") and "hex" in value:
        return repr(bytes.fromhex(str(value["hex"])))
    if "name" in value:  # dtypes, devices, enums
        kind = f"{value['type']}." if "type" in value else ""
        return f"{kind}{value['name']}"
    return json.dumps(value, ensure_ascii=False)


def _number(value: Mapping[str, Json], tag: str) -> str:
    if tag == "int":
        return str(int(str(value["hex"]), 16))
    if tag == "numpy.scalar":
        raw = bytes.fromhex(str(value["hex"]))
        return f"numpy {value['dtype']} {struct.unpack(_NUMPY[str(value['dtype'])], raw)[0]}"
    bits = str(value["bits"])
    if tag == "complex":
        return str(complex(*struct.unpack(">dd", bytes.fromhex(bits))))
    number = struct.unpack(">d", bytes.fromhex(bits))[0]
    is_other_nan = math.isnan(number) and bits != _QUIET_NAN
    return f"nan with the bits {bits}" if is_other_nan else str(number)


def _listed(items: list[Json], brackets: str, kind: str) -> str:
    parts = ", ".join(text_of(item, quoted=True) for item in items[:_LONGEST])
    text = f"{brackets[0]}{parts}{brackets[1]}"
    return text if len(text) <= _LONGEST else f"a {kind} of {len(items)}"


def _mapping(value: Mapping[str, Json]) -> str:
    if len(value) > _LONGEST:
        return f"a mapping of {len(value)}"
    parts = ", ".join(f"{key}: {text_of(item, quoted=True)}" for key, item in value.items())
    return f"{{{parts}}}" if len(parts) <= _LONGEST else f"a mapping of {len(value)}"


def _list(value: Json) -> list[Json]:
    if not isinstance(value, list):
        raise TypeError(type(value).__name__)
    return value
