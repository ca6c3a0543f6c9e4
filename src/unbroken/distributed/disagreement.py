"""Which ranks differ from the others, and in what."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from unbroken.errors import RankError
from unbroken.store import Json

_LONGEST = 200  # characters of a value in a message


def name_ranks(ranks: Sequence[int]) -> str:
    """Return how to call some ranks in a message.

    Example:
        >>> name_ranks([2]), name_ranks([0, 3])
        ('rank 2', 'ranks 0, 3')
    """
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(str(rank) for rank in ranks)}"


def disagreement(texts: Sequence[str], what: str, hint: str | None = None) -> RankError:
    """Return the error that names the ranks whose text is not that of most, and all texts.

    Of texts that are equally frequent, that of the lowest rank counts as right.

    Example:
        >>> print(disagreement(["4", "4", "5"], "micro_batch_size"))
        rank 2: micro_batch_size: expected 4 (ranks 0, 1), found 5 (rank 2)
    """
    usual = Counter(texts).most_common(1)[0][0]
    odd = tuple(rank for rank, text in enumerate(texts) if text != usual)

    def told(text: str) -> str:
        ranks = name_ranks([rank for rank, other in enumerate(texts) if other == text])
        return f"{text if len(text) <= _LONGEST else text[:_LONGEST] + '...'} ({ranks})"

    others = dict.fromkeys(texts[rank] for rank in odd)
    found = ", ".join(told(text) for text in others)
    return RankError(name_ranks(odd), what, ranks=odd, expected=told(usual), found=found, hint=hint)


def narrowed(what: str, values: Sequence[Json]) -> tuple[str, list[str]]:
    """Return the smallest part in which mappings differ: its path, and its JSON text by rank.

    Example:
        >>> narrowed("settings", [{"seed": 1, "lr": 0.1}, {"seed": 2, "lr": 0.1}])
        ('settings.seed', ['1', '2'])
    """
    mappings = [value for value in values if isinstance(value, Mapping)]
    if len(mappings) < len(values):
        return what, [_text(value) for value in values]
    keys = sorted({key for mapping in mappings for key in mapping})
    parts = [{key: _text(m[key]) if key in m else "" for key in keys} for m in mappings]
    differing = [key for key in keys if len({part[key] for part in parts}) > 1]
    if len(differing) == 1 and all(differing[0] in mapping for mapping in mappings):
        return narrowed(f"{what}.{differing[0]}", [m[differing[0]] for m in mappings])
    return what, [_text({key: m[key] for key in differing if key in m}) for m in mappings]


def _text(value: Json) -> str:
    return json.dumps(value, sort_keys=True)
