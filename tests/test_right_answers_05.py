"""Right kernels to lesson 05 in other styles: other loops, grids, blocks and masks."""

import pytest
from right_answers import Answers, passes

from minids import triton_env
from minids.lab.tiles import tl, triton

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(triton_env.mode() != "interpreter", reason="kernels are counted in the interpreter")
right = Answers()


@right("05.1")
@triton.jit
def lanes_far_apart(x, out, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) + tl.arange(0, BLOCK) * tl.num_programs(0)
    tl.store(out + at, tl.load(x + at) * factor)


@right("05.1")
@triton.jit
def halves_from_the_end(x, out, factor, BLOCK: tl.constexpr):
    half: tl.constexpr = BLOCK // 2
    x += (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
    out += (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK
    for part in tl.static_range(2):
        at = part * half + tl.arange(0, half)
        tl.store(out + at, factor * tl.load(x + at))


@right("05.1")
@triton.jit
def one_by_one(x, out, factor, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    for i in range(BLOCK):
        tl.store(out + begin + i, tl.load(x + begin + i) * factor)


@right("05.2")
@triton.jit
def last_program_apart(x, y, out, n, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    at = begin + tl.arange(0, BLOCK)
    if begin + BLOCK <= n:
        tl.store(out + at, tl.load(x + at) + tl.load(y + at))
    else:
        left = tl.arange(0, BLOCK) < n - begin
        tl.store(out + at, tl.load(x + at, left, 0) + tl.load(y + at, left, 0), left)


@right("05.2")
@triton.jit
def by_descriptors(x, y, out, n, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    left = tl.make_tensor_descriptor(x, [n], [1], [BLOCK])
    right = tl.make_tensor_descriptor(y, [n], [1], [BLOCK])
    tl.make_tensor_descriptor(out, [n], [1], [BLOCK]).store([begin], left.load([begin]) + right.load([begin]))


@right("05.2")
@triton.jit
def while_something_is_left(x, y, out, n, BLOCK: tl.constexpr):
    begin = tl.program_id(0) * BLOCK
    while begin < n:
        at = begin + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at, mask=at < n) + tl.load(y + at, mask=at < n), mask=at < n)
        begin += tl.num_programs(0) * BLOCK


@right("05.3")
@triton.jit
def neighbouring_rows(x, weight, y, M, N, stride, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < N)
    each = tl.cdiv(M, tl.num_programs(0))
    first = tl.program_id(0) * each
    for row in range(first, min(first + each, M)):
        value = tl.load(x + row * stride + column, mask=column < N)
        wide = tl.where(column < N, value.to(tl.float32), 0.0)
        r = tl.rsqrt(tl.sum(wide * wide / N) + eps)
        tl.store(y + row * N + column, (wide * r).to(value.dtype) * w, mask=column < N)


@right("05.3")
@triton.jit
def four_rows_at_once(x, weight, y, M, N, stride, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < N, other=0.0)
    for first in range(tl.program_id(0), M, 4 * tl.num_programs(0)):
        row = first + tl.num_programs(0) * tl.arange(0, 4)[:, None]
        here = (row < M) & (column < N)
        value = tl.load(x + row * stride + column, mask=here, other=0.0).to(tl.float32)
        root = tl.sqrt(tl.sum(value * value, 1, keep_dims=True) / N + eps)
        tl.store(y + row * N + column, value / root * w, mask=here)


@triton.jit
def lanes_in_float64(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float64)


@right("05.3")
@triton.jit
def with_a_helper(x, weight, y, M, N, stride, eps, BLOCK: tl.constexpr):
    column, row = tl.arange(0, BLOCK), tl.program_id(0)
    w = lanes_in_float64(weight + column, column < N)
    while row < M:
        value = lanes_in_float64(x + row * stride + column, column < N)
        tl.store(y + row * N + column, value * w / tl.sqrt(tl.sum(value * value, 0) / N + eps), mask=column < N)
        row += tl.num_programs(0)


@right("05.4")
@triton.jit
def a_sum_for_each_lane(x, y, N, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * N, tl.arange(0, BLOCK)
    tops, totals = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, BLOCK):
        value = tl.load(x + row + start + column, mask=start + column < N, other=-float("inf")).to(tl.float32)
        new = tl.maximum(tops, value)
        totals = totals * tl.exp(tops - new) + tl.exp(value - new)
        tops = new
    largest = tl.max(tops, 0)
    total = tl.sum(totals * tl.exp(tops - largest), 0)
    for start in range(0, N, BLOCK):
        value = tl.load(x + row + start + column, mask=start + column < N).to(tl.float32)
        tl.store(y + row + start + column, tl.exp(value - largest) / total, mask=start + column < N)


@right("05.4")
@triton.jit
def logarithms_from_the_end(x, y, N, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * N, tl.arange(0, BLOCK)
    log = -float("inf")
    start = (tl.cdiv(N, BLOCK) - 1) * BLOCK
    while start >= 0:
        value = tl.load(x + row + start + column, mask=start + column < N, other=-1e9).to(tl.float32)
        top = tl.max(value, 0)
        block = top + tl.log(tl.sum(tl.exp(value - top), 0))
        high = tl.maximum(log, block)
        log = high + tl.log(tl.exp(log - high) + tl.exp(block - high))
        start -= BLOCK
    for start in range(0, N, BLOCK):
        value = tl.load(x + row + start + column, mask=start + column < N).to(tl.float32)
        tl.store(y + row + start + column, tl.exp(value - log), mask=start + column < N)


@right("05.4")
@triton.jit
def rescaled_where_it_grows(x, y, N, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * N, tl.arange(0, BLOCK)
    largest, total = -float("inf"), 0.0
    for start in range(0, N, BLOCK):
        inside = start + column < N
        value = tl.load(x + row + start + column, mask=inside).to(tl.float32)
        top = tl.max(tl.where(inside, value, -float("inf")))
        if top > largest:
            total *= tl.exp2((largest - top) * 1.44269504)
            largest = top
        total += tl.sum(tl.where(inside, tl.exp(value - largest), 0.0))
    for start in range(0, N, BLOCK):
        value = tl.load(x + row + start + column, mask=start + column < N).to(tl.float32)
        tl.store(y + row + start + column, tl.exp(value - largest) / total, mask=start + column < N)


@right("05.5")
@triton.jit
def x_instead_of_n(x, weight, r, dy, dx, M, N, BLOCK: tl.constexpr):
    column, row = tl.arange(0, BLOCK), tl.program_id(0)
    w = tl.load(weight + column, column < N, 0.0)
    while row < M:
        one, value = tl.load(r + row), tl.load(x + row * N + column, column < N, 0.0)
        g = w * tl.load(dy + row * N + column, column < N, 0.0)
        mean = tl.sum(value * g, axis=0) / N
        tl.store(dx + row * N + column, one * g - one * one * one * value * mean, column < N)
        row += tl.num_programs(0)


@right("05.5")
@triton.jit
def pairs_of_rows(x, weight, r, dy, dx, M, N, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    w = tl.load(weight + column, mask=column < N)
    for first in range(2 * tl.program_id(0), M, 2 * tl.num_programs(0)):
        row = first + tl.arange(0, 2)
        here = (row < M)[:, None] & (column < N)[None, :]
        at, one = row[:, None] * N + column[None, :], tl.load(r + row, mask=row < M)[:, None]
        n = tl.where(here, tl.load(x + at, mask=here) * one, 0.0)
        g = tl.where(here, tl.load(dy + at, mask=here) * w[None, :], 0.0)
        tl.store(dx + at, (g - n * tl.sum(n * g / N, 1, keep_dims=True)) * one, mask=here)


@right.each
def test_a_right_kernel_passes(name, answer):
    passes(name, answer)
