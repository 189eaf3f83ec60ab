"""Right answers to lesson 09 in other styles: plans and tables by counting and by loops, kernels of other shapes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids import triton_env
from minids.lab.tiles import tl, triton

right, kernels = Answers(), Answers()


@right("09.1")
def by_counting(indices, n_experts):
    flat = indices.flatten()
    hot = F.one_hot(flat, n_experts)
    ends = hot.sum(0).cumsum(0)
    place = (ends - hot.sum(0))[flat] + ((hot.cumsum(0) - 1) * hot).sum(1)
    order = torch.zeros_like(flat).scatter_(0, place, torch.arange(flat.numel()))
    token = torch.arange(indices.shape[0]).repeat_interleave(indices.shape[1])[order]
    return order, token, place.unflatten(0, indices.shape), ends


@right("09.1")
def expert_by_expert(indices, n_experts):
    flat, order, ends = indices.flatten().tolist(), [], []
    for e in range(n_experts):
        order += [position for position, expert in enumerate(flat) if expert == e]
        ends.append(len(order))
    place = [0] * len(flat)
    for row, position in enumerate(order):
        place[position] = row
    token = [position // indices.shape[1] for position in order]
    return [torch.tensor(order), torch.tensor(token), torch.tensor(place).view(indices.shape), torch.tensor(ends)]


@right("09.1")
def in_numpy_and_32_bits(indices, n_experts):
    flat = indices.numpy().ravel()
    order = np.lexsort((np.arange(flat.size), flat)).astype(np.int32)
    place = np.empty_like(order)
    place[order] = np.arange(flat.size)
    ends = np.cumsum(np.bincount(flat, minlength=n_experts))
    parts = order, order // indices.shape[1], place.reshape(indices.shape), ends
    return tuple(map(torch.from_numpy, parts))


@right("09.2")
def tile_by_tile(ends, n, block):
    tiles = n // block + len(ends)
    expert, first = torch.full((tiles,), len(ends)), torch.full((tiles,), n)
    tile = begin = 0
    for e, end in enumerate(ends.tolist()):
        for row in range(begin, end, block):
            expert[tile], first[tile] = e, row
            tile += 1
        begin = end
    return expert, first


@right("09.2")
def by_repeating(ends, n, block):
    begins = F.pad(ends, (1, 0))[:-1]
    tiles = -(-(ends - begins) // block)
    spare = n // block + len(ends) - tiles.sum()
    expert = torch.arange(len(ends) + 1).repeat_interleave(torch.cat([tiles, spare[None]]))
    inside = torch.arange(len(expert)) - F.pad(tiles.cumsum(0), (1, 0))[expert]
    first = torch.cat([begins, ends.new_tensor([n])])[expert] + inside * block
    return expert, first.clamp(max=n).where(expert < len(ends), n)


@right("09.2")
def by_all_that_could_be(ends, n, block):
    E, tiles = len(ends), n // block + len(ends)
    rows = F.pad(ends, (1, 0))[:-1, None] + block * torch.arange(tiles)
    real = (rows < ends[:, None]).flatten()
    found = torch.argsort(~real, stable=True)[:tiles]
    expert = torch.arange(E).repeat_interleave(tiles)[found]
    return [expert.masked_fill(~real[found], E).int(), rows.flatten()[found].masked_fill(~real[found], n).int()]


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit
def block_of(pointer, row, column, stride, rows, columns):
    at = tl.expand_dims(row, 1) * stride + tl.expand_dims(column, 0)
    return tl.load(pointer + at, mask=tl.expand_dims(row < rows, 1) & tl.expand_dims(column < columns, 0), other=0.0)


@kernels("09.3")
@triton.jit
def turned_by_a_helper(x, weights, y, ends, expert_of, first_of, E, K, J,
                       BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    tile, j = tl.program_id(0), tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    expert = tl.load(expert_of + tile)
    if expert != E:
        row, end = tl.load(first_of + tile) + tl.arange(0, BLOCK_M), tl.load(ends + expert)
        total = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
        for step in range(tl.cdiv(K, BLOCK_K)):
            k = step * BLOCK_K + tl.arange(0, BLOCK_K)
            matrix = block_of(weights + expert.to(tl.int64) * J * K, j, k, K, J, K)
            total = tl.dot(block_of(x, row, k, K, end, K), tl.trans(matrix), total)
        here = (row[:, None] < end) & (j[None, :] < J)
        tl.store(y + row[:, None] * J + j[None, :], total.to(y.dtype.element_ty), mask=here)


@kernels("09.3")
@triton.jit
def matrix_times_rows(x, weights, y, ends, expert_of, first_of, E, K, J,
                      BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    tile, m = tl.program_id(0), tl.arange(0, BLOCK_M)[None, :]
    j, k = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[:, None], tl.arange(0, BLOCK_K)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    row = tl.load(first_of + tile) + m
    ours, wide = row < tl.load(ends + expert), j < J
    left, total = K, tl.zeros((BLOCK_J, BLOCK_M), tl.float32)
    x += row * K + k[:, None]
    weights += (expert * J + j) * K + k[None, :]
    while left > 0:
        rows = tl.load(x, mask=ours & (k < left)[:, None])
        rows = tl.where(ours & (k < left)[:, None], rows, 0.0).to(tl.float32)
        matrix = tl.load(weights, mask=wide & (k < left)[None, :], other=0.0).to(tl.float32)
        total += tl.dot(matrix, rows, input_precision="ieee")
        x += BLOCK_K
        weights += BLOCK_K
        left -= BLOCK_K
    tl.store(y + row * J + j, total, mask=ours & wide)


@kernels("09.4")
@triton.jit
def loaded_as_it_is_needed(x, dy, dw, ends, K, J,
                           BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    expert, m = tl.program_id(0), tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)[:, None]
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    begin, end = tl.load(ends + tl.maximum(expert - 1, 0)), tl.load(ends + expert)
    row = tl.where(expert == 0, 0, begin) + m
    total = tl.zeros((BLOCK_J, BLOCK_K), tl.float32)
    for _ in range(tl.cdiv(end - tl.where(expert == 0, 0, begin), BLOCK_M)):
        left = tl.load(dy + row[None, :] * J + j, mask=(row < end)[None, :] & (j < J), other=0.0)
        total = tl.dot(left, tl.load(x + row[:, None] * K + k, mask=(row < end)[:, None] & (k < K), other=0.0), total)
        row += BLOCK_M
    tl.store(dw + (expert * J + j) * K + k, total.to(dw.dtype.element_ty), mask=(j < J) & (k < K))


@kernels("09.4")
@triton.jit
def turned_at_the_end(x, dy, dw, ends, K, J,
                      BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    expert, start = tl.program_id(0), 0
    j = tl.program_id(1) * BLOCK_J + tl.arange(0, BLOCK_J)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    if expert > 0:
        start = tl.load(ends + expert - 1)
    end = tl.load(ends + expert)
    total = tl.zeros((BLOCK_K, BLOCK_J), tl.float32)
    while start < end:
        row = start + tl.arange(0, BLOCK_M)
        left = tl.trans(block_of(x, row, k, K, end, K))
        total += tl.dot(left, block_of(dy, row, j, J, end, J))
        start += BLOCK_M
    here = (k < K)[:, None] & (j < J)[None, :]
    tl.store(dw + expert * J * K + j[None, :] * K + k[:, None], total, mask=here)


@kernels("09.5")
@triton.jit
def by_the_exponential(x, weights, act, ends, expert_of, first_of, E, K, F,
                       BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    tile, f = tl.program_id(0), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    row, end = tl.load(first_of + tile) + tl.arange(0, BLOCK_M), tl.load(ends + expert)
    weights += expert * 2 * F * K
    up = tl.zeros((BLOCK_F, BLOCK_M), tl.float32)
    gate = up
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rows = tl.trans(block_of(x, row, k, K, end, K))
        gate = tl.dot(block_of(weights, f, k, K, F, K), rows, gate)
        up = tl.dot(block_of(weights + F * K, f, k, K, F, K), rows, up)
    value = up * gate / (1 + tl.exp(-gate))
    tl.store(act + row[None, :] * F + f[:, None], value, mask=(row < end)[None, :] & (f < F)[:, None])


@kernels("09.5")
@triton.jit
def last_block_apart(x, weights, act, ends, expert_of, first_of, E, K, F,
                     BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    tile, m, k = tl.program_id(0), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    expert = tl.load(expert_of + tile)
    if expert == E:
        return
    row = tl.load(first_of + tile) + m
    ours, wide = (row < tl.load(ends + expert))[:, None], (f < F)[None, :]
    x += row[:, None] * K + k[None, :]
    gates = weights + (2 * expert * F + f[None, :]) * K + k[:, None]
    ups = gates + F * K
    gate, up = tl.zeros((BLOCK_M, BLOCK_F), tl.float32), tl.zeros((BLOCK_M, BLOCK_F), tl.float32)
    whole = K // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        rows = tl.load(x + start, mask=ours, other=0.0)
        gate += tl.dot(rows, tl.load(gates + start, mask=wide, other=0.0))
        up += tl.dot(rows, tl.load(ups + start, mask=wide, other=0.0))
    if whole < K:
        rows = tl.load(x + whole, mask=ours & (k < K - whole)[None, :], other=0.0)
        there = wide & (k < K - whole)[:, None]
        gate += tl.dot(rows, tl.load(gates + whole, mask=there, other=0.0))
        up += tl.dot(rows, tl.load(ups + whole, mask=there, other=0.0))
    tl.store(act + row[:, None] * F + f[None, :], tl.sigmoid(gate) * up * gate, mask=ours & wide)


@pytest.mark.skipif(triton_env.mode() != "interpreter", reason="kernels are counted in the interpreter")
@kernels.each
def test_a_right_kernel_passes(name, answer):
    passes(name, answer)
