"""The loss of training in Triton: a chunk of logits becomes its losses and, in place, its gradient.

    loss_i = log(sum_v exp(z_iv)) - z_i,target        d loss_i / d z_iv = softmax(z_i)_v - [v = target]

The logits [M,V] of a large vocabulary are the largest tensor of a step, and needed for a moment only. So they are made
a chunk of rows at a time, by a product that writes into one buffer for all chunks. A program takes a row of it: sums in
fp32, the gradient written over the logits. Then two products turn the gradient into its part of dx and dW, while it is
at hand; backward has only to scale both.

Bytes of the kernel, for each logit of b bytes: 2b where a row fits into registers (V up to 32,768; up to 16,384 where
it is no multiple of 16), read once and written once. A longer row is read for its sum, with the largest so far (online
softmax, 1805.02867), and again for its gradient: 3b; a second read may still find a part in the cache. A row that does
not count (target -100) is not read: b. Without gradients: b.

Memory, for M 16384, V 32768 in bf16: all logits are 1.07 GB (2 M V bytes), the chunk 1536 rows, 101 MB (9.4%); softmax
and gradient in fp32, which the formula in pieces makes besides, 2.1 GB each. dW is summed in fp32: 4 V D bytes.
"""

import torch
from torch.autograd.function import once_differentiable

from minids import triton_env  # before triton: it chooses the interpreter where there is no GPU
from minids.triton_env import cdiv, need, next_power_of_2

import triton  # isort: skip
import triton.language as tl  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WHOLE, PIECE = 32768, 8192  # logits of a row that registers hold, and how many are taken at once of a longer one
FEWEST, MOST = 128, 4096  # rows of a chunk: fewer starve the products, more only take memory
ADDS_TO_FP32 = torch.__version__ >= (2, 10)  # torch.addmm with out_dtype takes an fp32 sum (pytorch#167931)


