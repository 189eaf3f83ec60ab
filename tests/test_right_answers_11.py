"""Right answers to lesson 11 in other styles: sums in whole numbers, products tile by tile and at once, its kernel."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids import triton_env
from minids.fp8 import reference
from minids.lab.tiles import tl, triton

right, kernels = Answers(), Answers()
my_add_limited = reference.add_limited


@right("11.1")
def in_plain_python(acc, products, bits):
    sums = []
    for old, new in zip(acc.flatten().tolist(), products.flatten(0, -2).tolist(), strict=True):
        unit = 2.0 ** (math.frexp(max(map(abs, [old, *new])))[1] - bits)
        sums.append(sum(int(term / unit) for term in [old, *new]) * unit)
    return torch.tensor(sums).view(acc.shape)


@right("11.1")
def in_whole_numbers(acc, products, bits):
    terms = torch.cat((products, acc[..., None]), -1).double()
    places = torch.frexp(terms.abs().max(-1).values).exponent - bits
    whole = torch.ldexp(terms, -places[..., None].double()).long()
    return torch.ldexp(whole.sum(-1).double(), places.double()).float()


@right("11.1")
def what_is_left_over_is_taken_off(acc, products, bits):
    largest = torch.maximum(acc.abs(), products.abs().amax(-1))
    unit = torch.exp2((torch.frexp(largest)[1] - bits).double())
    kept = products - torch.fmod(products, unit[..., None])
    return (acc - torch.fmod(acc, unit) + torch.einsum("...n->...", kept)).to(acc.dtype)


@right("11.2")
def part_by_part(a, b, bits, promote):
    def part(begin, end):
        steps = [slice(k, min(k + 32, end)) for k in range(begin, end, 32)]
        products = (torch.einsum("mk,nk->mnk", a[:, s], b[:, s]) for s in steps)
        start = torch.zeros(len(a), len(b))
        return functools.reduce(lambda acc, new: my_add_limited(acc, new, bits), products, start)

    K = a.shape[1]
    return sum(part(k, min(k + (promote or K), K)) for k in range(0, K, promote or K))


@right("11.2")
def promoted_before_the_next(a, b, bits, promote):
    total, acc = torch.zeros(len(b), len(a), dtype=torch.float64), torch.zeros(len(b), len(a))
    for k in range(0, a.shape[1], 32):
        if promote is not None and k % promote == 0:
            total, acc = total + acc, torch.zeros_like(acc)
        acc = my_add_limited(acc, b[:, None, k : k + 32] * a[None, :, k : k + 32], bits)
    return (total + acc).float().T


@right("11.2")
def padded_with_zeros(a, b, bits, promote):
    a, b = (F.pad(one, (0, -one.shape[1] % 32)) for one in (a, b))
    steps = (a[:, None] * b).unflatten(-1, (-1, 32)).unbind(2)
    total = acc = torch.zeros(len(a), len(b))
    for number, products in enumerate(steps, 1):
        acc = my_add_limited(acc, products, bits)
        if number == len(steps) or (promote and number % (promote // 32) == 0):
            total, acc = total + acc, 0 * acc
    return total


@right("11.3")
def decoded_as_a_whole(x_fp8, x_scale, w_fp8, w_scale):
    N, K = w_fp8.shape
    x = x_fp8.float() * x_scale.repeat_interleave(128, 1)[:, :K]
    return F.linear(x, w_fp8.float() * torch.kron(w_scale.contiguous(), torch.ones(128, 128))[:N, :K])


@right("11.3")
def in_one_einsum(x_fp8, x_scale, w_fp8, w_scale):
    (M, K), N, (blocks, tiles) = x_fp8.shape, len(w_fp8), w_scale.shape
    x = F.pad(x_fp8.float(), (0, 128 * tiles - K)).view(M, tiles, 128)
    w = F.pad(w_fp8.float(), (0, 128 * tiles - K, 0, 128 * blocks - N)).view(blocks, 128, tiles, 128)
    return torch.einsum("mtk,bntk,mt,bt->mbn", x, w, x_scale, w_scale).flatten(1)[:, :N]


@right("11.3")
def block_by_block(x_fp8, x_scale, w_fp8, w_scale):
    rows = []
    for w, scales in zip(w_fp8.double().split(128), w_scale, strict=True):
        tiles = zip(x_fp8.double().split(128, 1), w.split(128, 1), x_scale.unbind(1), scales, strict=True)
        rows.append(sum((one @ two.T * s[:, None] * t).T for one, two, s, t in tiles))
    return torch.cat(rows).T.float()


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)


# Kernels -------------------------------------------------------------------------------------------------------------


@kernels("11.4")
@triton.jit
def pointers_that_walk(x, x_scale, w, w_scale, y, M, N, K,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    k, tiles = tl.arange(0, TILE), tl.cdiv(K, TILE)
    x += m * K + k[None, :]
    w += n * K + k[:, None]
    x_scale += m * tiles
    w_scale += (tl.program_id(1) * BLOCK_N // TILE) * tiles  # BLOCK_N divides TILE: one for all columns
    acc, left = tl.zeros((BLOCK_M, BLOCK_N), tl.float32), K
    while left > 0:
        a = tl.load(x, mask=(m < M) & (k[None, :] < left), other=0.0)
        b = tl.load(w, mask=(n < N) & (k[:, None] < left), other=0.0)
        acc += tl.dot(a, b) * (tl.load(x_scale, mask=m < M) * tl.load(w_scale))
        x += TILE
        w += TILE
        x_scale += 1
        w_scale += 1
        left -= TILE
    tl.store(y + m * N + n, acc, mask=(m < M) & (n < N))


@kernels("11.4")
@triton.jit
def steps_of_32(x, x_scale, w, w_scale, y, M, N, K,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for t in range(tl.cdiv(K, TILE)):
        inner = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.static_range(0, TILE, 32):
            at = t * TILE + step + tl.arange(0, 32)
            a = tl.load(x + m[:, None] * K + at[None, :], mask=(m < M)[:, None] & (at < K)[None, :], other=0.0)
            b = tl.load(w + n[:, None] * K + at[None, :], mask=(n < N)[:, None] & (at < K)[None, :], other=0.0)
            inner = tl.dot(a, tl.trans(b), inner)
        sx = tl.load(x_scale + m * tl.cdiv(K, TILE) + t, mask=m < M, other=1.0)
        sw = tl.load(w_scale + n // TILE * tl.cdiv(K, TILE) + t, mask=n < N, other=1.0)
        acc += sx[:, None] * inner * sw[None, :]
    tl.store(y + m[:, None] * N + n[None, :], acc, mask=(m < M)[:, None] & (n < N)[None, :])


@kernels("11.4")
@triton.jit
def rows_of_w_first(x, x_scale, w, w_scale, y, M, N, K,
                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k, tiles = tl.arange(0, TILE), tl.cdiv(K, TILE)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(tiles):
        t = tiles - 1 - i
        at = t * TILE + k
        b = tl.load(w + n * K + at[None, :], mask=(n < N) & (at < K)[None, :], other=0.0)
        a = tl.load(x + m * K + at[:, None], mask=(m < M) & (at < K)[:, None], other=0.0)
        sx = tl.where(m < M, tl.load(x_scale + m * tiles + t, mask=m < M), 0.0)
        sw = tl.where(n < N, tl.load(w_scale + n // TILE * tiles + t, mask=n < N), 0.0)
        acc += tl.dot(b, a) * sw * sx
    tl.store(y + m * N + n, acc, mask=(m < M) & (n < N))


@pytest.mark.skipif(triton_env.mode() != "interpreter", reason="kernels are counted in the interpreter")
@kernels.each
def test_a_right_kernel_passes(name, answer):
    passes(name, answer)
