"""Sums in one fixed order: that of a binary tree, whoever adds them and when."""

from __future__ import annotations

from torch import Tensor


class Tree:
    """Adds tensors in pairs, as soon as neighbours are there; holds log2 of their number at most.

    Example:
        >>> import torch
        >>> tree = Tree()
        >>> for number in (1.0, 2.0, 3.0, 4.0):
        ...     tree.add(torch.tensor(number))
        >>> len(tree), tree.total(), len(tree)
        (1, tensor(10.), 0)
    """

    def __init__(self) -> None:
        self._branches: list[tuple[int, Tensor]] = []

    def __len__(self) -> int:
        """Return how many sums it holds."""
        return len(self._branches)

    def add(self, tensor: Tensor) -> None:
        """Add the next one; it may be changed."""
        height = 0
        while self._branches and self._branches[-1][0] == height:
            tensor = self._branches.pop()[1].add_(tensor)
            height += 1
        self._branches.append((height, tensor))

    def total(self) -> Tensor:
        """Return the sum of all, and begin anew; what has no neighbour is added last."""
        total = self._branches.pop()[1]
        while self._branches:
            total = self._branches.pop()[1].add_(total)
        return total

    def clear(self) -> None:
        """Forget what was added."""
        self._branches.clear()
