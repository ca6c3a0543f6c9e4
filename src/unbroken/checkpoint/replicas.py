"""Whether what is stored once is the same on all ranks: the weights and moments of replicas.

A local expert, a head for each rank, or replicas that a bug let drift apart would be stored as rank
0 has them; an optimizer's state, of which each rank stores a share, would even be mixed. A digest
of every byte would cost a tenth of a save. So a sample is compared: of each tensor blocks at even
distances, other ones at each save; small tensors whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from unbroken.capture import TensorLeaf, raw
from unbroken.distributed import Group, name_ranks
from unbroken.errors import RankError

_BLOCK = 1024  # bytes
_EVERY = 512  # blocks, one is compared: other ones at each save
_FEWEST = 4  # blocks of a tensor
_GOLDEN = 0x9E3779B1  # multiples of it are spread evenly (Knuth)


def agree_on_replicas(
    group: Group, leaves: Sequence[TensorLeaf], save: int, *, may_differ: bool = True
) -> None:
    """Raise unless these tensors are the same on all ranks, as far as the sample shows.

    Args:
        group: The ranks; all have the same leaves.
        leaves: What is stored once.
        save: The number of the save: it chooses the sample.
        may_differ: Whether the caller can have each rank's own stored, which the hint then tells.

    Raises:
        RankError: Naming a tensor, and the ranks on which it is another one.

    Example:
        >>> from unbroken.distributed import Alone
        >>> agree_on_replicas(Alone(), [], save=0)
    """
    samples = [_sample(leaf.tensor, save * _GOLDEN) for leaf in leaves]
    host = _on_the_host(samples)
    digests = group.gather("what is stored once", xxhash.xxh3_128_hexdigest(host.numpy().data))
    if len(set(map(str, digests))) > 1:
        raise _differing(group, [leaf.path for leaf in leaves], samples, may_differ=may_differ)


def _sample(tensor: torch.Tensor, place: int) -> torch.Tensor:
    """Return a view on some bytes of a tensor, as rows; on all of a small one, as one row."""
    whole = tensor if tensor.is_contiguous() else raw(tensor).contiguous()
    nbytes, start = whole.nbytes, whole.storage_offset() * whole.element_size()
    count = max(_FEWEST, nbytes // (_BLOCK * _EVERY))
    row = nbytes // count
    if row < _BLOCK:
        count, row, length = 1, nbytes, nbytes
    else:
        length = _BLOCK
        start += place % (nbytes - row * count + 1)  # what is left over is at either end
        start += place % (row - _BLOCK + 1)
    rows = torch.empty(0, dtype=torch.uint8, device=whole.device)
    return rows.set_(whole.untyped_storage(), start, (count, length), (row, 1))


def _on_the_host(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return all samples one after the other; what is on a device comes in few copies."""
    alike: dict[tuple[torch.device, bool], list[torch.Tensor]] = {}
    for sample in samples:
        alike.setdefault((sample.device, sample.shape[1] == _BLOCK), []).append(sample)
    parts = [
        torch.cat(own if are_blocks else [one.view(-1) for one in own]).view(-1).cpu()
        for (_, are_blocks), own in alike.items()
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _differing(
    group: Group, paths: Sequence[str], samples: Sequence[torch.Tensor], *, may_differ: bool
) -> RankError:
    own = [xxhash.xxh3_64_hexdigest(_on_the_host([sample]).numpy().data) for sample in samples]
    ranks = [list(map(str, digests)) for digests in map(_as_list, group.gather("each tensor", own))]
    usual = max(ranks, key=ranks.count)
    odd = tuple(rank for rank, digests in enumerate(ranks) if digests != usual)
    rows = zip(paths, *ranks, strict=True)
    differing = [path for path, *digests in rows if len(set(digests)) > 1]
    more = f" (and {len(differing) - 1} more tensors)" if differing[1:] else ""
    owners = dict.fromkeys(path.partition(".")[0].partition(":")[0] for path in differing)
    each = ", ".join(f'"{name}"' for name in (*owners, "rng", "values"))
    alike = "begin with the same weights (seed before the model is built), and sum all gradients"
    apart = f"if the ranks should not be alike: Checkpointer(of_each_rank=[{each}])"
    return RankError(
        name_ranks(odd),
        f"{differing[0]}{more}: is not what the other ranks have, and is stored once for all",
        ranks=odd,
        hint=f"{alike}; {apart}" if may_differ else alike,
    )


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else []
