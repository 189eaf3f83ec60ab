"""The error metric, seeding, and the devices that are quick in bf16."""

import math

import numpy as np
import pytest
import torch

from minids.numerics import TOLERANCE, has_fast_bf16, relative_error, seed_everything


@pytest.mark.parametrize(
    ("got", "want", "error"),
    [
        ([1.0, 2.0, -4.0], [1.0, 2.0, -4.0], 0.0),
        ([1.0, 2.5, -4.0], [1.0, 2.0, -4.0], 0.125),  # over the largest wanted value, whatever its sign
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.5], [0.0, 0.0], 0.5),  # nothing is wanted: the error itself
    ],
)
def test_the_error_is_over_the_largest_wanted_value(got, want, error):
    assert relative_error(torch.tensor(got), torch.tensor(want)) == error


def test_nan_and_infinity_never_pass():
    for bad in (math.nan, math.inf):
        for pair in (([bad], [1.0]), ([1.0], [bad]), ([bad], [bad])):
            assert not relative_error(*map(torch.tensor, pair)) < 1


def test_dtypes_are_compared_in_float64():
    want = torch.tensor([1.0, 1 / 3], dtype=torch.float64)
    for dtype, limit in TOLERANCE.items():
        assert relative_error(want.to(dtype), want) < limit
    assert relative_error(torch.tensor([3, 4]), torch.tensor([3, 5])) == 0.2


def test_what_cannot_be_compared_is_refused():
    for shapes in ([(2,), (3,)], [(2, 1), (2,)], [(0,), (0,)]):
        with pytest.raises(ValueError, match=r"shapes are .* and .*; give two equal ones that are not empty"):
            relative_error(*map(torch.zeros, shapes))


def test_a_seed_repeats_numpy_and_torch():
    draws = []
    for seed in (3, 3, 2**40):
        seed_everything(seed)
        draws.append((np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1] != draws[2]


def test_fast_bf16_takes_a_name_or_a_device():
    assert has_fast_bf16("cpu") == has_fast_bf16(torch.device("cpu"))
    assert has_fast_bf16("meta") is False
