"""Digests of tensors see every bit that they promise to see, and nothing else."""

from __future__ import annotations

import pytest
import torch

from unbroken.recorder.digests import SAMPLE_FROM, TensorDigester, batch_digest

FULL, SAMPLED = TensorDigester(sampled=False), TensorDigester(sampled=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_one_element_changes_the_digest(dtype):
    tensor = torch.zeros(3, 5, dtype=dtype)
    before = FULL.of(tensor)
    tensor[1, 2] = 1
    assert FULL.of(tensor) != before


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor.t(),
        lambda tensor: tensor[:, ::2],
        lambda tensor: tensor.to(memory_format=torch.preserve_format).t().contiguous(),
        lambda tensor: tensor[1],
        lambda tensor: torch.complex(tensor, tensor).conj(),
    ],
)
def test_the_layout_in_memory_does_not_matter(view):
    tensor = view(torch.arange(24.0).reshape(4, 6))
    assert FULL.of(tensor) == FULL.of(tensor.clone(memory_format=torch.contiguous_format))


def test_zero_dimensional_empty_and_sparse_tensors_have_digests():
    sparse = torch.eye(3).to_sparse()
    assert len({FULL.of(one) for one in (torch.tensor(1.0), torch.empty(0), sparse)}) == 3
    assert FULL.of(sparse) == FULL.of(torch.eye(3).to_sparse())


def test_a_sample_reads_small_tensors_whole_and_both_ends_of_large_ones():
    small, large = torch.zeros(100), torch.zeros(SAMPLE_FROM)
    for tensor, places in ((small, range(100)), (large, (0, SAMPLE_FROM - 1))):
        for place in places:
            changed = tensor.clone()
            changed[place] = 1
            assert SAMPLED.of(changed) != SAMPLED.of(tensor)


def test_a_sample_misses_what_lies_between_its_blocks():
    changed = torch.zeros(SAMPLE_FROM)
    changed[2000] = 1
    assert SAMPLED.of(changed) == SAMPLED.of(torch.zeros(SAMPLE_FROM))
    assert FULL.of(changed) != FULL.of(torch.zeros(SAMPLE_FROM))


@pytest.mark.parametrize("place", [0, (1 << 20) - 1, 1 << 20, (2 << 20) + 5, (3 << 20) - 1])
@pytest.mark.parametrize("of", [lambda t: t, torch.Tensor.t], ids=["in one piece", "transposed"])
def test_of_a_long_tensor_every_byte_changes_the_digest(of, place):
    tensor = torch.zeros(3 << 20, dtype=torch.uint8)
    before = FULL.of(of(tensor.view(3, -1)))
    tensor[place] = 1
    assert FULL.of(of(tensor.view(3, -1))) != before


def test_a_missing_gradient_is_not_one_of_zeros():
    assert FULL.of_all([None]) != FULL.of_all([torch.zeros(2)])


def test_a_batch_is_known_by_its_rows_in_any_nesting():
    rows = torch.arange(6.0).reshape(3, 2)
    whole, each = batch_digest(([], {"x": rows, "y": torch.arange(3)}), FULL)
    other, shuffled = batch_digest(([], {"x": rows.flip(0), "y": torch.arange(3).flip(0)}), FULL)
    assert whole != other
    assert each == shuffled[::-1]


def test_what_is_no_data_has_no_digest():
    weight = torch.nn.Parameter(torch.ones(2))
    assert batch_digest((weight, weight * 2, None, object()), FULL) is None
