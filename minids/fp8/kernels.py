"""Products of FP8 matrices whose scales change every 128 numbers, in Triton: a Linear's three, and those of experts.

    y [M,N] = sum over tiles t:  (x_t w_t^T) * x_scale[:,t] * w_scale[.,t]      reference.py has the equations

A program has BLOCK_M x 128 numbers of y. For every 128 numbers of the sum it multiplies two FP8 tiles on tensor cores,
and only then the scales, into an fp32 sum in registers. That "promotion" cannot be left to the compiler: Triton lets
Hopper add up to 2^30 products with 14 bits before it promotes. It costs what FP8 has to win back: the tensor cores wait
while 128 columns are scaled. A block's one scale for 128 columns goes into the rows' scales, one multiplication fewer.

Layouts. FP8 tensor cores read both operands along the sum, so both lie [rows, sum] and nothing is transposed here;
quantize_kernels.py writes what Dgrad and Wgrad need transposed. Scales are read in any strides; those that
quantize_kernels.py makes lie with the rows together, so that the rows of a program read one piece.

Experts. The rows of x are sorted by expert, and `ends` [E] says where each expert's rows end; it stays on the device.
One with n rows takes ceil(n / B) programs of B rows; their places ("slots") are found without a sum over experts:

    expert e begins at slot ends[e-1] // B + e      N // B + E slots hold all; one between two experts may be empty

The sum of Wgrad is over an expert's tokens, and its tiles of 128 must not hold another's. So there tokens lie in slots
of B = 128 columns ("padded"): zeros fill an expert's last slot and the empty ones.
"""

import torch
import torch.nn.functional as F

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.grouped_kernels import band, expert_rows
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

E4M3, TILE = torch.float8_e4m3fn, 128
WIDER = (torch.float32, torch.float16, torch.bfloat16)
OLDEST = 89  # Ada: the first GPUs that multiply FP8, and that Triton compiles E4M3 for


@triton.jit
def decode(x, WIDE: tl.constexpr):
    """FP8 as it is for tensor cores; WIDE, for the interpreter, as fp32, for its own conversion takes NaN for 480."""
    if WIDE:
        return tl.where((x.to(tl.uint8, bitcast=True) & 127) == 127, float("nan"), x.to(tl.float32))
    else:
        return x


