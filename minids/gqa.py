"""The baseline: multi-head attention whose K/V heads serve groups of query heads (MHA, GQA, MQA), and its cache.

With G K/V heads of width d the cache keeps 2*G*d numbers per token and layer: G = H is MHA, G = 1 is MQA (2305.13245).
"""

import torch
import torch.nn.functional as F
from torch import nn

from minids.layers import apply_rope, softmax_scale


class Cache:
    """Room for `max_len` positions of a batch: tensors [B,max_len,...] of which the first `length` are filled."""

    def __init__(self, max_len, tensors):
        self.max_len, self.tensors, self.length = max_len, tensors, 0

    def append(self, *new):
        """Add `new` tensors [B,T,...] after what is there; gives all that is filled, [B,S,...] each.

        Raises ValueError where they do not fit.
        """
        batch, added = new[0].shape[:2]
        end = self.length + added
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.length} of {self.max_len} positions; {added} more do not fit")
        if batch != self.tensors[0].shape[0]:
            raise ValueError(f"the cache is for a batch of {self.tensors[0].shape[0]}; {batch} sequences were given")
        for tensor, piece in zip(self.tensors, new, strict=True):
            tensor[:, self.length : end] = piece
        self.length = end
        return [tensor[:, :end] for tensor in self.tensors]

    @property
    def nbytes(self):
        """Bytes of the tensors themselves, for all `max_len` positions."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


class KVCache(Cache):
    """Keys and values of one layer, [B,max_len,G,d] each; see Cache."""

    def __init__(self, batch, max_len, heads, width, dtype=torch.float32, device="cpu"):
        shape = (batch, max_len, heads, width)
        super().__init__(max_len, [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)])


class GQA(nn.Module):
    """Grouped-query attention: attn(x [B,T,D], cos, sin [T,d/2], cache=None) gives [B,T,D], causal.

    With a cache the T tokens follow what it holds. Raises ValueError where the cache is full.
    """

    def __init__(self, cfg):
        super().__init__()
        self.heads, self.groups, self.width = cfg.num_attention_heads, cfg.kv_heads, cfg.attention_head_dim
        self.scale = softmax_scale(cfg)
        self.q_proj = nn.Linear(cfg.hidden_size, self.heads * self.width, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, self.groups * self.width, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, self.groups * self.width, bias=False)
        self.o_proj = nn.Linear(self.heads * self.width, cfg.hidden_size, bias=False)

    def forward(self, x, cos, sin, cache=None):
        q, k, v = (proj(x).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = (t.to(q.dtype) for t in cache.append(k, v))
        out = causal_attention(q, k, v, self.scale)
        return self.o_proj(out.flatten(-2))


def causal_attention(q, k, v, scale):
    """softmax(q k^T * scale) v, where the T queries are the last of the S positions; q [B,T,H,*], k, v [B,S,G,*]."""
    T, S = q.shape[1], k.shape[1]
    mask = None
    if 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    q, k, v, width = *(t.transpose(1, 2) for t in (q, k, v)), v.shape[-1]
    v = F.pad(v, (0, max(0, q.shape[-1] - width)))  # torch's fused attention takes q, k and v of one width only
    options = {"scale": scale, "is_causal": T == S > 1, "enable_gqa": q.shape[1] != k.shape[1]}
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)[..., :width].transpose(1, 2)