@triton.jit
def cross_entropy_kernel(
    logits, targets, losses, stride, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The loss of one row, and with GRADIENT its gradient in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    target, v = tl.load(targets + row), tl.arange(0, BLOCK)
    logits += row * stride
    # read before anything is written: all warps meet in the maximum that follows
    wanted = tl.load(logits + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    loss = 0.0
    if target == -100:
        if GRADIENT:
            for start in range(0, V, BLOCK):
                tl.store(logits + start + v, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + v < V)
    elif BLOCK >= V:
        z = tl.load(logits + v, mask=v < V, other=float("-inf")).to(tl.float32)
        most = tl.max(z, 0)
        e = tl.exp(z - most)
        total = tl.sum(e, 0)
        loss = tl.log(total) + (most - wanted)
        if GRADIENT:
            gradient = e * (1.0 / total) - (v == target).to(tl.float32)
            tl.store(logits + v, gradient.to(logits.dtype.element_ty), mask=v < V)
    else:
        most, total = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.float32)
        for start in range(0, V, BLOCK):
            z = tl.load(logits + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
            larger = tl.maximum(most, tl.max(z, 0))
            total = total * tl.exp(most - larger) + tl.sum(tl.exp(z - larger), 0)
            most = larger
        loss = tl.log(total) + (most - wanted)
        if GRADIENT:
            for start in range(0, V, BLOCK):
                z = tl.load(logits + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(z - most) * (1.0 / total) - (start + v == target).to(tl.float32)
                tl.store(logits + start + v, gradient.to(logits.dtype.element_ty), mask=start + v < V)
    tl.store(losses + row, loss)


def cross_entropy_(logits, targets, gradient=True):
    """The losses [M] fp32 of logits [M,V] against targets [M]; with `gradient` it takes the place of the logits.

    A target of -100 does not count: its loss and gradient are 0. One outside of the vocabulary makes its loss NaN: to
    refuse it would be to wait for the GPU. Raises ValueError, TritonUnavailable.
    """
    triton_env.require("the kernel of the loss")
    given = f"logits are {list(logits.shape)} {logits.dtype}, targets {list(targets.shape)} {targets.dtype}"
    need(logits.dim() == 2 and logits.shape[1] and targets.shape == logits.shape[:1], f"{given}; give [M,V] and [M]")
    need(logits.dtype in DTYPES, f'{given}; the kernel takes fp32, fp16 and bf16: use impl="torch"')
    need(targets.dtype in (torch.int32, torch.int64), f"{given}; give targets as int32 or int64")
    need(logits.stride(1) == 1, f"{given}; the logits of a row must lie side by side")
    need(logits.device == targets.device, f"logits are on {logits.device}, targets on {targets.device}")
    (M, V), losses = logits.shape, torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if M:
        sizes = blocks(V)
        cross_entropy_kernel[(M,)](logits, targets.contiguous(), losses, logits.stride(0), V, gradient, **sizes)
    return losses


def blocks(V):
    """{BLOCK, num_warps} for rows of V logits."""
    whole = WHOLE if V % 16 == 0 else WHOLE // 2  # accesses of single numbers take more registers
    size = next_power_of_2(V)
    if size > whole:
        return {"BLOCK": PIECE, "num_warps": 8}
    return {"BLOCK": size, "num_warps": min(16, max(4, size // 2048))}


class LinearCrossEntropyByKernel(torch.autograd.Function):
    """As functions.LinearCrossEntropy, whose arguments it takes; dx and dW are kept unscaled, dW in fp32."""

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients):
        (M, D), V = x.shape, len(weight)
        need_dx, need_dw = (with_gradients and wanted for wanted in ctx.needs_input_grad[:2])
        x_rows, w, losses = x.to(dtype), weight.to(dtype), []
        buffer, count = logits_buffer(M, V, dtype, x.device)
        dx = torch.empty(M, D, dtype=dtype, device=x.device) if need_dx else None
        dw = torch.zeros(V, D, dtype=torch.float32, device=x.device) if need_dw else None
        for begin in range(0, M, count):
            rows = slice(begin, min(begin + count, M))
            logits = torch.mm(x_rows[rows], w.T, out=buffer[: rows.stop - begin])
            losses.append(cross_entropy_(logits, targets[rows], need_dx or need_dw))
            if need_dx:
                torch.mm(logits, w, out=dx[rows])
            if need_dw:
                add_product(dw, logits, x_rows[rows])
        n = (targets != -100).sum().clamp_min(1)
        ctx.save_for_backward(dx, dw, n)
        ctx.dtypes = x.dtype, weight.dtype
        return torch.cat(losses).sum() / n if losses else x.new_zeros((), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        *found, n = ctx.saved_tensors
        dx, dw = (t if t is None else scaled(t, grad / n, dtype) for t, dtype in zip(found, ctx.dtypes, strict=True))
        return dx, dw, None, None, None


def logits_buffer(M, V, dtype, device):
    """(logits [rows,V], rows) of a chunk: a tenth of M rows, between FEWEST and MOST; rows begin at 16 numbers."""
    width = cdiv(V, 16) * 16  # else wide loads and tensor cores would not take an odd V
    rows = min(M, MOST, max(FEWEST, M * V // (10 * width) // FEWEST * FEWEST))
    buffer = torch.empty(rows, width, dtype=dtype, device=device)
    buffer[:, V:] = 0  # oneDNN's bf16 product on CPUs with AMX reads on beyond a row, times 0: NaN would stay NaN
    return buffer[:, :V], max(rows, 1)


def add_product(dw, gradient, x):
    """dw [V,D] fp32 += gradient^T x, with no tensor of that size between where torch can."""
    if not dw.is_cuda or x.dtype == torch.float32:
        dw.addmm_(gradient.T.float(), x.float())
    elif ADDS_TO_FP32:
        torch.addmm(dw, gradient.T, x, out_dtype=torch.float32, out=dw)
    else:
        dw += torch.mm(gradient.T, x, out_dtype=torch.float32)


def scaled(tensor, factor, dtype):
    """tensor * factor in `dtype`, in one pass."""
    return torch.mul(tensor, factor, out=torch.empty(tensor.shape, dtype=dtype, device=tensor.device))


def linear_cross_entropy(x, weight, targets, dtype, with_gradients):
    """See functions.LinearCrossEntropy. Raises ValueError for shapes that do not fit, TritonUnavailable."""
    given = f"x is {list(x.shape)}, weight {list(weight.shape)} and targets {list(targets.shape)}"
    fits = x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1] and targets.shape == x.shape[:1]
    need(fits, f"{given}; give [M,D], [V,D] and [M]")
    return LinearCrossEntropyByKernel.apply(x, weight, targets, dtype, with_gradients)