@triton.jit(do_not_specialize=["M", "x_tile"])  # x_tile is M where scales lie with the rows together
def matmul_kernel(
    x, x_scale, w, w_scale, ends, y, M, N, K, x_row, x_tile, w_expert, w_row, w_tile,
    E: tl.constexpr, BLOCK_E: tl.constexpr, EXPERTS: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of y; EXPERTS share "rows" of x, the "sum", or "none"; w_scale is of BLOCKS or of tiles, [N,tiles]."""
    columns = tl.cdiv(N, TILE)
    slot, column = band(tl.program_id(0), tl.num_programs(0) // columns, columns)
    expert, first, last = tl.program_id(1), slot * BLOCK_M, M
    tile, stop = 0, tl.cdiv(K, TILE)
    if EXPERTS == "rows":
        expert, first, last = expert_rows(ends, slot, E, BLOCK_E, BLOCK_M)
        if first >= last:
            return
    if EXPERTS == "sum":
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0).to(tl.int32)
        tile = begin // TILE + expert
        stop = tile + tl.cdiv(tl.load(ends + expert).to(tl.int32) - begin, TILE)
    expert = expert.to(tl.int64)
    m, n, k = first + tl.arange(0, BLOCK_M), column * TILE + tl.arange(0, TILE), tl.arange(0, TILE)
    row, col = tl.minimum(m, last - 1).to(tl.int64), tl.minimum(n, N - 1).to(tl.int64)  # past the end: the last, again
    x += row[:, None] * K + (tile * TILE + k)[None, :]
    w += col[:, None] * K + (tile * TILE + k)[None, :]
    x_scale += row * x_row
    w_scale += (column if BLOCKS else col) * w_row
    if EXPERTS == "rows":
        w += expert * N * K
        w_scale += expert * w_expert
    acc = tl.zeros((BLOCK_M, TILE), tl.float32)
    for t in range(tile, stop):
        if EVEN:
            a, b = tl.load(x), tl.load(w)
        else:
            there = (k < K - t * TILE)[None, :]
            a, b = tl.load(x, mask=there, other=0.0), tl.load(w, mask=there, other=0.0)
        x_factor, w_factor = tl.load(x_scale + t * x_tile), tl.load(w_scale + t * w_tile)
        product = tl.dot(decode(a, WIDE), tl.trans(decode(b, WIDE)), input_precision="ieee")
        if BLOCKS:
            acc += product * (x_factor * w_factor)[:, None]
        else:
            acc += product * x_factor[:, None] * w_factor[None, :]
        x += TILE
        w += TILE
    y += (expert * M + m.to(tl.int64) if EXPERTS == "sum" else m.to(tl.int64))[:, None] * N + n[None, :]
    tl.store(y, acc.to(y.dtype.element_ty), mask=(m < last)[:, None] & (n < N)[None, :])


def config(rows, arch, blocks=True):
    """How `matmul_kernel` is compiled for `rows` (of x, or of one expert) on `arch` (90: Hopper): tile, warps, stages.

    128 rows read less again from the cache; 64 leave room for several programs on a processor, and with scales of tiles
    on both sides for what they keep in registers. Which is faster where is not measured yet. tests/test_compiled.py
    holds that each fits, and spills nothing.
    """
    large = rows > 64 and blocks and arch // 10 in (9, 10)
    return {"BLOCK_M": 128 if large else 64, "num_warps": 8 if large else 4, "num_stages": 3}


def launch(x, x_scale, w, w_scale, y, experts="none", ends=None):
    """y [M,N], or [E,M,N] where experts share the sum, filled by `matmul_kernel`; what it is given is checked."""
    (M, K), N, E, blocks = x.shape, w.shape[-2], 1 if ends is None else len(ends), w_scale.shape[-2] != w.shape[-2]
    # Loads of 16 bytes need rows that begin at a multiple of 16. Others are copied, with zeros at their end.
    x, w = (F.pad(t.view(torch.uint8), (0, -K % TILE)).view(E4M3) if K % 16 else t.contiguous() for t in (x, w))
    sizes = config(M // E if experts == "rows" else M, triton_env.gpu(x.device)[0], blocks)
    slots = M // sizes["BLOCK_M"] + E if experts == "rows" else cdiv(M, sizes["BLOCK_M"])
    if y.numel():
        matmul_kernel[(slots * cdiv(N, TILE), E if experts == "sum" else 1)](
            x, x_scale, w, w_scale, ends, y, M, N, x.shape[1], *x_scale.stride(), *w_scale.stride()[:-2] or (0,),
            *w_scale.stride()[-2:], E=E, BLOCK_E=next_power_of_2(E), EXPERTS=experts, BLOCKS=blocks,
            EVEN=x.shape[1] % TILE == 0, TILE=TILE, WIDE=not triton_env.compiles(), **sizes,
        )  # fmt: skip
    return y


def matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale, out_dtype=torch.bfloat16):
    """y [M,N] = x w^T, summed in fp32, rounded once to out_dtype (fp32, fp16, bf16); as reference.matmul_blockscaled.

    x_fp8 [M,K] with x_scale [M,ceil(K/128)]; w_fp8 [N,K] with w_scale [ceil(N/128),ceil(K/128)] of blocks, or
    [N,ceil(K/128)] of tiles. What is not contiguous is copied. Raises ValueError, TritonUnavailable.
    """
    check("the FP8 product", x_fp8, x_scale, w_fp8, w_scale)
    check_scaled("x", x_fp8, x_scale, [2], tiles=True)
    check_scaled("w", w_fp8, w_scale, [2], tiles=True, blocks=True)
    check_sizes(x_fp8, w_fp8, out_dtype)
    return launch(x_fp8, x_scale, w_fp8, w_scale, x_fp8.new_empty(len(x_fp8), len(w_fp8), dtype=out_dtype))


def grouped_matmul(x_fp8, x_scale, w_fp8, w_scale, ends, out_dtype=torch.bfloat16):
    """y [N,J] = x W_e^T, where the rows ends[e-1] to ends[e]-1 are expert e's; x_fp8 [N,K], x_scale [N,ceil(K/128)].

    w_fp8 [E,J,K] with w_scale [E,ceil(J/128),ceil(K/128)]; ends [E] int32 or int64 on the device, ascending, at most N.
    Rows from ends[E-1] on are nobody's and stay unset. Raises ValueError, TritonUnavailable.
    """
    check("the FP8 product of experts", x_fp8, x_scale, w_fp8, w_scale, ends)
    check_scaled("x", x_fp8, x_scale, [2], tiles=True)
    check_scaled("w", w_fp8, w_scale, [3], blocks=True)
    check_sizes(x_fp8, w_fp8, out_dtype)
    check_ends(ends, len(w_fp8))
    y = x_fp8.new_empty(len(x_fp8), w_fp8.shape[1], dtype=out_dtype)
    return launch(x_fp8, x_scale, w_fp8, w_scale, y, "rows", ends)


def grouped_wgrad(dyt_fp8, dyt_scale, xt_fp8, xt_scale, ends):
    """dW [E,J,K] fp32 = dy_e^T x_e, summed over each expert's tokens; zeros for an expert without any.

    dyt_fp8 [J,padded] with dyt_scale [J,padded/128], xt_fp8 [K,padded] with xt_scale [K,padded/128]: as quantize_tiles
    and requantize_transposed (quantize_kernels.py) give for these `ends` [E]. Raises ValueError, TritonUnavailable.
    """
    check("the FP8 weight gradient of experts", dyt_fp8, dyt_scale, xt_fp8, xt_scale, ends)
    check_scaled("dyt", dyt_fp8, dyt_scale, [2], tiles=True)
    check_scaled("xt", xt_fp8, xt_scale, [2], tiles=True)
    check_sizes(dyt_fp8, xt_fp8, torch.float32)
    check_ends(ends, len(ends))
    E, padded = len(ends), dyt_fp8.shape[1]
    given = f"there are {padded} padded tokens and {E} experts"
    need(padded % TILE == 0 and padded >= E * TILE, f"{given}; give (N // 128 + E) * 128, as quantize_tiles with ends")
    dw = dyt_fp8.new_empty(E, len(dyt_fp8), len(xt_fp8), dtype=torch.float32)
    return launch(dyt_fp8, dyt_scale, xt_fp8, xt_scale, dw, "sum", ends)


# Checks ----------------------------------------------------------------------------------------------------------


def check(what, *tensors):
    """Raise where the kernel of `what` cannot run: no Triton, a GPU without FP8, tensors on several devices."""
    compiled, places = triton_env.require(what) == "gpu", {str(t.device) for t in tensors if t is not None}
    need(len(places) == 1, f"{what} is given tensors on {', '.join(sorted(places))}; put them on one device")
    arch = triton_env.gpu(tensors[0].device)[0]
    if compiled and arch < OLDEST:
        raise triton_env.TritonUnavailable(
            f"{what} needs a GPU that multiplies FP8, sm_{OLDEST} or newer (Ada, Hopper, Blackwell), and this one is "
            f"sm_{arch}: train with minids.fp8.layer, which emulates FP8 there"
        )


def check_numbers(name, x, dims):
    """Raise ValueError unless `x` is fp32, fp16 or bf16 and has one of `dims` dimensions."""
    given, wanted = f"{name} is {list(x.shape)} {x.dtype}", " or ".join(map(str, dims))
    need(x.dim() in dims and x.dtype in WIDER, f"{given}; give {wanted} dimensions of float32, float16 or bfloat16")


def check_scaled(name, codes, scale, dims, tiles=False, blocks=False):
    """Raise ValueError unless `codes` are FP8 of one of `dims` dimensions, with scales of `tiles` or of `blocks`."""
    given = f"{name}_fp8 is {list(codes.shape)} {codes.dtype} and {name}_scale {list(scale.shape)} {scale.dtype}"
    wanted = f"{' or '.join(map(str, dims))} dimensions of float8_e4m3fn"
    need(codes.dim() in dims and codes.dtype == E4M3, f"{given}; give {wanted} and their scales")
    *batch, N, K = codes.shape
    rows = [N] * tiles + [cdiv(N, TILE)] * blocks
    good = [[*batch, n, cdiv(K, TILE)] for n in rows]
    fits = list(scale.shape) in good and scale.dtype == torch.float32
    need(fits, f"{given}; the scales must be {' or '.join(map(str, good))} float32")


def check_sizes(x, w, dtype):
    """Raise ValueError unless the products of x and w sum over as many numbers, and give a dtype that is there."""
    shapes = f"x is {list(x.shape)} and w {list(w.shape)}"
    need(x.shape[-1] == w.shape[-1], f"{shapes}; both must end with the size of the sum")
    need(dtype in WIDER, f"out_dtype is {dtype}; give float32, float16 or bfloat16")


def check_ends(ends, experts):
    """Raise ValueError unless `ends` are [experts] int32 or int64."""
    good = ends.shape == (experts,) and ends.dtype in (torch.int32, torch.int64) and ends.is_contiguous()
    need(good, f"ends are {list(ends.shape)} {ends.dtype}; give [{experts}] int32 or int64, contiguous")
