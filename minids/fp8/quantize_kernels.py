"""Quantisers of FP8 training in Triton: tiles along rows and along columns in one pass, blocks, SwiGLU's fused.

    scale = amax / 448, or the next power of 2        x_fp8 = x / scale, rounded to the nearest E4M3, ties to even

Bit for bit what reference.py gives. So both divisions are IEEE's (`tl.div_rn`): a compiled `/` is off by up to 2 units
of the last place, and some number would land on another code. With powers of 2 nothing is divided: the scale and its
reciprocal are a few sums of bits, where each division takes some ten instructions and a branch. amax is the largest of
the numbers' bits without sign: they order magnitudes, and put infinity and then NaN above all others, where `tl.max` of
numbers drops NaN. Such a tile gets a scale of NaN, and is NaN.

A quantiser multiplies nothing: what it costs is the bytes it moves. Wgrad needs tiles along the tokens and its operands
transposed, so a program that has 128 x 128 numbers in registers writes those as well, and x is read once:

    x [M,K]  ->  x_fp8  [M,K],  x_scale  [M,ceil(K/128)]       for Fprop and Dgrad
             ->  xt_fp8 [K,M],  xt_scale [K,ceil(M/128)]       for Wgrad

Scales of tiles have these shapes, and lie with the rows together (x_scale.T is contiguous): so the rows of a product's
program are read in one piece. With `ends` [E] the rows of x [N,K] are experts' (kernels.py), and xt_fp8 [K,padded] has
padded = (N // 128 + E) * 128 columns: expert e's begin at 128 * (ends[e-1] // 128 + e); zeros are where no token is.
"""

import torch

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.fp8.kernels import E4M3, TILE, check, check_ends, check_numbers, check_scaled, decode
from minids.grouped_kernels import expert_rows
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

WARPS = 8  # for 128 x 128 numbers: with 128 registers a thread, two programs share a processor of Hopper


@triton.jit
def scale_of(value, AXIS: tl.constexpr, POWER: tl.constexpr):
    """fp32 scales of tiles along AXIS (None: one for all): amax / 448, at least 2^-126; NaN unless all is finite."""
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    if POWER:  # in its bits: 448 is 1.75 * 2^8, and a mantissa above 1.75 raises the exponent
        scale = tl.maximum(((largest + 0x1FFFFF) & 0x7F800000) - (8 << 23), 1 << 23).to(tl.float32, bitcast=True)
    else:
        scale = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), 448.0), 1.1754943508222875e-38)
    return tl.where(largest < 0x7F800000, scale, float("nan"))


@triton.jit
def to_e4m3(value, BITS: tl.constexpr):
    """The nearest E4M3 of fp32 numbers that round to 448 at most, or are NaN; with BITS by their bits (see by_bits)."""
    if BITS:
        bits = value.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)  # 20 bits less, another bias
        subnormal = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # a sum's last place is 2^-9
        code = tl.where(size < 0x3C800000, subnormal, normal)  # 2^-6
        code = tl.where(size > 0x7F800000, 0x7F, code | ((bits >> 24) & 0x80))
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return value.to(tl.float8e4nv)


def by_bits(where):
    """Whether Triton's own conversion to E4M3 would not do on this device.

    The interpreter's halves what rounds up to a power of 2, and takes NaN for 384. For sm_89 Triton rounds to fp16 and
    from there to FP8: twice, so what lies just beside the middle of two numbers may go to the wrong one.
    """
    return not triton_env.compiles() or triton_env.gpu(where)[0] < 90


