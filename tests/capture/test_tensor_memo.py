"""Encoding the same tensors again, with what is remembered of them: always as without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unbroken.capture import capture, encode
from unbroken.capture.codec.leaves import TensorMemo
from unbroken.errors import CaptureError


def described(encoded):
    leaves = [
        (one.path, one.file, one.dtype, one.shape, b"".join(map(bytes, one.chunks())))
        for one in encoded.leaves
    ]
    return encoded.structure, leaves


def same_with_and_without(tree, memo) -> bool:
    return described(encode(tree, memo=memo)) == described(encode(tree))


@pytest.fixture
def tree():
    base = torch.arange(24.0)
    tensors = {"plain": torch.randn(4, 6), "base": base, "view": base[4:10], "half": base[::2]}
    return {**tensors, "complex": torch.randn(3, dtype=torch.complex64), "none": torch.empty(0)}


def shrink(tree):
    tree["plain"].resize_(3, 6)


def turn(tree):
    tree["plain"] = tree["plain"].t()


def turn_in_place(tree):
    tree["plain"].t_()


def stride(tree):
    tree["plain"].as_strided_((4, 6), (1, 4))


def exchange(tree):
    tree["plain"].data = torch.randn(4, 6)


def require_grad(tree):
    tree["plain"].requires_grad_()


def become_a_parameter(tree):
    tree["plain"] = nn.Parameter(tree["plain"], requires_grad=False)


def become_a_buffer(tree):
    tree["plain"] = nn.Buffer(tree["plain"], persistent=False)


def conjugate(tree):
    tree["complex"] = tree["complex"].conj()


def become_negative(tree):
    tree["plain"] = torch._neg_view(tree["plain"])


def look_as_integers(tree):
    tree["plain"] = tree["plain"].view(torch.int32)


def share_memory(tree):
    tree["plain"] = tree["base"].view(4, 6)


def share_no_more(tree):
    tree["view"] = tree["view"].clone()


def lie_elsewhere(tree):
    tree["view"] = tree["base"][5:11]


def be_the_same(tree):
    tree["view"] = tree["base"]


def change_places(tree):
    tree["plain"] = tree.pop("plain")


def go(tree):
    del tree["view"]


def come(tree):
    tree["new"] = torch.randn(3)


CHANGES = [
    shrink,
    stride,
    turn,
    turn_in_place,
    exchange,
    require_grad,
    become_a_parameter,
    become_a_buffer,
]
CHANGES += [
    become_a_buffer,
    conjugate,
    become_negative,
    look_as_integers,
    share_memory,
    share_no_more,
]
CHANGES += [lie_elsewhere, be_the_same, change_places, go, come, lambda tree: None]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_changes_is_told(change, tree):
    memo = TensorMemo()
    assert same_with_and_without(tree, memo)
    change(tree)
    assert same_with_and_without(tree, memo)
    assert same_with_and_without(tree, memo)


def test_new_values_in_the_same_memory_are_stored(tree):
    memo = TensorMemo()
    encode(tree, memo=memo)
    tree["base"].mul_(3)
    assert memo.known is not None
    assert same_with_and_without(tree, memo)


def test_what_became_impossible_is_refused(tree):
    memo = TensorMemo()
    encode(tree, memo=memo)
    tree["plain"] = tree["plain"].to_sparse()
    with pytest.raises(CaptureError, match="plain"):
        encode(tree, memo=memo)
    tree["plain"] = nn.Parameter(torch.ones(4, 6)) * 2
    with pytest.raises(CaptureError, match="autograd graph"):
        encode(tree, memo=memo)


def test_a_model_in_training_is_known_from_step_to_step():
    model, memo = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), TensorMemo()
    optimizer = torch.optim.AdamW(model.parameters())
    known = []
    for _ in range(3):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        assert same_with_and_without(capture({"model": model, "optimizer": optimizer}), memo)
        known.append(memo.known)
    assert known[0] is known[1] is known[2]


def test_memory_that_no_tensor_holds_whole_is_looked_at_each_time():
    memory, memo = torch.arange(8.0), TensorMemo()
    tree = {"one": memory[:5], "other": memory[3:]}
    assert same_with_and_without(tree, memo)
    assert memo.known is None
    assert same_with_and_without(tree, memo)
