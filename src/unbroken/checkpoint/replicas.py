"""Whether what is stored once is the same on all ranks: the weights and moments of replicas.

A local expert, a head for each rank, or replicas that a bug let drift apart would be stored as rank
0 has them; an optimizer's state, of which each rank stores a share, would even be mixed. A digest
of every byte would cost a tenth of the save of a large model. There a sample is compared: of each
tensor blocks at even distances, other ones at each save.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import xxhash

from unbroken.capture import TensorLeaf, raw
from unbroken.distributed import Group, name_ranks
from unbroken.errors import RankError

_FEW = 32 << 20  # bytes of all tensors: as many are compared as a whole, in 3 ms
_ALL = 1 << 62  # bytes: more than a tensor has
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
    block = _ALL if sum(leaf.nbytes for leaf in leaves) <= _FEW else _BLOCK
    samples = [sample_of(leaf.tensor, save, block=block) for leaf in leaves]
    host = _on_the_host(samples)
    digests = group.gather("what is stored once", xxhash.xxh3_128_hexdigest(host.numpy().data))
    if len(set(map(str, digests))) > 1:
        raise _differing(group, [leaf.path for leaf in leaves], samples, may_differ=may_differ)


def sample_of(tensor: torch.Tensor, turn: int, *, block: int = _BLOCK) -> torch.Tensor:
    """Return a view on some bytes of a tensor, as rows; on all of a small one, as one row.

    Args:
        tensor: Any; of one that is not contiguous the elements in C order are looked at.
        turn: Chooses the places; the same ones in tensors of the same length.
        block: How many bytes there are at each place.

    Example:
        >>> sample_of(torch.zeros(1 << 20), turn=3).shape
        torch.Size([8, 1024])
    """
    whole = tensor if tensor.is_contiguous() else raw(tensor).contiguous()
    nbytes, start = whole.nbytes, whole.storage_offset() * whole.element_size()
    count = max(_FEWEST, nbytes // (_BLOCK * _EVERY))
    row, place = nbytes // count, turn * _GOLDEN
    if row < block:
        count, row, length = 1, nbytes, nbytes
    else:
        length = block
        start += place % (nbytes - row * count + 1)  # what is left over is at either end
        start += place % (row - block + 1)
    rows = torch.empty(0, dtype=torch.uint8, device=whole.device)
    return rows.set_(whole.untyped_storage(), start, (count, length), (row, 1))


def _on_the_host(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return all samples one after the other; what is on a device comes in few copies."""
    alike: dict[tuple[torch.device, bool], list[torch.Tensor]] = {}
    for sample in samples:
        alike.setdefault((sample.device, len(sample) > 1), []).append(sample)
    parts = [gathered(own).cpu() for own in alike.values()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def gathered(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a copy of samples, one after the other: of equal width, or of one row each."""
    if len(samples[0]) == 1:
        return torch.cat([sample.view(-1) for sample in samples])
    return torch.cat([*samples]).view(-1)


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