@triton.jit
def quantize(value, scale, POWER: tl.constexpr, BITS: tl.constexpr):
    """value / scale as E4M3; it is at most 448 and a rounding error, which round to 448."""
    if POWER:  # its reciprocal has the exponent 254 less its own
        inverse = (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return to_e4m3(value * tl.where(scale == scale, inverse, float("nan")), BITS)
    else:
        return to_e4m3(tl.div_rn(value, scale), BITS)


@triton.jit(do_not_specialize=["M"])
def tiles_kernel(
    x, x_scale, up, gates, ends, out, scale, out_t, scale_t, M, K, stride, width,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, POWER: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """BLOCK rows x 128 columns in tiles along rows (out), columns (out_t [K,width]), or both.

    What is quantised: x, or FP8 with x_scale, or silu(x) * up; times a row's gate where there are gates.
    """
    slot, column = tl.program_id(0), tl.program_id(1)
    first, last = slot * BLOCK, M
    if ends is not None:
        _, first, last = expert_rows(ends, slot, E, BLOCK_E, BLOCK)
    row, k = first + tl.arange(0, BLOCK), column * TILE + tl.arange(0, TILE)
    mine, there, wide_row = row < last, k < K, row.to(tl.int64)[:, None]
    inside, at = mine[:, None] & there[None, :], wide_row * stride + k[None, :]
    value = decode(tl.load(x + at, mask=inside, other=0.0), BITS and x_scale is not None).to(tl.float32)
    if x_scale is not None:
        value *= tl.load(x_scale + column * M + row, mask=mine, other=0.0)[:, None]
    if up is not None:
        value = value * tl.sigmoid(value) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    if gates is not None:
        value *= tl.load(gates + row, mask=mine, other=0.0).to(tl.float32)[:, None]
    if out is not None:
        s = scale_of(value, 1, POWER)
        tl.store(scale + column * M + row, s, mask=mine)
        tl.store(out + wide_row * K + k[None, :], quantize(value, s[:, None], POWER, BITS), mask=inside)
    if out_t is not None:
        s, m = scale_of(value, 0, POWER), slot * TILE + tl.arange(0, BLOCK)
        tl.store(scale_t + slot * K + k, s, mask=there)
        to = out_t + k.to(tl.int64)[:, None] * width + m[None, :]
        codes = tl.trans(quantize(value, s[None, :], POWER, BITS))
        tl.store(to, codes, mask=there[:, None] & (m < width)[None, :])


def quantize_tiles(x, power_of_2=False, both=False, ends=None):
    """x [M,K] in 1x128 tiles: x_fp8 [M,K], x_scale [M,ceil(K/128)] fp32; bit-equal to reference.quantize_tiles.

    With `both` also x.T in such tiles, from one pass over x: xt_fp8 [K,M], xt_scale [K,ceil(M/128)], the 128x1 tiles of
    Wgrad. With `ends` [E] as well the rows are experts', sorted: xt_fp8 is [K,padded], and rows from ends[E-1] on stay
    unset. x is fp32, fp16 or bf16. Raises ValueError, TritonUnavailable.
    """
    check("the FP8 quantiser", x, ends)
    check_numbers("x", x, [2])
    need(both or ends is None, "ends places the tokens of xt_fp8: give both=True with it")
    return tiles(x, x.shape[1], power_of_2, rows=True, columns=both, ends=ends)


def requantize_transposed(x_fp8, x_scale, power_of_2=False, ends=None):
    """xt_fp8 [K,M] and xt_scale [K,ceil(M/128)] of what x_fp8 [M,K] and x_scale dequantise to (V3 3.3.2: Wgrad's x).

    With `ends` [E] xt_fp8 is [K,padded], as in quantize_tiles. Raises ValueError, TritonUnavailable.
    """
    check("the FP8 quantiser", x_fp8, x_scale, ends)
    check_scaled("x", x_fp8, x_scale, [2], tiles=True)
    return tiles(x_fp8, x_fp8.shape[1], power_of_2, columns=True, ends=ends, x_scale=x_scale.T.contiguous())


def silu_mul_quantize(gate_up, power_of_2=False, gates=None):
    """silu(gate) * up of gate_up [M,2F] = [gate, up], times gates [M], in 1x128 tiles: [M,F] and [M,ceil(F/128)].

    Computed in fp32 and rounded once, to FP8. gate_up is fp32, fp16 or bf16. Raises ValueError, TritonUnavailable.
    """
    check("the FP8 quantiser of SwiGLU", gate_up, gates)
    check_numbers("gate_up", gate_up, [2])
    (M, wide), given = gate_up.shape, f"gate_up is {list(gate_up.shape)}"
    need(wide % 2 == 0, f"{given}; its last size is 2F, gate beside up")
    need(gates is None or gates.shape == (M,), f"{given} and gates not [{M}]; give one a row")
    gates = None if gates is None else gates.contiguous()
    return tiles(gate_up, wide // 2, power_of_2, rows=True, swiglu=True, gates=gates)


def tiles(x, K, power_of_2, rows=False, columns=False, x_scale=None, swiglu=False, gates=None, ends=None):
    """The results of `tiles_kernel`: codes and scales of tiles along rows, then along columns, as asked for.

    All rows that it reads and writes begin at multiples of 16 numbers, or accesses would be of single ones, which take
    more registers than there are: x is copied for that where it must, and the results are views of what is longer.
    """
    M, E, out, wide = len(x), 1 if ends is None else len(ends), [None] * 4, cdiv(K, 16) * 16
    block = TILE if columns else 32
    slots = cdiv(M, block) if ends is None else M // TILE + E
    width = cdiv(M, 16) * 16 if ends is None else slots * TILE
    x = x if wide == K else torch.constant_pad_nd(x.unflatten(1, (-1, K)), (0, wide - K)).flatten(1)
    x = x if x.stride(1) == 1 and x.stride(0) % 16 == 0 else x.contiguous()
    if ends is not None:
        check_ends(ends, E)
    if rows:
        out[:2] = x.new_empty(M, wide, dtype=E4M3), x.new_empty(cdiv(K, TILE), M, dtype=torch.float32).T
    if columns:
        out[2:] = x.new_empty(wide, width, dtype=E4M3), x.new_empty(slots, wide, dtype=torch.float32).T
    if K and slots:
        tiles_kernel[(slots, cdiv(K, TILE))](
            x, x_scale, x[:, wide:] if swiglu else None, gates, ends, *out, M, wide, x.stride(0), width, E=E,
            BLOCK_E=next_power_of_2(E), BLOCK=block, TILE=TILE, POWER=power_of_2,
            BITS=by_bits(x.device), num_warps=WARPS if columns else 4,
        )  # fmt: skip
    sizes = (M, K), (M, cdiv(K, TILE)), (K, M if ends is None else width), (K, slots)
    return tuple(t if t.shape == (m, k) else t[:m, :k] for t, (m, k) in zip(out, sizes, strict=True) if t is not None)


# Weights ---------------------------------------------------------------------------------------------------------


@triton.jit
def blocks_kernel(
    w, out, scale, out_t, scale_t, N, K,
    TILE: tl.constexpr, POWER: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """One block of w [E,N,K] in FP8 to out and, transposed, to out_t; its scale to scale and scale_t."""
    expert, i, j = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    n, k = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    inside, at = (n < N)[:, None] & (k < K)[None, :], n.to(tl.int64)[:, None] * K + k[None, :]
    value = tl.load(w + expert * N * K + at, mask=inside, other=0.0).to(tl.float32)
    s = scale_of(value, None, POWER)
    codes = quantize(value, s, POWER, BITS)
    high, wide = tl.num_programs(0), tl.num_programs(1)
    tl.store(scale + (expert * high + i) * wide + j, s)
    tl.store(out + expert * N * K + at, codes, mask=inside)
    if out_t is not None:
        tl.store(scale_t + (expert * wide + j) * high + i, s)
        at = k.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_t + expert * N * K + at, tl.trans(codes), mask=(k < K)[:, None] & (n < N)[None, :])


def quantize_blocks(w, power_of_2=False, transposed=False):
    """w [N,K] or [E,N,K] in 128x128 blocks: w_fp8 and w_scale [...,ceil(N/128),ceil(K/128)]; bit-equal to reference's.

    With `transposed` also wt_fp8 [...,K,N], contiguous, and wt_scale: the same numbers for Dgrad, whose sum is over N.
    Raises ValueError, TritonUnavailable.
    """
    check("the FP8 quantiser", w)
    check_numbers("w", w, [2, 3])
    w, (*E, N, K), out = w.contiguous(), w.shape, []
    high, wide = cdiv(N, TILE), cdiv(K, TILE)
    for codes, scales in (((N, K), (high, wide)), ((K, N), (wide, high)))[: 1 + transposed]:
        out += [w.new_empty(*E, *codes, dtype=E4M3), w.new_empty(*E, *scales, dtype=torch.float32)]
    if w.numel():
        sizes = {"TILE": TILE, "POWER": power_of_2, "BITS": by_bits(w.device), "num_warps": WARPS}
        blocks_kernel[(high, wide, *E)](w, *out, *[None] * (4 - len(out)), N, K, **sizes)
    return tuple(out)


@triton.jit
def dequantize_kernel(w, scale, out, N, K, TILE: tl.constexpr, WIDE: tl.constexpr):
    """out = w times its block's scale, 32 rows x 128 columns of one expert."""
    ROWS: tl.constexpr = 32
    expert, i, j = tl.program_id(2).to(tl.int64), tl.program_id(0), tl.program_id(1)
    n, k = i * ROWS + tl.arange(0, ROWS), j * TILE + tl.arange(0, TILE)
    inside = (n < N)[:, None] & (k < K)[None, :]
    at = expert * N * K + n.to(tl.int64)[:, None] * K + k[None, :]
    s = tl.load(scale + (expert * tl.cdiv(N, TILE) + i * ROWS // TILE) * tl.num_programs(1) + j)
    value = decode(tl.load(w + at, mask=inside, other=0.0), WIDE).to(tl.float32) * s
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


def dequantize_blocks(w_fp8, w_scale, dtype=torch.bfloat16):
    """w [N,K] or [E,N,K] in `dtype` (fp32, fp16 or bf16), rounded once; w_scale [...,ceil(N/128),ceil(K/128)] fp32.

    Raises ValueError, TritonUnavailable.
    """
    check("the FP8 dequantiser", w_fp8, w_scale)
    check_scaled("w", w_fp8, w_scale, [2, 3], blocks=True)
    out, (*E, N, K) = torch.empty(w_fp8.shape, dtype=dtype, device=w_fp8.device), w_fp8.shape
    check_numbers("w", out, [2, 3])
    if out.numel():
        w, scale, sizes = w_fp8.contiguous(), w_scale.contiguous(), {"TILE": TILE, "WIDE": not triton_env.compiles()}
        dequantize_kernel[(cdiv(N, 32), cdiv(K, TILE), *E)](w, scale, out, N, K, **sizes)
    return out
