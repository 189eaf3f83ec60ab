"""Autograd functions whose backward is written by hand: the loss, and what torch is slow at in training on a CPU.

Each gives what the plain formula gives, of which autograd would keep and read more than is needed. layers.py chooses.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def root_mean_square(x, eps):
    """sqrt(mean(x^2) + eps) over the last dimension of x [...,D], [...,1]; in three operations, for decoding."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.hypot(norm * x.shape[-1] ** -0.5, scalar(eps**0.5, x.dtype))


@lru_cache(maxsize=32)
def scalar(value, dtype):
    """A 0-dim tensor on the CPU, made once: making it takes as long as the norm's other operations."""
    return torch.tensor(value, dtype=dtype, device="cpu")


class NormOnCPU(torch.autograd.Function):
    """rms_norm where torch has no fused one: fewer passes over x than autograd makes, and less that is kept."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rms = root_mean_square(x, eps)
        ctx.save_for_backward(x, weight, rms)
        return (x / rms).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rms = ctx.saved_tensors
        unit = x / rms
        dw = grad * unit  # of each row; what it says along `unit` changes nothing in x / rms
        dx = torch.addcmul(grad * weight, unit, (dw @ weight).unsqueeze(-1), value=-1 / len(weight)).div_(rms)
        return dx, dw.flatten(0, -2).sum(0), None


class BlockAttention(torch.autograd.Function):
    """Causal attention for training on a CPU: ROWS queries at a time, against the keys up to their end only.

    q and k [B,T,H,*], v [B,T,H,V] give [B,T,H,V]. The probabilities stay in memory for the backward, half of B*H*T^2
    numbers, so ROOM bounds that; with them it takes a third of the time of torch's fused attention (2 cores, T = 256).
    """

    ROWS, ROOM = 64, 2**26

    @staticmethod
    def forward(ctx, q, k, v, scale):
        ctx.scale, (B, T, H, _) = scale, q.shape
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q * scale, k, v))
        out, kept = torch.empty_like(v), []
        later = torch.ones(BlockAttention.ROWS, BlockAttention.ROWS, dtype=torch.bool).triu(1)
        for begin in range(0, T, BlockAttention.ROWS):
            end = min(begin + BlockAttention.ROWS, T)
            scores = torch.bmm(q[:, begin:end], k[:, :end].mT)
            scores[:, :, begin:].masked_fill_(later[: end - begin, : end - begin], float("-inf"))
            kept.append(scores.softmax(-1))
            out[:, begin:end] = torch.bmm(kept[-1], v[:, :end])
        ctx.save_for_backward(q, k, v, *kept)
        return out.unflatten(0, (B, H)).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (B, _, H, _), (q, k, v, *kept), end = grad.shape, ctx.saved_tensors, 0
        grad, wide = grad.transpose(1, 2).flatten(0, 1), torch.promote_types(q.dtype, torch.float32)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for p in kept:
            rows, end = slice(end, p.shape[-1]), p.shape[-1]
            dp = torch.bmm(grad[:, rows], v[:, :end].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            dq[:, rows] = torch.bmm(ds, k[:, :end])
            dk[:, :end] += torch.bmm(ds.mT, q[:, rows])
            dv[:, :end] += torch.bmm(p.mT, grad[:, rows])
        gradients = (t.to(q.dtype).unflatten(0, (B, H)).transpose(1, 2) for t in (dq * ctx.scale, dk, dv))
        return *gradients, None


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x [N,D] W^T [D,V] against targets [N], in nats, a chunk of the logits at a time.

    The gradients are computed with the loss, while a chunk is at hand, so the [N,V] logits are never whole in memory.
    Targets of -100 do not count. `dtype` is that of the products; the softmax is in fp32.
    """

    CHUNK = 256

    @staticmethod
    def forward(ctx, x, weight, targets, dtype, with_gradients):
        counted = targets != -100
        n, wide = counted.sum().clamp_min(1), torch.promote_types(dtype, torch.float32)
        w, losses = weight.to(dtype), []
        dx, dw = (torch.empty_like(x), torch.zeros_like(weight)) if with_gradients else (None, None)
        for begin in range(0, len(x), LinearCrossEntropy.CHUNK):
            rows = slice(begin, begin + LinearCrossEntropy.CHUNK)
            part = x[rows].to(dtype)
            counts = counted[rows].reshape(len(part), 1)
            target = targets[rows].unsqueeze(1).where(counts, 0)  # any other outside of the vocabulary raises below
            logits = F.linear(part, w)
            p = logits.softmax(-1, dtype=wide)
            log_sum = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
            losses.append(((log_sum - logits.gather(1, target)) * counts).sum())
            if with_gradients:  # of the logits: the softmax, minus 1 at the target
                grad = p.scatter_add_(1, target, p.new_full(target.shape, -1.0)).to(dtype)
                dx[rows] = (grad @ w) * (counts / n)
                dw += grad.mT @ (part * counts)
        ctx.save_for_backward(dx, dw.div_(n) if with_gradients else None)
        return torch.stack(losses).sum() / n

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None, None
