"""Any state tree comes back from a checkpoint as it was: types, bits, order, identity, memory."""

from __future__ import annotations

import copy
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from round_trip import stored, there_and_back
from sameness import account
from trees import DTYPES, TYPES, Color, Point, from_bits, trees

from unbroken.capture import encode, structure_from_bytes, structure_to_bytes, types_in


@settings(max_examples=400)
@given(trees())
def test_any_tree_comes_back_the_same(tree):
    assert account(there_and_back(tree.value, TYPES)) == account(tree.value)


@settings(max_examples=100)
@given(trees())
def test_equal_trees_are_stored_as_equal_bytes(tree):
    again = there_and_back(tree.value, TYPES)
    assert stored(again).manifest.state_digest == stored(tree.value).manifest.state_digest
