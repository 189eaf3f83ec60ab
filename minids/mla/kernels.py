"""Multi-head Latent Attention for decoding, in Triton: one query a sequence over its cached latents.

    s_j = (q . [c_j | k_rope_j]) * scale      o = sum_j softmax(s)_j c_j      (the absorbed form, see reference.py)

All H heads share one cached row [C+R] per position, and its first C numbers are key and value at once. So a block of
heads loads each row ONCE, multiplies the queries with it, and the weights with its first C numbers: 2*H*(2C+R) FLOPs
for 2*(C+R) bytes in bf16, 242 FLOPs a byte at H = 128: at the ridge of a Hopper GPU, where MHA has 1.

Softmax online (2205.14135): the largest score so far is carried as `m`, and what was summed is scaled down where it
grows. exp2 is the GPU's own exponential, so scale * log2(e) is folded into the scores.

Split-KV: one program would walk a long sequence alone while other processors idle. Each sequence is cut into `splits`
parts; a part leaves its result, normalised, and its log-sum-exp, and `merge_kernel` weighs the results by those:

    o = sum_i exp(lse_i - lse) o_i      lse = log sum_i exp(lse_i)

On tensor cores the first side of a product (M) comes in 64 rows (wgmma, Hopper). 64 heads fill it. With 16 or 32 heads
`SWAP` turns both products round, so that the 64 positions, then the C numbers, are M and the heads are N.
Two warpgroups share the columns of a product. Of one whose result goes on into another, though, Triton gives each all
of them (to keep a row's maximum within a warp): twice the work. Adding scaled parts, and a branch, break that chain.

Not here: pages. minids keeps a sequence's latents in one contiguous piece, [S,C+R]; a server that shares memory among
sequences of unknown length keeps pages of 64 positions, and would add a table of their addresses to `decode_kernel`.
"""

import functools

import torch

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

LOG2_E = 1.4426950408889634
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_SPLITS = 128


