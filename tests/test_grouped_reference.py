"""The grouped products in equations against torch's own and autograd; the plan and the tiles that lead to them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import grouped_mm

from minids.lab.exercises import l09
from minids.moe import reference
from minids.numerics import TOLERANCE, relative_error

LOADS = [(5, 3, 8), (0, 7, 0, 0, 9, 0), (0, 0, 12), (17, 0), (1, 1, 1, 1), (128,), (64, 0, 63, 1)]
loads = pytest.mark.parametrize("counts", LOADS)
some_loads = st.lists(st.integers(0, 40), min_size=1, max_size=9)


def ends_of(counts):
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def drawn(counts, K=24, J=16, dtype=torch.float64):
    return [torch.randn(*shape, dtype=dtype) for shape in ((sum(counts), K), (len(counts), J, K), (sum(counts), J))]


@loads
def test_the_product_is_each_row_by_its_expert_s_matrix(counts):
    x, weights, _ = drawn(counts)
    owner = [e for e, count in enumerate(counts) for _ in range(count)]
    want = torch.einsum("njk,nk->nj", weights[owner], x)
    assert relative_error(reference.grouped_gemm(x, weights, ends_of(counts)), want) < TOLERANCE[torch.float64]


@loads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_equal_torch_s(counts, dtype):
    x, weights, dy = drawn(counts, dtype=dtype)
    ends, leaf = ends_of(counts), weights.clone().requires_grad_()
    y = grouped_mm(x, leaf.transpose(1, 2), offs=ends)
    (dw,) = torch.autograd.grad(y, leaf, dy)
    assert relative_error(reference.grouped_gemm(x, weights, ends), y) < TOLERANCE[dtype]
    got = reference.grouped_gemm_dw(x, dy, ends)
    assert got.dtype == dtype and relative_error(got, dw) < TOLERANCE[dtype]


@loads
def test_the_gradient_is_autograd_s_and_zero_without_rows(counts):
    x, weights, dy = drawn(counts)
    ends, leaf = ends_of(counts), weights.requires_grad_()
    (want,) = torch.autograd.grad(reference.grouped_gemm(x, leaf, ends), leaf, dy)
    got = reference.grouped_gemm_dw(x, dy, ends)
    assert relative_error(got, want) < TOLERANCE[torch.float64]
    for expert, count in enumerate(counts):
        assert got[expert].any() == (count > 0)


def test_no_rows_at_all():
    x, weights, dy = drawn((0, 0, 0))
    ends = ends_of((0, 0, 0))
    assert reference.grouped_gemm(x, weights, ends).shape == (0, 16)
    assert torch.equal(reference.grouped_gemm_dw(x, dy, ends), torch.zeros(3, 16, 24, dtype=torch.float64))


@pytest.mark.parametrize(("M", "A", "E"), [(0, 2, 4), (1, 1, 1), (1, 3, 9), (7, 2, 5), (40, 6, 64)])
def test_a_plan_sorts_by_expert_and_place_undoes_it(M, A, E):
    indices = torch.rand(M, E).topk(A).indices
    plan, flat = reference.dispatch_plan(indices, E), indices.flatten().tolist()
    want = sorted(range(M * A), key=lambda position: flat[position])  # Python's sort is stable
    assert plan.order.tolist() == want
    assert plan.token.tolist() == [position // A for position in want]
    assert plan.place.shape == indices.shape and plan.ends.dtype == torch.int32
    assert torch.equal(plan.order[plan.place.flatten()], torch.arange(M * A))
    assert plan.ends.tolist() == [sum(choice <= expert for choice in flat) for expert in range(E)]


@settings(max_examples=100, deadline=None)
@given(some_loads, st.integers(1, 17))
def test_tiles_hold_every_row_once_and_none_crosses(counts, block):
    n, E = sum(counts), len(counts)
    expert, first = l09.tile_table(ends_of(counts), n, block)
    assert len(expert) == len(first) == n // block + E
    bounds, seen = [0, *ends_of(counts).tolist()], []
    for e, row in zip(expert.tolist(), first.tolist(), strict=True):
        if e == E:
            assert row == n
            continue
        assert bounds[e] <= row < bounds[e + 1] and (row - bounds[e]) % block == 0
        seen += range(row, min(row + block, bounds[e + 1]))
    assert seen == list(range(n))


def test_plan_and_tiles_never_look_at_a_value():
    indices = torch.empty(6, 2, dtype=torch.int64, device="meta")
    plan = reference.dispatch_plan(indices, 5)
    expert, first = l09.tile_table(plan.ends, 12, 4)
    assert expert.shape == first.shape == (8,)
