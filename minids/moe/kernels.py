"""The routed experts in Triton: grouped products whose rows find their expert on the device, forward and backward.

The N = M*A choices are sorted by expert (dispatch_kernels.py): rows ends[e-1] to ends[e]-1 are expert e's. With g the
gate of each row, and s = sigmoid(gate):

    up        pre = x[token] W_gate_up[e]^T         gate and up [N,F] beside each other
              act = silu(gate) * up * g             before W_down, where a row has F numbers and not D
    down      y = act W_down[e]^T                   out = sum of each token's A rows of y
    backward  dA = dout[token] W_down[e]            dg = sum over F of dA * silu(gate) * up
              d_up = g * dA * silu(gate)            d_gate = g * dA * up * s * (1 + gate * (1 - s))
              dx = sum of each token's A rows of d_pre W_gate_up[e]
              dW_gate_up[e] = d_pre^T x[token]      dW_down[e] = dout[token]^T act, over the rows of e

Rows of x and dout are read where the tokens lie, without a copy [N,D]. A step keeps x, pre and the plan; not act.

A grid must be known before the routing is. An expert with rows begin to end-1 has at most end // BLOCK_M -
begin // BLOCK_M + 1 tiles and gets so many slots, from number begin // BLOCK_M + e on: N // BLOCK_M + E for all. A
program counts the experts whose slots end before its own (`find`), and returns where no row is left for it. Programs
start in order, some hundred at once: 8 tiles of rows by all columns (`band`) share their rows and weights in L2.

Sums are in fp32, in one order, and no kernel adds atomically: two runs give the same bits. So `down` writes rows that
`combine` sums; atomic additions into out would save these bytes, but their order changes from run to run. On tensor
cores a product's first side has 64 rows (wgmma, Hopper); few rows an expert, as in decoding, take tiles of 16. Not
here: the shared experts, a plain SwiGLU; FP8; persistent programs, which hide the end of a tile behind the next.
"""

import functools

import torch

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.grouped_kernels import band, expert_rows
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

DTYPES = {torch.float32, torch.float16, torch.bfloat16}


@triton.jit
def find(ends, COLUMNS: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, its first row here, how many are left from there on, column) of this program's tile."""
    slot, column = band(tl.program_id(0), tl.num_programs(0) // COLUMNS, COLUMNS)
    expert, first, end = expert_rows(ends, slot, E, triton.next_power_of_2(E), BLOCK_M)
    return expert.to(tl.int64), first.to(tl.int64), end - first, column


@triton.jit
def fits(at, BLOCK: tl.constexpr, SIZE: tl.constexpr):
    """Which of the places `at` in a BLOCK are below SIZE: all, without a comparison, where SIZE is whole BLOCKs."""
    return tl.full(at.shape, True, tl.int1) if SIZE % BLOCK == 0 else at < SIZE


@triton.jit
def read(pointers, rows, columns, WIDE: tl.constexpr):
    """A tile, with zeros where its row or its column is not there."""
    tile = tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def write(pointers, tile, rows, columns):
    """Store a tile, rounded once, where its row and its column are there."""
    tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=rows[:, None] & columns[None, :])


@triton.jit
def product(x, weights, stride_k, rows, columns, K: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr):
    """x W^T of some rows and columns in fp32; x [BLOCK_M,1] and weights [1,BLOCK_N] point to the first of K numbers."""
    acc = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        some = fits(k, BLOCK_K, K)
        tile = read(x + k[None, :], rows, some, WIDE)
        weight = read(weights + (k * stride_k)[:, None], some, columns, WIDE)
        acc = tl.dot(tile, weight, acc, input_precision="ieee")  # fp32 stays fp32: tf32 would keep 10 bits of 23
    return acc


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


def check(what, floats, fit, expected, *others):
    """Whether kernels are interpreted; raises where `what` cannot run, or is given tensors that do not go together."""
    interpreted = triton_env.require(what) == "interpreter"
    kinds, places = {t.dtype for t in floats.values()}, {t.device for t in (*floats.values(), *others)}
    if not fit or len(kinds) > 1 or not kinds <= DTYPES or len(places) > 1:  # before a text is made at every call
        given = f"{what} is given " + ", ".join(f"{n} {[*t.shape]} {t.dtype} on {t.device}" for n, t in floats.items())
        need(fit, f"{given}; give {expected}, as in the plan of N = M*A rows and E experts")
        need(len(places) == 1, f"{given}, and gates and plan on {others[-1].device}; put all on one device")
        raise ValueError(f"{given}; give all as one of fp32, fp16 and bf16")
    return interpreted


