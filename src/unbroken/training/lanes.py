"""Lanes: gradients summed in one fixed order, on however many ranks they are computed.

A step's micro-batches are dealt to L lanes in equal, contiguous parts, and ranks take whole lanes.
Each lane's gradient is computed by itself, and the lanes are added in one binary tree: neighbours
first, then neighbours of these. What a rank holds of the tree is a whole branch of it, so the sums
are the same additions in the same order on 1, 2, 4, ... L ranks, and their bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Flat = list[Tensor]
"""What lanes give: one flat tensor for each dtype."""

Gather = Callable[[Tensor], Sequence[Tensor]]
"""From this rank's tensor to those of all ranks, by rank."""


class LaneTree:
    """Adds what lanes give, as soon as neighbours are there; holds log2(lanes) sums at most.

    Example:
        >>> tree = LaneTree()
        >>> for lane in (1.0, 2.0, 3.0, 4.0):
        ...     tree.add([torch.tensor([lane])])
        >>> tree.total()
        [tensor([10.])]
    """

    def __init__(self) -> None:
        self._branches: list[tuple[int, Flat]] = []

    def add(self, lane: Flat) -> None:
        """Add the sum of the next lane; its tensors may be changed."""
        height = 0
        while self._branches and self._branches[-1][0] == height:
            lane = _added(self._branches.pop()[1], lane)
            height += 1
        self._branches.append((height, lane))

    def total(self) -> Flat:
        """Return the sum of all lanes; what has no neighbour is added last."""
        total = self._branches.pop()[1]
        while self._branches:
            total = _added(self._branches.pop()[1], total)
        return total


def _added(left: Flat, right: Flat) -> Flat:
    return [one.add_(other) for one, other in zip(left, right, strict=True)]


class LaneSum:
    """Sums the gradients and the loss of one step, lane by lane, and then over the ranks.

    A parameter without a gradient in a lane counts as zeros there; one that has none in any lane
    has none in the end.

    Args:
        model: Whose parameters hold the gradients.
        lanes: How many lanes this rank has.
        gather: None: there is one rank.
    """

    def __init__(self, model: nn.Module, lanes: int, gather: Gather | None) -> None:
        self.lanes = lanes
        self._model = model
        self._gather = gather
        self._tree = LaneTree()

    def lane_is_over(self, loss: Tensor) -> None:
        """Take the gradients and the loss of a lane; the parameters have none after it."""
        self._tree.add(_taken(self._parameters(), loss))

    def finish(self) -> Tensor:
        """Give the parameters the sum over all lanes of all ranks; return that of the losses."""
        total = self._tree.total()
        if self._gather is not None:
            parts = zip(*map(self._gather, total), strict=True)
            for part in parts:  # rank by rank: each is a branch of the same tree
                self._tree.add([tensor.clone() for tensor in part])
            total = self._tree.total()
        return _given(self._parameters(), total)

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self._model.parameters() if p.requires_grad]


def _taken(parameters: list[nn.Parameter], loss: Tensor) -> Flat:
    """Return the gradients as flat tensors, and as the last one: the loss, and who has any."""
    has = [0.0 if p.grad is None else 1.0 for p in parameters]
    flat = [
        torch.cat(
            [torch.zeros_like(p).view(-1) if p.grad is None else p.grad.reshape(-1) for p in group]
        )
        for group in _by_dtype(parameters)
    ]
    for parameter in parameters:
        parameter.grad = None
    more = torch.tensor(has, dtype=torch.float64, device=loss.device)
    return [*flat, torch.cat([loss.detach().reshape(1).double(), more])]


def _given(parameters: list[nn.Parameter], total: Flat) -> Tensor:
    *flat, more = total
    loss, *has = more.tolist()
    present = {id(p) for p, lanes in zip(parameters, has, strict=True) if lanes}
    for group, gradients in zip(_by_dtype(parameters), flat, strict=True):
        start = 0
        for parameter in group:
            part = gradients[start : start + parameter.numel()].view(parameter.shape)
            parameter.grad = part if id(parameter) in present else None
            start += parameter.numel()
    return torch.tensor(loss, dtype=torch.float32, device=more.device)


def _by_dtype(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.dtype, []).append(parameter)
    return list(groups.values())
