"""How far apart two tensors are, against definitions that can be done by hand."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from capture.round_trip import stored
from unbroken.capture.tensor_distance import distance, stored_distance
from unbroken.errors import CorruptCheckpointError, StateMismatchError
from unbroken.storage import LocalStorage

SMALL = {
    "int8": [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
    ],
    "int16": [torch.float16, torch.bfloat16],
}
NAN = float("nan")
INF = float("inf")


def of(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


def as_told(a, b):
    """Return the largest differences: absolute, relative, in ULPs."""
    found = distance(a, b)
    return found.max_abs, found.max_rel, found.max_ulp


def test_equal_tensors_are_no_distance_apart():
    found = distance(of(1.0, NAN, -0.0), of(1.0, NAN, -0.0))
    assert (found.count, found.differing, found.first) == (3, 0, None)
    assert (found.max_abs, found.max_rel, found.max_ulp) == (None, None, None)


@pytest.mark.parametrize("number", [1.0, -1.0, 0.0, 1e-45, -1e-45, 3e38, 1.9999999])
def test_neighbours_are_one_ulp_apart(number):
    one = of(number)
    assert distance(one, torch.nextafter(one, of(INF))).max_ulp == 1
    assert distance(torch.nextafter(one, of(-INF)), one).max_ulp == 1


@pytest.mark.parametrize(
    ("bits", "dtype"), [(bits, dtype) for bits in SMALL for dtype in SMALL[bits]], ids=str
)
def test_all_numbers_of_a_small_type_lie_in_a_row_of_single_steps(bits, dtype):
    limits = torch.iinfo(getattr(torch, bits))
    every = torch.arange(limits.min, limits.max + 1, dtype=getattr(torch, bits))
    values = every.view(dtype).to(torch.float64).tolist()
    known = {value: i for i, value in enumerate(values) if not math.isnan(value)}  # one zero
    row = every[[known[value] for value in sorted(known)]].view(dtype)
    found = distance(row[:-1], row[1:])
    assert (found.differing, found.max_ulp) == (len(row) - 1, 1)
    assert distance(row[:1], row[-1:]).max_ulp == len(row) - 1


def test_the_steps_between_the_ends_of_float64_do_not_overflow():
    most = struct.unpack("<q", struct.pack("<d", INF))[0]
    ends = of(-INF, dtype=torch.float64), of(INF, dtype=torch.float64)
    assert distance(*ends).max_ulp == 2 * most


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (0.0, -0.0, (0.0, 0.0, 0)),
        (-0.0, 1e-45, (2.0**-149, 1.0, 1)),
        (1.0, 1.5, (0.5, 0.5 / 1.5, 2**22)),
        (-1.0, 1.0, (2.0, 2.0, 2 * 0x3F800000)),
        (1.0, INF, (INF, INF, 0x7F800000 - 0x3F800000)),
        (-INF, INF, (INF, INF, 2 * 0x7F800000)),
        (1.0, NAN, (None, None, None)),
    ],
)
def test_two_numbers_are_so_far_apart(a, b, expected):
    assert as_told(of(a), of(b)) == expected
    assert as_told(of(b), of(a)) == expected


def test_numbers_whose_difference_no_float64_holds_have_a_relative_one():
    a, b = of(1.5e308, dtype=torch.float64), of(-1.5e308, dtype=torch.float64)
    assert as_told(a, b)[:2] == (INF, 2.0)


def test_a_nan_is_counted_and_left_out_of_the_numbers():
    found = distance(of(1.0, NAN, NAN, 2.0), of(NAN, 1.0, NAN, 2.5))
    assert (found.differing, found.nan_a, found.nan_b) == (3, 1, 1)
    assert (found.max_abs, found.max_ulp) == (0.5, 2**21)


def test_nans_of_other_payloads_differ():
    a, b = (torch.tensor([bits]).int().view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))
    found = distance(a, b)
    assert (found.differing, found.nan_a, found.nan_b, found.max_ulp) == (1, 1, 1, None)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_the_ends_of_an_integer_type_are_told_exactly(dtype):
    limits = torch.iinfo(dtype)
    assert as_told(of(limits.min, dtype=dtype), of(limits.max, dtype=dtype)) == (
        limits.max - limits.min,
        pytest.approx(2, abs=0.01),
        None,
    )


def test_large_unsigned_integers_are_told_exactly():
    a, b = of(2**64 - 1, dtype=torch.uint64), of(2**64 - 4, dtype=torch.uint64)
    assert distance(a, b).max_abs == 3


@pytest.mark.parametrize(
    ("dtype", "part", "bits"),
    [
        (torch.complex32, torch.float16, 10),
        (torch.complex64, torch.float32, 23),
        (torch.complex128, torch.float64, 52),
    ],
    ids=str,
)
def test_a_complex_number_is_as_far_as_its_absolute_value_and_its_worse_part(dtype, part, bits):
    a, b = (of(*parts, dtype=part).view(dtype) for parts in ((1.0, 2.0), (4.0, 6.0)))
    found = distance(a, b)
    assert (found.count, found.first, found.max_abs) == (1, (0,), 5.0)
    assert found.max_ulp == 2 * 2**bits  # from 1 to 4; from 2 to 6 it is 1.5 as many


def test_a_conjugated_view_is_compared_as_what_it_shows():
    a = torch.tensor([1 + 2j])
    assert distance(a.conj(), torch.tensor([1 - 2j])).differing == 0
    assert distance(a.conj(), a).differing == 1


@pytest.mark.parametrize("dtype", [torch.bool, torch.float4_e2m1fn_x2, torch.bits8], ids=str)
def test_a_type_without_numbers_is_compared_by_its_bytes_alone(dtype):
    a, b = (torch.tensor(one, dtype=torch.uint8).view(dtype) for one in ([0, 1], [0, 0]))
    found = distance(a, b)
    assert (found.differing, found.first) == (1, (1,))
    assert (found.max_abs, found.max_rel, found.max_ulp) == (None, None, None)


def test_the_first_difference_is_told_by_its_index():
    a = torch.zeros(3, 4, 5)
    b = a.clone()
    b[1, 2, 3], b[2, 0, 0] = 1.0, 5.0
    assert distance(a, b).first == (1, 2, 3)
    assert distance(a.transpose(0, 2), b.transpose(0, 2)).first == (0, 0, 2)


def test_a_scalar_has_an_empty_index():
    assert distance(torch.tensor(1.0), torch.tensor(2.0)).first == ()


def test_pieces_add_up_to_the_whole(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(1000, generator=generator)
    b = torch.where(torch.rand(1000, generator=generator) < 0.05, a * 1.01, a)
    whole = distance(a, b)
    monkeypatch.setattr("unbroken.capture.tensor_distance._CHUNK", 7)
    assert distance(a, b) == whole


@pytest.mark.parametrize("other", [torch.zeros(3), torch.zeros(2, dtype=torch.half)], ids=str)
def test_other_types_cannot_be_compared_by_element(other):
    with pytest.raises(StateMismatchError, match=r"expected float32\[2\], found float"):
        distance(torch.zeros(2), other)


class TestStored:
    """Tensors that lie in checkpoints."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
    def test_a_leaf_is_read_in_its_own_type(self, dtype):
        a, b = (stored({"x": torch.tensor([[1.0, value]]).to(dtype)}) for value in (2.0, 3.0))
        found = stored_distance("x", a, b)
        assert (found.first, found.max_abs) == ((0, 1), 1.0)

    def test_a_type_that_the_manifest_does_not_know_is_given(self):
        tensors = (torch.tensor([1.0 + value], dtype=torch.complex128) for value in (0, 2j))
        a, b = (stored({"x": tensor}) for tensor in tensors)
        assert stored_distance("x", a, b, ("complex128", (1,))).max_abs == 2.0
        assert stored_distance("x", a, b).count == 16  # else it is bytes

    def test_a_given_type_that_does_not_fit_is_not_believed(self):
        a, b = (stored({"x": torch.tensor([value])}) for value in (1.0, 2.0))
        for wrong in (("float64", (1,)), ("float32", (2,)), ("no_such_type", (1,))):
            assert stored_distance("x", a, b, wrong).max_abs == 1.0

    def test_damaged_bytes_are_never_compared(self, tmp_path):
        a = stored({"x": torch.tensor([1.0])})
        b = stored({"x": torch.tensor([2.0])}, storage=LocalStorage(tmp_path))
        file = tmp_path / "checkpoint-1" / "state.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        with pytest.raises(CorruptCheckpointError, match="x: is damaged"):
            stored_distance("x", a, b)
