"""Where each token's choices go, and their sum on the way back: what surrounds the products of kernels.py, in Triton.

A plan sorts the N = M*A choices by expert, within an expert by their order. A general sort compares and moves its keys
many times; here the keys are few, so it is a counting sort, and three steps do it:

    count    each tile of choices counts its own per expert                    counts [E,tiles]
    sum      one cumulative sum over all counts, expert after expert           where each (expert, tile) begins
    place    each choice goes to its tile's begin + how many before it in the tile chose the same expert

The cumulative sum at an expert's last tile is where the expert ends. Nothing is read back by the host, so it never
waits for the GPU; nothing is added atomically, so equal choices always have the same order, and a step the same bits.

A choice that is no expert's, below 0 or from E on, gets no row: place is -1 there, and it adds nothing, as in the loop
of reference.py. To see it as an error would be to wait for the GPU in every layer.
"""

import torch

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

TILE = 128  # choices that are ranked at once, each against each


@triton.jit(do_not_specialize=["N", "tiles"])
def count_kernel(chosen, counts, N, tiles, E: tl.constexpr, TILE: tl.constexpr):
    """counts [E,tiles]: how many choices of this tile are of each expert."""
    BINS: tl.constexpr = triton.next_power_of_2(E + 1)  # the last for what is no expert's
    at, e = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, BINS)
    expert = tl.load(chosen + at, mask=at < N, other=-1)
    count = tl.histogram(tl.where((expert >= 0) & (expert < E), expert, BINS - 1).to(tl.int32), BINS)
    tl.store(counts + e * tiles + tl.program_id(0), count, mask=e < E)


@triton.jit(do_not_specialize=["N", "tiles", "A"])
def place_kernel(chosen, sums, order, token, place, ends, N, tiles, A, E: tl.constexpr, TILE: tl.constexpr):
    """The row of each choice of this tile; order and token are written there, so they are sorted. The first: ends."""
    i, e = tl.arange(0, TILE), tl.arange(0, triton.next_power_of_2(E))
    at = tl.program_id(0) * TILE + i
    expert = tl.load(chosen + at, mask=at < N, other=-1)
    known = (expert >= 0) & (expert < E)
    before = expert * tiles + tl.program_id(0) - 1  # all of the experts before, and of this one in the tiles before
    begin = tl.load(sums + before, mask=known & (before >= 0), other=0)
    rank = tl.sum(((expert[:, None] == expert[None, :]) & (i[None, :] < i[:, None])).to(tl.int32), 1)
    row = tl.where(known, begin + rank, -1).to(tl.int64)
    tl.store(place + at, row, mask=at < N)
    tl.store(order + row, at.to(tl.int64), mask=known)
    tl.store(token + row, (at // A).to(tl.int64), mask=known)
    if tl.program_id(0) == 0:
        tl.store(ends + e, tl.load(sums + (e + 1) * tiles - 1, mask=e < E), mask=e < E)


def dispatch_plan(indices, n_experts):
    """order [N], token [N], place [M,A] and ends [E] of choices `indices` [M,A], as reference.dispatch_plan gives them.

    Differs where a choice is no expert's: place is -1, and order and token past ends[E-1] are unset. Raises ValueError,
    TritonUnavailable.
    """
    triton_env.require("the dispatch plan")
    given = f"indices are {list(indices.shape)} {indices.dtype}"
    need(indices.dim() == 2 and indices.dtype in (torch.int32, torch.int64), f"{given}; give [M,A] int32 or int64")
    need(0 < n_experts < 4096, f"there are {n_experts} experts; a plan is made for 1 to 4095")
    N, A, tiles = indices.numel(), max(indices.shape[1], 1), max(cdiv(indices.numel(), TILE), 1)
    counts, ends = (indices.new_empty(shape, dtype=torch.int32) for shape in ((n_experts, tiles), n_experts))
    order, token, place = (indices.new_empty(shape, dtype=torch.int64) for shape in (N, N, indices.shape))
    chosen, sizes = indices.contiguous(), {"E": n_experts, "TILE": TILE}
    count_kernel[(tiles,)](chosen, counts, N, tiles, **sizes)
    sums = counts.view(-1).cumsum(0, dtype=torch.int32)
    place_kernel[(tiles,)](chosen, sums, order, token, place, ends, N, tiles, A, **sizes)
    return order, token, place, ends


@triton.jit(do_not_specialize=["M"])
def combine_kernel(
    y, place, out, M, D: tl.constexpr, A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """out [M,D]: the sum of each token's A rows of y, in fp32 and in the order of its choices."""
    m, d = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside, total = (m < M)[:, None] & (d < D)[None, :], tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for choice in tl.static_range(A):
        row = tl.load(place + m * A + choice, mask=m < M, other=-1)[:, None]
        total += tl.load(y + row * D + d[None, :], mask=inside & (row >= 0), other=0.0).to(tl.float32)
    tl.store(out + m.to(tl.int64)[:, None] * D + d[None, :], total.to(out.dtype.element_ty), mask=inside)


def combine(y, place):
    """Sum of each token's A rows, [M,D]; y [N,D], place [M,A] int64 with -1 for no row. Raises as dispatch_plan."""
    triton_env.require("the combination")
    given = f"y is {list(y.shape)} and place {list(place.shape)} {place.dtype}"
    need(y.dim() == place.dim() == 2 and place.dtype == torch.int64, f"{given}; give [N,D] and [M,A] int64")
    (M, A), D = place.shape, y.shape[1]
    need(y.device == place.device, f"y is on {y.device} and place on {place.device}; put both on one device")
    out = y.new_empty(M, D)
    wide = min(next_power_of_2(D), 1024)
    grid = (cdiv(M, 2048 // wide), cdiv(D, wide))
    combine_kernel[grid](y.contiguous(), place.contiguous(), out, M, D=D, A=A, BLOCK_M=2048 // wide, BLOCK_D=wide)
    return out
