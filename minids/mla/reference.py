"""Multi-head Latent Attention in equations: one latent per position instead of keys and values per head.

    c_t = RMSNorm(W_DKV x_t)  [C]     k_rope_t = RoPE(W_KR x_t)  [R], one for all heads     (V3 eq. 1, 3)

Only c_t and k_rope_t are cached. W_UK and W_UV (together `kv_b`, [H,P+V,C]) make keys and values of the latent:

    expanded   k_nope = W_UK c, v = W_UV c; then attention as ever, H heads of width P+R. Best where T is near S.
    absorbed   q_nope . (W_UK c) = (W_UK^T q_nope) . c, so the queries go to the latent instead, and the sum of values
               is taken over latents: one K/V head of width C+R for all H. Nothing is expanded. Best where T is small.

Both are the same function; the scale is (P+R)^-0.5 in both (V2 eq. 9-19).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.layers import apply_rope, rms_norm


def compress_kv(
    x: Tensor, w_kv_a: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """What is cached of x [B,T,D], w_kv_a [C+R,D]: c_kv [B,T,C], normed, and k_rope [B,T,R], turned (V3 eq. 1, 3)."""
    c_kv, k_rope = F.linear(x, w_kv_a).split([norm_weight.shape[0], 2 * cos.shape[-1]], -1)
    return rms_norm(c_kv, norm_weight, eps), apply_rope(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)


def split_heads_kv(kv: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """k_nope [B,S,H,P] and v [B,S,H,V] of kv_b_proj's result [B,S,H*(P+V)]; a head has its key, then its value."""
    kv = kv.unflatten(-1, (heads, -1))
    return kv[..., :nope], kv[..., nope:]


def decoupled_rope(q: Tensor, heads: int, nope: int, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q_nope [B,T,H,P] and q_rope [B,T,H,R], turned, of queries [B,T,H*(P+R)], [nope | rope] a head (V3 eq. 7-9)."""
    q = q.unflatten(-1, (heads, -1))
    return q[..., :nope], apply_rope(q[..., nope:], cos, sin)


def visible(T: int, S: int, device=None) -> Tensor:
    """Which of S keys each of the last T positions may see: [T,S] bool, causal."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def expand(c_kv: Tensor, kv_b: Tensor, nope: int) -> tuple[Tensor, Tensor]:
    """Keys without rope [B,S,H,P] and values [B,S,H,V] of the latents [B,S,C]; kv_b [H,P+V,C] (V3 eq. 2, 5)."""
    both = torch.einsum("bsc,hdc->bshd", c_kv, kv_b)
    return both[..., :nope], both[..., nope:]


def attend_expanded(q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, kv_b: Tensor, scale: float) -> Tensor:
    """Attention over expanded keys and values; q_nope [B,T,H,P], q_rope [B,T,H,R], c_kv [B,S,C] to [B,T,H,V]."""
    k_nope, v = expand(c_kv, kv_b, q_nope.shape[-1])
    scores = torch.einsum("bthp,bshp->bhts", q_nope, k_nope) + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    return torch.einsum("bhts,bshv->bthv", softmax(scores * scale, v.dtype), v)


def attend_absorbed(q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, kv_b: Tensor, scale: float) -> Tensor:
    """The same over the latents themselves, nothing expanded; arguments and result as attend_expanded."""
    q_latent = absorb_query(q_nope, kv_b)
    scores = torch.einsum("bthc,bsc->bhts", q_latent, c_kv) + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)
    latent = torch.einsum("bhts,bsc->bthc", softmax(scores * scale, c_kv.dtype), c_kv)
    return project_values(latent, kv_b, q_nope.shape[-1])


def absorb_query(q_nope: Tensor, kv_b: Tensor) -> Tensor:
    """The queries [B,T,H,P] brought to the latents by W_UK^T, [B,T,H,C]; kv_b [H,P+V,C] (V2 section 2.1.2)."""
    return torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, : q_nope.shape[-1]])


def project_values(latent: Tensor, kv_b: Tensor, nope: int) -> Tensor:
    """Sums of values [B,T,H,V] of sums of latents [B,T,H,C] by W_UV; kv_b [H,P+V,C], P is `nope` (V2 section 2.1.2)."""
    return torch.einsum("bthc,hvc->bthv", latent, kv_b[:, nope:])


def softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal softmax of scores [B,H,T,S], in fp32 (fp64 stays), given in `dtype` (V3 eq. 10)."""
    T, S = scores.shape[-2:]
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return wide.masked_fill(~visible(T, S, scores.device), float("-inf")).softmax(-1).to(dtype)


# One sequence in parts ------------------------------------------------------------------------------------------------


def decode_block(q: Tensor, latents: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """Attention over one part of a cache: q [B,H,C+R] absorbed, latents [B,n,C+R]; out [B,H,C], log-sum-exp [B,H].

    `rank` is C: the first C numbers of a row are its value, all C+R its key. n is 1 at least; all n are seen.
    """
    scores = torch.einsum("bhw,bnw->bhn", q, latents) * scale
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    out = torch.einsum("bhn,bnc->bhc", weights / total, latents[..., :rank])
    return out, (top + total.log()).squeeze(-1)


def merge_splits(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all N parts, of each part's outs [N,B,H,C] and lses [N,B,H]: [B,H,C] and its log-sum-exp [B,H].

    A part without positions has -inf in `lses`, and anything in `outs`, for nobody wrote it. Where all parts are empty
    the result is zeros and -inf.
    """
    lse = lses.logsumexp(0)
    weights = (lses - lse.where(lse > float("-inf"), 0.0)).exp().unsqueeze(-1)
    return torch.where(weights == 0, 0.0, weights * outs).sum(0), lse


# What the forms cost --------------------------------------------------------------------------------------------------


def decode_flops(form: str, H: int, C: int, R: int, P: int, V: int, T: int, S: int) -> int:
    """FLOPs of one layer's attention for one sequence: T queries over S cached latents, 2 per multiply-add.

    `form` is "expanded" or "absorbed". All T*S scores count, hidden ones too, as a plain product computes them; what
    is the same in both forms (queries, new latents, o_proj) does not. Raises ValueError for another form.
    """
    if form not in ("expanded", "absorbed"):
        raise ValueError(f"form is {form!r}; it must be expanded or absorbed")
    rows, widths = (S, P + R + V) if form == "expanded" else (T, C + R + C)
    return 2 * H * (rows * C * (P + V) + T * S * widths)


def crossover(C: int, P: int, V: int, S: int) -> float:
    """The number of queries T at which both forms cost the same over S positions; below it absorbing is cheaper.

    Solved from decode_flops for 2C > P+V, as all published models have it; H and R fall out.
    """
    once, extra = C * (P + V), 2 * C - P - V
    return S * once / (once + S * extra)
