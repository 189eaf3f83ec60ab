"""Right answers to lesson 04 in other styles."""

from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids.mla import reference

right = Answers()


@right("04.1")
def head_by_head(q_nope, kv_b):
    P = q_nope.shape[-1]
    return torch.stack([q_nope[:, :, h] @ kv_b[h, :P] for h in range(q_nope.shape[2])], 2)


@right("04.1")
def queries_filled_with_zeros(q_nope, kv_b):
    return torch.einsum("bthw,hwc->bthc", F.pad(q_nope, (0, kv_b.shape[1] - q_nope.shape[-1])), kv_b)


@right("04.1")
def batches_of_heads(q_nope, kv_b):
    B, T, H, P = q_nope.shape
    q = q_nope.permute(2, 0, 1, 3).reshape(H, B * T, P)
    return torch.bmm(q, kv_b[:, :P]).view(H, B, T, -1).permute(1, 2, 0, 3)


@right("04.2")
def all_rows_then_cut(latent, kv_b, nope):
    return (kv_b @ latent[..., None])[..., nope:, 0]


@right("04.2")
def diagonal_of_all_pairs(latent, kv_b, nope):
    pairs = torch.tensordot(latent.double(), kv_b[:, nope:].double(), dims=([3], [2]))
    return torch.diagonal(pairs, dim1=2, dim2=3).transpose(2, 3).to(latent.dtype)


@right("04.3")
def one_key_for_all_heads(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    T, S = q_nope.shape[1], c_kv.shape[1]
    q = torch.cat([reference.absorb_query(q_nope, kv_b), q_rope], -1).transpose(1, 2)
    k, v = torch.cat([c_kv, k_rope], -1)[:, None].expand(-1, q.shape[1], -1, -1), c_kv[:, None]
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    out = F.scaled_dot_product_attention(q, k, v.expand(-1, q.shape[1], -1, -1), mask, scale=scale)
    return reference.project_values(out.transpose(1, 2), kv_b, q_nope.shape[-1])


@right("04.3")
def heads_among_the_queries(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    (B, T, H, P), (S, C) = q_nope.shape, c_kv.shape[1:]
    q = torch.cat([torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, :P]), q_rope], -1).reshape(B, T * H, -1)
    scores = (q @ torch.cat([c_kv, k_rope], -1).mT * scale).view(B, T, H, S)
    later = torch.arange(S) > torch.arange(S - T, S)[:, None]
    weights = scores.masked_fill(later[:, None], -1e9).softmax(-1)
    latent = (weights.view(B, T * H, S) @ c_kv).view(B, T, H, C)
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, P:])


@right("04.3")
def float64_and_a_softmax_by_hand(q_nope, q_rope, c_kv, k_rope, kv_b, scale):
    dtype, P, T, S = q_nope.dtype, q_nope.shape[-1], q_nope.shape[1], c_kv.shape[1]
    q_nope, q_rope, c_kv, k_rope, kv_b = (one.double() for one in (q_nope, q_rope, c_kv, k_rope, kv_b))
    scores = torch.einsum("bthp,hpc,bsc->bhts", q_nope, kv_b[:, :P], c_kv)
    scores = (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * scale
    scores = scores + torch.full((T, S), -torch.inf, dtype=torch.float64).triu(S - T + 1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    return torch.einsum("bhts,bsc,hvc->bthv", weights, c_kv, kv_b[:, P:]).to(dtype)


@right("04.4")
def vectors_of_numpy(form, H, C, R, P, V, T, S):
    numbers = np.array([C * (P + V), P + R + V if form == "expanded" else 2 * C + R])
    return 2 * H * (numbers @ np.array([S if form == "expanded" else T, T * S]))


@right("04.4")
def a_float(form, H, C, R, P, V, T, S):
    once, key, value = {"expanded": (S, P + R, V), "absorbed": (T, C + R, C)}[form]
    return 2.0 * H * (once * C * (P + V) + T * S * (key + value))


@right("04.5")
def by_halves(C, P, V, S):
    low, high = 0.0, float(S)
    for _ in range(200):
        T = (low + high) / 2
        cheaper = T * C * (P + V) + 2 * T * S * C < S * C * (P + V) + T * S * (P + V)
        low, high = (T, high) if cheaper else (low, T)
    return low


@right("04.5")
def from_two_counts_on_a_line(C, P, V, S):
    def gap(T):
        counts = (reference.decode_flops(form, 1, C, 64, P, V, T, S) for form in ("expanded", "absorbed"))
        return Fraction(next(counts) - next(counts))

    return float(gap(0) / (gap(0) - gap(1)))


@right("04.5")
def a_tensor(C, P, V, S):
    both = torch.tensor(C * (P + V), dtype=torch.float64)
    return 1 / (1 / S + (2 * C - P - V) / both)


@right.each
def test_it_passes(name, answer):
    passes(name, answer)
