"""attention: causal attention over whole sequences, as training and prefill need it, forward and backward, on a GPU.

4096 positions in bf16. MLA expanded has queries and keys 192 wide and values 128, which not every fused attention
takes; MHA has 128 for all three.

- minids: layers.causal_attention, which chooses one of torch's (the reason stands there).
- SDPA: torch's fused attentions one by one: flash takes one width only, so MLA's values are padded with zeros, whose
  products are not counted as work; cuDNN and efficient take both widths. "default" is what torch chooses.
- FlexAttention: torch's attention in Triton, compiled for a causal mask.

Forward is as in training, what backward needs is kept; backward is timed without the forward pass before it. Before any
clock every side's result and gradients are compared with the fp32 formula on fewer positions.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from minids.bench import layers

POSITIONS = 4096


@dataclass(frozen=True)
class Attention(layers.Layer):
    """Causal attention of `batch` sequences and `heads` heads; keys are `width` wide, values `value`."""

    batch: int = 1
    heads: int = 1
    value: int = 128

    def work(self, rows, backward):
        """Bytes of inputs and results once; products below the diagonal: 2, backward 5 (scores, dP, dV, dQ, dK)."""
        numbers, pairs = self.batch * self.heads * rows, self.batch * self.heads * rows**2
        tensors = (2 + 2 * backward) * (self.width + self.value)  # q, k, v, out; and their gradients
        products = 3 * self.width + 2 * self.value if backward else self.width + self.value
        return {"bytes": layers.BYTES * numbers * tensors, "flops": pairs * products}


def inputs(batch, heads, width, value, rows, where):
    """q, k and v of `rows` positions, and nothing else."""
    return [layers.random(batch, rows, heads, size, where=where) for size in (width, width, value)], []


def formula(q, k, v):
    """softmax(q k^T / sqrt(width)) v below the diagonal; [B,T,H,*]."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


# The sides: each gives a function like the formula --------------------------------------------------------------------


def minids(_):
    from minids.layers import causal_attention

    return lambda q, k, v: causal_attention(q, k, v, q.shape[-1] ** -0.5)


def fused(q, k, v):
    """torch's attention on [B,T,H,*]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def default(_):
    return fused


def backend(name, pad=False):
    """How to build SDPA with this backend of torch alone, with values as wide as keys where `pad` says so."""

    def build(_):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(q, k, v):
            wide = F.pad(v, (0, q.shape[-1] - v.shape[-1])) if pad else v
            with sdpa_kernel(getattr(SDPBackend, name)):
                return fused(q, k, wide)[..., : v.shape[-1]]

        return run

    return build


def flex(_):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # each size by itself: no kernel for sizes that may change
    compiled, masks = torch.compile(flex_attention, dynamic=False), {}

    def run(q, k, v):
        T, where = q.shape[1], str(q.device)
        if T not in masks:
            masks[T] = create_block_mask(lambda b, h, t, s: t >= s, None, None, T, T, device=where)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return compiled(q, k, v, block_mask=masks[T]).transpose(1, 2)

    return run


SIDES = {
    ("minids", ""): minids,
    ("SDPA", "default"): default,
    ("SDPA", "flash, padded"): backend("FLASH_ATTENTION", pad=True),
    ("SDPA", "cuDNN"): backend("CUDNN_ATTENTION"),
    ("SDPA", "efficient"): backend("EFFICIENT_ATTENTION"),
    ("FlexAttention", ""): flex,
}


def attention(kind, batch, heads, width, value):
    name = f"{kind} {heads} heads {width}/{value}, batch {batch}"
    draw = partial(inputs, batch, heads, width, value)
    return Attention(name, width, draw, formula, SIDES, (), 0, batch, heads, value)


SHAPES = [("MLA", 4, 16, 192, 128), ("MLA", 1, 128, 192, 128), ("MHA", 4, 16, 128, 128)]  # what matters most first
TINY = [("MLA", 2, 2, 24, 16), ("MHA", 1, 2, 16, 16)]


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where a side's result is wrong."""
    shapes, positions = (TINY, 16) if quick else (SHAPES, POSITIONS)
    cases = [attention(*shape) for shape in shapes]
    return layers.both_ways("attention", cases, "positions", positions, {}, quick, save, until)