@triton.jit
def add_product(a, b, acc):
    """acc + a b, on tensor cores for 16-bit numbers; fp32 stays fp32 (tf32 would keep 10 bits of 23)."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["S", "splits"])  # they change from token to token
def decode_kernel(
    q, latents, lengths, out, lse, scale, rows, heads, S, stride_b, splits,
    C: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of the T*H rows of q [B,T*H,C+R], one part of one sequence; out [B,splits,T*H,C], lse without C."""
    batch, split = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    c, r, n = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    AXIS: tl.constexpr = 0 if SWAP else 1  # of the positions in scores: [BLOCK_N,BLOCK_H] or [BLOCK_H,BLOCK_N]
    length = tl.minimum(tl.load(lengths + batch), S).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    begin, end = split * part, tl.minimum((split + 1) * part, length)
    seen_by_all = length - (rows - 1) // heads  # causal: the last token sees `length` positions, the one before 1 less

    asked = ((row < rows) & (begin < end))[:, None]
    q_row = q + (batch * rows + row[:, None]) * (C + R)
    q_c = tl.load(q_row + c[None, :], mask=asked & (c < C)[None, :], other=0.0)
    q_r = tl.load(q_row + C + r[None, :], mask=asked & (r < R)[None, :], other=0.0)
    if WIDE:
        q_c, q_r = q_c.to(tl.float32), q_r.to(tl.float32)
    m = tl.full((BLOCK_H,), -1.0e38, tl.float32)  # finite, so that a row that sees nothing yet has no inf - inf
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_C, BLOCK_H) if SWAP else (BLOCK_H, BLOCK_C), tl.float32)
    latents += batch * stride_b
    for start in range(begin, end, BLOCK_N):
        kv, there = latents + start * (C + R), (n < end - start)[:, None]
        c_kv = tl.load(kv + (n[:, None] * (C + R) + c[None, :]), mask=there & (c < C)[None, :], other=0.0)
        k_rope = tl.load(kv + (n[:, None] * (C + R) + (C + r)[None, :]), mask=there & (r < R)[None, :], other=0.0)
        if WIDE:
            c_kv, k_rope = c_kv.to(tl.float32), k_rope.to(tl.float32)
        if SWAP:  # scaled and then added: a sum as it is would be one product going on into the other (see above)
            scores = add_product(c_kv, tl.trans(q_c), None) * scale + add_product(k_rope, tl.trans(q_r), None) * scale
        else:
            scores = add_product(q_c, tl.trans(c_kv), None) * scale + add_product(q_r, tl.trans(k_rope), None) * scale
        if start + BLOCK_N > seen_by_all:
            seen = length - (rows - 1 - row) // heads
            scores = tl.where(tl.expand_dims(start + n, 1 - AXIS) < tl.expand_dims(seen, AXIS), scores, float("-inf"))
        m_new = tl.maximum(m, tl.max(scores, AXIS))
        p = tl.exp2(scores - tl.expand_dims(m_new, AXIS))
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, AXIS)
        acc *= tl.expand_dims(shrink, AXIS)
        p = p.to(c_kv.dtype)
        acc = add_product(tl.trans(c_kv), p, acc) if SWAP else add_product(p, c_kv, acc)
        m = m_new

    some = total != 0  # not > 0, which hides NaN
    acc /= tl.expand_dims(tl.where(some, total, 1.0), AXIS)
    if SWAP:
        acc = tl.trans(acc)
    to = (batch * splits + split) * rows + row
    log_sum = (m + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453  # ln 2
    tl.store(lse + to, tl.where(some, log_sum, float("-inf")), mask=row < rows)
    written = (row < rows) & ((begin < end) | (splits == 1))  # merge_kernel does not read an empty part
    tl.store(out + to[:, None] * C + c[None, :], acc.to(out.dtype.element_ty), mask=written[:, None] & (c < C)[None, :])


def decode(q, latents, lengths, scale, rank, splits=None):
    """Attention of the last T tokens of each sequence over its cached latents: out [B,T,H,C], log-sum-exp [B,T,H] fp32.

    q [B,T,H,C+R] absorbed (or [B,H,C+R], which gives [B,H,C] and [B,H]); latents [B,S,C+R], any stride of B, the rest
    contiguous; lengths [B] int: sequence b has positions 0 to lengths[b]-1 (at most S), and of T tokens the last sees
    them all, the one before one less. rank is C, and `splits` None chooses the parts. fp32, fp16 or bf16, sums in fp32.
    A token that sees nothing gives zeros and -inf. Raises ValueError, TritonUnavailable.
    """
    interpreted = triton_env.require("the decode kernel") == "interpreter"
    check(q, latents, lengths, scale, rank, splits)
    shape, q = q.shape[:-1], q.contiguous()
    B, heads, (S, width) = len(q), q.shape[-2], latents.shape[1:]
    rows, arch, processors = shape[1:].numel(), *triton_env.gpu(q.device)
    splits = splits or choose_splits(B, rows, S, processors)
    config = blocks(rows, q.dtype, arch)
    out, lse = q.new_empty(*shape, rank), q.new_empty(shape, dtype=torch.float32)
    part, part_lse = (out, lse) if splits == 1 else partial(B, splits, rows, rank, q.device)
    padded = {"BLOCK_C": block(rank), "BLOCK_R": block(width - rank)}
    grid = (cdiv(rows, config["BLOCK_H"]), splits, B)  # blocks of one sequence run together and share its rows
    if out.numel():
        decode_kernel[grid](
            q, latents, lengths, part, part_lse, scale * LOG2_E, rows, heads, S, latents.stride(0), splits,
            C=rank, R=width - rank, WIDE=interpreted, **padded, **config,
        )  # fmt: skip
    if splits > 1 and out.numel():
        merge(part, part_lse, out, lse)
    return out, lse


def check(q, latents, lengths, scale, rank, splits):
    """Raise ValueError for the first argument of `decode` that does not fit, with what would."""
    given, cache = f"q is {list(q.shape)} {q.dtype}", f"latents are {list(latents.shape)} {latents.dtype}"
    need(q.dim() in (3, 4) and latents.dim() == 3, f"{given}, {cache}; give [B,T,H,C+R] or [B,H,C+R], and [B,S,C+R]")
    need(len(q) == len(latents) and q.shape[-1] == latents.shape[2], f"{given}, {cache}; B and C+R must be the same")
    need(q.dtype == latents.dtype and q.dtype in DTYPES, f"{given}, {cache}; give both as one of fp32, fp16, bf16")
    need(0 < rank < q.shape[-1], f"rank is {rank}; it is C, above 0 and below C+R = {q.shape[-1]}")
    need(block(rank) <= 512 and q.shape[-1] - rank <= 128, f"C is {rank}, R {q.shape[-1] - rank}; at most 512 and 128")
    rows = latents.shape[1] < 2 or latents.stride(1) == latents.shape[2]
    strides = f"latents have the strides {latents.stride()}; a sequence [S,C+R] must be contiguous"
    need(rows and latents.stride(2) == 1, f"{strides}: pass the cache itself, or latents.contiguous()")
    good = lengths.shape == q.shape[:1] and lengths.dtype in (torch.int32, torch.int64) and lengths.is_contiguous()
    need(good, f"lengths are {list(lengths.shape)} {lengths.dtype}; give [{len(q)}] int32 or int64, contiguous")
    need(scale > 0, f"scale is {scale}; it must be positive, (P+R)^-0.5 as in minids.layers.softmax_scale")
    need(splits is None or 1 <= splits <= MOST_SPLITS, f"splits is {splits}; give None, or 1 to {MOST_SPLITS}")
    places = {str(t.device) for t in (q, latents, lengths)}
    need(len(places) == 1, f"q, latents and lengths are on {', '.join(sorted(places))}; put them on one device")


def blocks(rows, dtype, arch):
    """How `decode_kernel` is compiled for `rows` = T*H on `arch` (90 is Hopper): sizes, warps, stages.

    With 512 + 64 numbers a row, 64 queries, 2 stages of 64 positions and their weights are 224 KiB of Hopper's 227 KiB
    of shared memory, and their sums are half of its registers. tests/test_compiled.py holds that each fits, and spills
    nothing (for Blackwell three numbers that the loop does not need).
    """
    swap = arch // 10 == 9 and rows <= 32 and dtype != torch.float32
    if dtype == torch.float32:  # no tensor cores
        sizes = (16, 16, 8)
    elif rows > 32 and (arch == 80 or arch // 10 in (9, 10)):
        sizes = (64, 64 if arch // 10 == 9 else 32, 8)
    elif rows > 16:
        sizes = (32, 64 if swap else 32, 8)
    else:
        sizes = (16, 64, 4)
    return {**dict(zip(("BLOCK_H", "BLOCK_N", "num_warps"), sizes, strict=True)), "num_stages": 2, "SWAP": swap}


@functools.lru_cache(maxsize=1024)
def choose_splits(batch, rows, length, processors):
    """Into how many parts to cut sequences of up to `length` positions so that all `processors` of a GPU have work.

    Counted in the time that a program takes for 64 positions. A part costs it as much again to begin, and to read its
    queries, write its result in fp32 and read that to merge: at 64 rows (T*H) 4.6 times the bytes of 64 latents of
    512+64. Estimated from bytes, not measured yet.
    """
    programs, walked = batch * cdiv(rows, 64), cdiv(length, 64)
    extra = 1 + min(rows, 64) / 14

    def cost(splits):
        return cdiv(programs * splits, processors) * (cdiv(walked, splits) + extra * (splits > 1))

    return min(range(1, min(walked // 2, MOST_SPLITS) + 1), key=cost, default=1)


@triton.jit(do_not_specialize=["rows", "splits"])
def merge_kernel(part, part_lse, out, lse, rows, splits, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """One row of out [B,rows,C] from its `splits` parts [B,splits,rows,C]; an empty part has -inf in part_lse."""
    batch, row = tl.program_id(1).to(tl.int64), tl.program_id(0)
    c, s = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_S)
    first = batch * splits * rows + row
    every = tl.load(part_lse + first + s * rows, mask=s < splits, other=float("-inf"))
    top = tl.max(every, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # all parts are empty: no inf - inf
    total = tl.sum(tl.exp(every - top), 0)
    acc = tl.zeros((BLOCK_C,), tl.float32)
    for split in range(splits):
        at = first + split * rows
        one = tl.load(part_lse + at)
        columns = tl.where(one == float("-inf"), 0, C)  # nobody wrote an empty part
        value = tl.load(part + at * C + c, mask=c < columns, other=0.0)
        acc += tl.exp(one - top) * value
    some = total != 0
    acc /= tl.where(some, total, 1.0)
    to = batch * rows + row
    tl.store(out + to * C + c, acc.to(out.dtype.element_ty), mask=c < C)
    tl.store(lse + to, tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf")))


def merge(part, part_lse, out, lse):
    """Fill out [B,...,C] and lse [B,...] from part [B,splits,rows,C] fp32 and part_lse [B,splits,rows]."""
    B, splits, rows, C = part.shape
    sizes = {"BLOCK_C": block(C), "BLOCK_S": next_power_of_2(splits)}
    merge_kernel[(rows, B)](part, part_lse, out, lse, rows, splits, C=C, num_warps=4 if C > 128 else 1, **sizes)


def partial(B, splits, rows, C, where):
    """Room for the results of all parts and their log-sum-exps, uninitialised: [B,splits,rows,C] and without C."""
    return torch.empty(B, splits, rows, C, device=where), torch.empty(B, splits, rows, device=where)


def block(size):
    """The power of 2 that holds `size`, at least 16: what the sides of a `tl.dot` must have."""
    return max(16, next_power_of_2(size))
