"""The baseline: multi-head attention whose K/V heads serve groups of query heads (MHA, GQA, MQA), and its cache.

With G K/V heads of width d the cache keeps 2*G*d numbers per token and layer: G = H is MHA, G = 1 is MQA (2305.13245).
"""

import torch
from torch import nn

from minids.layers import Cache, apply_rope, causal_attention, softmax_scale


class KVCache(Cache):
    """Keys and values of one layer, [B,max_len,G,d] each; see Cache."""

    def __init__(self, batch, max_len, heads, width, dtype=torch.float32, device="cpu"):
        super().__init__(batch, max_len, (heads, width), (heads, width), dtype=dtype, device=device)


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
        """See the class."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.width)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is not None:
            k, v = (t.to(q.dtype) for t in cache.append(k, v))
        return self.o_proj(causal_attention(q, k, v, self.scale).flatten(-2))