def blocks(kind, rows, width, dtype, arch):
    """Sizes, warps and stages of the kernel `kind` ("up", "product", "back" or "dw") for `arch` (90 is Hopper).

    `rows` is an expert's mean, `width` the result's columns. tests/test_compiled.py holds that each fits and spills
    nothing, and on Hopper multiplies by wgmma.
    """
    widest = 256 if width % 256 == 0 and kind in ("product", "dw") else 128
    if dtype == torch.float32:  # no tensor cores
        m, n, k, warps, stages = 64, 32 if kind == "up" else 64, 16, 8, 2
    elif rows < 64 and kind != "dw":
        m, n, k, warps, stages = 16 if rows < 16 else 64, 64, 64, 4, 4
    elif arch // 10 in (9, 10):
        m, n, k, warps, stages = 128, widest, 64, 8, 5 if kind == "dw" else 4
    else:
        m, n, k, warps, stages = 128, 64 if kind == "up" else 128, 32, 8, 4
    n = min(n, max(32, next_power_of_2(width)))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


@functools.lru_cache(maxsize=1024)
def tiling(kind, N, E, width, dtype, where):
    """(grid, sizes) of the kernel `kind` for N rows of E experts, `width` columns in the result."""
    sizes = {"E": E, **blocks(kind, N / E, width, dtype, triton_env.gpu(where)[0])}
    return ((N // sizes["BLOCK_M"] + E) * cdiv(width, sizes["BLOCK_N"]),), sizes


@triton.jit(do_not_specialize=["A"])
def up_kernel(
    x, weights, gates, order, ends, act, pre, A, D: tl.constexpr, F: tl.constexpr, KEEP: tl.constexpr,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """act for some rows of one expert and BLOCK_N columns; with KEEP also pre."""
    expert, first, left, column = find(ends, triton.cdiv(F, BLOCK_N), E, BLOCK_M)
    if left <= 0:
        return
    m, n, both = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, 2 * BLOCK_N)
    rows, columns, part = m < left, fits(n, BLOCK_N, F), column * BLOCK_N + both % BLOCK_N
    choice = tl.load(order + first + m, mask=rows, other=0)
    x += (choice // A * D)[:, None]
    weights += expert * (2 * F * D) + ((part + both // BLOCK_N * F) * D)[None, :]  # as one product: gate's, then up's
    gate, up = halves(product(x, weights, 1, rows, fits(part, BLOCK_N, F), D, BLOCK_K, WIDE))
    if KEEP:
        pre += first * (2 * F) + (m * (2 * F))[:, None] + n[None, :]
        write(pre, gate, rows, columns)
        write(pre + F, up, rows, columns)
    g = tl.load(gates + choice, mask=rows, other=0.0).to(tl.float32)[:, None]
    write(act + first * F + (m * F)[:, None] + n[None, :], gate * tl.sigmoid(gate) * up * g, rows, columns)


def up(x, gate_up_proj, gates, order, ends, keep=True):
    """act [N,F] and pre [N,2F] (None unless `keep`) of x [M,D], gate_up_proj [E,2F,D] and gates [M,A].

    order [N] and ends [E] are the plan's; rows past ends[E-1] are not written. Raises ValueError, TritonUnavailable.
    """
    (E, two_f, D), N, F = gate_up_proj.shape, len(order), gate_up_proj.shape[1] // 2
    fit = x.shape == (len(gates), D) and gates.numel() == N and ends.shape == (E,) and two_f == 2 * F
    floats, expected = {"x": x, "gate_up_proj": gate_up_proj}, "[M,D] and [E,2F,D]"
    wide = check("the experts' up-projection", floats, fit, expected, gates, order, ends)
    act, pre = x.new_empty(N, F), x.new_empty(N, two_f) if keep else None
    grid, sizes = tiling("up", N, E, F, x.dtype, x.device)
    inputs = x.contiguous(), gate_up_proj.contiguous(), gates.contiguous(), order, ends
    up_kernel[grid](*inputs, act, pre, gates.shape[1], D, F, keep, WIDE=wide, **sizes)
    return act, pre


@triton.jit
def product_kernel(
    x, weights, ends, y, stride_e, stride_j, stride_k, K: tl.constexpr, J: tl.constexpr, E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = x W_e^T for some rows of one expert and BLOCK_N columns."""
    expert, first, left, column = find(ends, triton.cdiv(J, BLOCK_N), E, BLOCK_M)
    if left <= 0:
        return
    m, n = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    rows, columns = m < left, fits(n, BLOCK_N, J)
    x += first * K + (m * K)[:, None]
    weights += expert * stride_e + (n * stride_j)[None, :]
    acc = product(x, weights, stride_k, rows, columns, K, BLOCK_K, WIDE)
    write(y + first * J + (m * J)[:, None] + n[None, :], acc, rows, columns)


def grouped_gemm(x, weights, ends):
    """y [N,J], as reference.grouped_gemm: each expert's rows of x [N,K] by its own of weights [E,J,K], any strides.

    Rows past ends[E-1] are not written. Raises ValueError, TritonUnavailable.
    """
    (E, J, K), N = weights.shape, len(x)
    fit = x.shape == (N, K) and ends.shape == (E,)
    wide = check("the grouped product", {"x": x, "weights": weights}, fit, "[N,K] and [E,J,K]", ends)
    y, (grid, sizes) = x.new_empty(N, J), tiling("product", N, E, J, x.dtype, x.device)
    product_kernel[grid](x.contiguous(), weights, ends, y, *weights.stride(), K, J, WIDE=wide, **sizes)
    return y


@triton.jit
def through_swiglu(d, pre, g, act, d_pre, m, n, rows, F: tl.constexpr, BLOCK: tl.constexpr):
    """Write act and d_pre in the columns n of dA = `d`, half of a BLOCK, and give each row's part of dg."""
    columns, at = fits(n, BLOCK, F), (m * (2 * F))[:, None] + n[None, :]
    gate, up = read(pre + at, rows, columns, True), read(pre + F + at, rows, columns, True)
    s = tl.sigmoid(gate)
    h = gate * s * up
    part = tl.sum(d * h, 1)
    write(act + (m * F)[:, None] + n[None, :], h * g[:, None], rows, columns)
    d *= g[:, None]
    write(d_pre + F + at, d * gate * s, rows, columns)
    write(d_pre + at, d * up * s * (1.0 + gate * (1.0 - s)), rows, columns)
    return part


@triton.jit(do_not_specialize=["N", "A"])
def down_backward_kernel(
    dout, weights, gates, pre, order, ends, d_pre, act, parts, N, A, D: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dA for some rows of one expert and BLOCK_N columns, and from it d_pre, act and parts [columns,N] of dg."""
    expert, first, left, column = find(ends, triton.cdiv(F, BLOCK_N), E, BLOCK_M)
    if left <= 0:
        return
    m, n = tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = m < left
    choice = tl.load(order + first + m, mask=rows, other=0)
    dout += (choice // A * D)[:, None]
    weights += expert * (D * F) + n[None, :]
    dA = product(dout, weights, F, rows, fits(n, BLOCK_N, F), D, BLOCK_K, WIDE)
    g = tl.load(gates + choice, mask=rows, other=0.0).to(tl.float32)
    pre, d_pre, act = pre + first * (2 * F), d_pre + first * (2 * F), act + first * F
    n = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    one, other = halves(dA)  # one after the other: registers do not hold all that follows from dA at once
    part = through_swiglu(one, pre, g, act, d_pre, m, n, rows, F, BLOCK_N)
    part += through_swiglu(other, pre, g, act, d_pre, m, n + BLOCK_N // 2, rows, F, BLOCK_N)
    tl.store(parts + column.to(tl.int64) * N + choice, part, mask=rows)


def down_backward(dout, down_proj, gates, pre, order, ends):
    """d_pre [N,2F], act [N,F] and dg [M,A] fp32, from dout [M,D], down_proj [E,D,F], gates [M,A] and pre [N,2F].

    order [N] and ends [E] are the plan's; rows past ends[E-1] are not written. Raises ValueError, TritonUnavailable.
    """
    (E, D, F), N = down_proj.shape, len(order)
    fit = dout.shape == (len(gates), D) and pre.shape == (N, 2 * F) and gates.numel() == N and ends.shape == (E,)
    floats, expected = {"dout": dout, "down_proj": down_proj, "pre": pre}, "[M,D], [E,D,F] and [N,2F]"
    wide = check("the experts' backward pass", floats, fit, expected, gates, order, ends)
    d_pre, act = pre.new_empty(N, 2 * F), pre.new_empty(N, F)
    grid, sizes = tiling("back", N, E, F, dout.dtype, dout.device)
    parts = dout.new_zeros(cdiv(F, sizes["BLOCK_N"]), N, dtype=torch.float32)  # not each choice has a row
    inputs = dout.contiguous(), down_proj.contiguous(), gates.contiguous(), pre, order, ends
    down_backward_kernel[grid](*inputs, d_pre, act, parts, N, gates.shape[1], D, F, WIDE=wide, **sizes)
    return d_pre, act, parts.sum(0).view(gates.shape)


@triton.jit
def dw_kernel(
    x, dy, ends, x_token, dy_token, dw, K: tl.constexpr, J: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dW_e = dY_e^T X_e for BLOCK_M of the J and BLOCK_N of the K numbers, over all rows of one expert."""
    HEIGHT: tl.constexpr = triton.cdiv(J, BLOCK_M)
    COLUMNS: tl.constexpr = triton.cdiv(K, BLOCK_N)
    expert = tl.program_id(0) // (HEIGHT * COLUMNS)
    down, column = band(tl.program_id(0) % (HEIGHT * COLUMNS), HEIGHT, COLUMNS)
    j, k = down * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    some_j, some_k = fits(j, BLOCK_M, J), fits(k, BLOCK_N, K)
    begin, end = tl.load(ends + expert - 1, mask=expert > 0, other=0), tl.load(ends + expert)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        rows = row < end
        x_row = row if x_token is None else tl.load(x_token + row, mask=rows, other=0)
        dy_row = row if dy_token is None else tl.load(dy_token + row, mask=rows, other=0)
        tile = read(dy + (dy_row * J)[None, :] + j[:, None], some_j, rows, WIDE)
        other = read(x + (x_row * K)[:, None] + k[None, :], rows, some_k, WIDE)
        acc = tl.dot(tile, other, acc, input_precision="ieee")
    write(dw + expert.to(tl.int64) * (J * K) + (j * K)[:, None] + k[None, :], acc, some_j, some_k)


def grouped_gemm_dw(x, dy, ends, x_token=None, dy_token=None):
    """dW [E,J,K], as reference.grouped_gemm_dw, of x [N,K] and dy [N,J]; an expert without rows gets zeros.

    With x_token [N], x is [M,K] and its rows are x[x_token]; so with dy_token. Raises ValueError, TritonUnavailable.
    """
    of_x, of_dy = x if x_token is None else x_token, dy if dy_token is None else dy_token
    fit = x.dim() == dy.dim() == 2 and len(of_x) == len(of_dy)
    wide = check("the gradient of the weights", {"x": x, "dy": dy}, fit, "[N,K] and [N,J]", of_x, of_dy, ends)
    (K, J), E = (x.shape[1], dy.shape[1]), len(ends)
    sizes, dw = blocks("dw", 0, K, x.dtype, triton_env.gpu(x.device)[0]), x.new_empty(E, J, K)
    if x_token is None and dy_token is None:  # rows that are found by an index are not in all stages: these are
        sizes["num_stages"] = min(sizes["num_stages"], 4)
    grid = (E * cdiv(J, sizes["BLOCK_M"]) * cdiv(K, sizes["BLOCK_N"]),)
    dw_kernel[grid](x.contiguous(), dy.contiguous(), ends, x_token, dy_token, dw, K, J, WIDE=wide, **sizes)
    return dw
