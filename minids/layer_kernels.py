"""The layers in Triton: RMSNorm, RoPE and SwiGLU, forward and backward, each with its autograd.

None of them multiplies matrices: what they cost is the bytes they move. So each kernel reads its inputs once, keeps
what it computes in registers in fp32, and rounds once when it writes. Reading and writing is all that a profile of them
should show:

    RMSNorm   reads x, writes y; backward reads x and dy, writes dx (torch's formula in pieces moves 3 times as much)
    RoPE      reads x, writes it turned; backward is the turn by the negative angle, the same kernel
    SwiGLU    reads gate and up, writes silu(gate) * up; backward reads both and dy, and computes the sigmoid again

The gradient of RMSNorm's weight is a sum over all rows. Each program adds up its own rows, in their order, and torch
adds the programs' sums: the same bits in every run, which atomic additions would not give.
"""

import torch
from torch.autograd.function import once_differentiable

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDEST = 16384  # numbers in a row that RMSNorm keeps in registers
NUMBERS = 2048  # of a program of SwiGLU, and pairs of one of RoPE
FORWARD, BACKWARD = 32, 24  # RMSNorm's warps on a processor at once, as registers allow; they share all rows


# RMSNorm ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def rms_norm_kernel(
    x, weight, y, r, rows, stride, eps,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = x * r * weight with r = 1 / sqrt(mean(x^2) + eps), kept for the backward pass (1910.07467)."""
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        value = tl.load(x + row[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(value * value, 1) / D + eps)
        result = value * factor[:, None] * w[None, :]
        tl.store(y + row[:, None] * D + d[None, :], result.to(y.dtype.element_ty), mask=inside)
        tl.store(r + row, factor, mask=row < rows)


def rms_norm_forward(x, weight, eps):
    """y [M,D] and r [M] fp32 of x [M,D], whose rows may be apart; y in the wider dtype of x and weight."""
    M, D = x.shape
    y = torch.empty(M, D, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    r = torch.empty(M, dtype=torch.float32, device=x.device)
    sizes, programs = row_tiles(M, D, x.device, FORWARD)
    rms_norm_kernel[(programs,)](x, weight, y, r, M, x.stride(0), eps, D=D, **sizes)
    return y, r


@triton.jit(do_not_specialize=["rows"])
def rms_norm_backward_kernel(
    x, weight, r, dy, dx, dw, rows, stride, dy_stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = r * (g - n * mean(n * g)) with n = x * r and g = dy * weight; dw [programs,D] sums dy * n over its rows."""
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
    dw_sum = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M, num_stages=STAGES):
        row = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        inside = (row < rows)[:, None] & (d < D)[None, :]
        factor = tl.load(r + row, mask=row < rows, other=0.0)[:, None]
        n = tl.load(x + row[:, None] * stride + d[None, :], mask=inside, other=0.0).to(tl.float32) * factor
        grad = tl.load(dy + row[:, None] * dy_stride + d[None, :], mask=inside, other=0.0).to(tl.float32)
        dw_sum += tl.sum(grad * n, 0)
        grad *= w[None, :]
        result = factor * (grad - n * (tl.sum(n * grad, 1) / D)[:, None])
        tl.store(dx + row[:, None] * D + d[None, :], result.to(dx.dtype.element_ty), mask=inside)
    tl.store(dw + tl.program_id(0) * D + d, dw_sum, mask=d < D)


def rms_norm_backward(x, weight, r, dy):
    """dx [M,D] and dw [D] of the gradient dy [M,D]; r [M] is what rms_norm_forward gave."""
    M, D = x.shape
    sizes, programs = row_tiles(M, D, x.device, BACKWARD)
    dx = torch.empty(M, D, dtype=x.dtype, device=x.device)
    dw = torch.empty(programs, D, dtype=torch.float32, device=x.device)
    rms_norm_backward_kernel[(programs,)](x, weight, r, dy, dx, dw, M, x.stride(0), dy.stride(0), D=D, **sizes)
    return dx, dw.sum(0).to(weight.dtype)


class RMSNormFunction(torch.autograd.Function):
    """rms_norm with its gradients; it keeps x, the weight and one number a row."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        y, r = rms_norm_forward(rows_of(x), weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        dx, dw = rms_norm_backward(rows_of(x), weight, r, rows_of(dy))
        return dx.view(x.shape), dw, None


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight; x [...,D], weight [D]; rounded once, to the wider dtype of both.

    Raises ValueError, TritonUnavailable.
    """
    check("RMSNorm", x, weight)
    need(weight.shape == x.shape[-1:], f"x is {list(x.shape)} and weight {list(weight.shape)}; give [...,D] and [D]")
    need(x.shape[-1] <= WIDEST, f"rows of x have {x.shape[-1]} numbers; this kernel takes up to {WIDEST}")
    return RMSNormFunction.apply(x, weight.contiguous(), eps) if x.numel() else x * weight


# RoPE ------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T", "H"])
def rope_kernel(
    x, cos, sin, out, T, H, stride_b, stride_t, stride_h, SIGN: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Turn the pairs (2i, 2i+1) of x by SIGN times the angles of cos, sin [T,PAIRS]; some positions and heads."""
    t = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    batch = tl.program_id(2).to(tl.int64)
    p, r = tl.arange(0, BLOCK_P)[None, None, :], tl.arange(0, 2 * BLOCK_P)[None, None, :]
    table = t * PAIRS + p
    c = tl.load(cos + table, mask=(t < T) & (p < PAIRS), other=0.0)
    s = tl.load(sin + table, mask=(t < T) & (p < PAIRS), other=0.0) * SIGN
    inside = (t < T) & (h < H) & (r < 2 * PAIRS)
    value = tl.load(x + batch * stride_b + t * stride_t + h * stride_h + r, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (BLOCK_T, BLOCK_H, BLOCK_P, 2)))
    turned = tl.join(even * c - odd * s, even * s + odd * c)
    turned = tl.reshape(turned, (BLOCK_T, BLOCK_H, 2 * BLOCK_P)).to(out.dtype.element_ty)
    tl.store(out + ((batch * T + t) * H + h) * (2 * PAIRS) + r, turned, mask=inside)


def turn(x, cos, sin, sign):
    """x [B,T,H,R] turned by `sign` times the angles of cos and sin [T,R/2]; contiguous, in x's dtype."""
    B, T, H, R = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    pairs = next_power_of_2(R // 2)
    heads = min(next_power_of_2(H), max(1, NUMBERS // pairs))
    tokens = min(next_power_of_2(T), max(1, NUMBERS // (pairs * heads)))
    sizes = {"BLOCK_P": pairs, "BLOCK_T": tokens, "BLOCK_H": heads}
    grid = (cdiv(T, tokens), cdiv(H, heads), B)
    rope_kernel[grid](x, cos, sin, out, T, H, *x.stride()[:3], SIGN=sign, PAIRS=R // 2, **sizes)
    return out


class RopeFunction(torch.autograd.Function):
    """rope with its gradient, which is the turn backwards."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return turn(dy, *ctx.saved_tensors, -1.0), None, None


def rope(x, cos, sin):
    """Turn the pairs (2i, 2i+1) of x [...,T,H,R] by cos and sin [T,R/2] fp32 (2104.09864); the tables get no gradient.

    Raises ValueError, TritonUnavailable.
    """
    check("RoPE", x, cos, sin)
    tables = f"x is {list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} {cos.dtype}"
    fits = x.dim() >= 3 and x.shape[-1] % 2 == 0 and cos.shape == sin.shape == (x.shape[-3], x.shape[-1] // 2)
    need(fits and cos.dtype == sin.dtype == torch.float32, f"{tables}; give [...,T,H,R] and fp32 tables [T,R/2]")
    if not x.numel():
        return x
    return RopeFunction.apply(x.reshape(-1, *x.shape[-3:]), cos.contiguous(), sin.contiguous()).view(x.shape)


# SwiGLU ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def silu_mul_kernel(
    gate, up, out, rows, gate_stride, up_stride, W, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """out = silu(gate) * up = gate * sigmoid(gate) * up (2002.05202)."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    w = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    inside = (row < rows) & (w < W)
    g = tl.load(gate + row * gate_stride + w, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + w, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * W + w, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def silu_mul_backward_kernel(
    gate, up, dy, dgate, dup, rows, gate_stride, up_stride, dy_stride, W,
    BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """dup = dy * silu(g) and dgate = dy * up * s * (1 + g * (1 - s)), with s = sigmoid(g) computed again."""
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    w = (tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    inside = (row < rows) & (w < W)
    g = tl.load(gate + row * gate_stride + w, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + w, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + row * dy_stride + w, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + row * W + w, (d * g * s).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + row * W + w, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)


class SiluMulFunction(torch.autograd.Function):
    """silu_mul with its gradients; it keeps its two inputs."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        g, u = rows_of(gate), rows_of(up)
        out = torch.empty(g.shape, dtype=gate.dtype, device=gate.device)
        grid, sizes = tiles(*g.shape)
        silu_mul_kernel[grid](g, u, out, len(g), g.stride(0), u.stride(0), g.shape[1], **sizes)
        return out.view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        g, u, dy = (rows_of(t) for t in (*ctx.saved_tensors, dy))
        dgate, dup = (torch.empty(g.shape, dtype=g.dtype, device=g.device) for _ in range(2))
        grid, sizes = tiles(*g.shape)
        strides = g.stride(0), u.stride(0), dy.stride(0)
        silu_mul_backward_kernel[grid](g, u, dy, dgate, dup, len(g), *strides, g.shape[1], **sizes)
        shape = ctx.saved_tensors[0].shape
        return dgate.view(shape), dup.view(shape)


def silu_mul(gate, up):
    """silu(gate) * up of two tensors [...,W] of one shape and dtype. Raises ValueError, TritonUnavailable."""
    check("SwiGLU", gate, up)
    given = f"gate is {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype}"
    need(gate.shape == up.shape and gate.dtype == up.dtype and gate.dim(), f"{given}; give two alike, [...,W]")
    return SiluMulFunction.apply(gate, up) if gate.numel() else gate * up


# Shared ----------------------------------------------------------------------------------------------------------


def check(what, *tensors):
    """Raise where the kernel of `what` cannot run, or does not take these dtypes, or they are on several devices."""
    triton_env.require(f"the kernel of {what}")
    bad = [str(t.dtype) for t in tensors if t.dtype not in DTYPES]
    need(not bad, f'{what} is given {", ".join(bad)}; its kernel takes fp32, fp16 and bf16: use impl="torch"')
    places = sorted({str(t.device) for t in tensors})
    need(len(places) == 1, f"{what} is given tensors on {', '.join(places)}; put them on one device")


def rows_of(x):
    """x [...,D] as rows [M,D]: a view where their distance is the same everywhere (a slice of D), else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def row_tiles(rows, width, where, warps):
    """({BLOCK_M, BLOCK_D, STAGES, num_warps}, programs) for kernels that need whole rows, `warps` a processor.

    The programs share the tiles; of STAGES one is worked on, and the next are on their way.
    """
    sizes = row_sizes(width)
    programs = max(warps // sizes["num_warps"], 1) * triton_env.gpu(where)[1]
    return sizes, min(cdiv(rows, sizes["BLOCK_M"]), programs)


def row_sizes(width):
    """Sizes, stages and warps for rows of `width` numbers: 16 of them a thread, 32 of more than 8192."""
    D = next_power_of_2(width)
    return {"BLOCK_M": max(1, 2048 // D), "BLOCK_D": D, "STAGES": 2, "num_warps": min(16, max(4, D // 512))}


def tiles(rows, width):
    """(grid, {BLOCK_M, BLOCK_W}) that covers [rows,width] in tiles of NUMBERS, few of them past its edge."""
    W = min(next_power_of_2(width), 512)
    M = NUMBERS // W
    return (cdiv(rows, M), cdiv(width, W)), {"BLOCK_M": M, "BLOCK_W": W}
