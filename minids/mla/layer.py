"""The MLA layer with its latent cache: expanded for training and prefill, absorbed for decode.

With a cache of S positions, expanding costs S*C*(P+V) multiply-adds a head however few the T queries are; absorbing
costs T*C*(P+V) once, and then T*S*(C - P + C - V) more in the attention. `form="auto"` takes the cheaper one.
"""

import torch
from torch import nn

from minids.layers import Cache, RMSNorm, apply_rope, causal_attention, check_impl, softmax_scale
from minids.mla import reference

FORMS = ("auto", "expanded", "absorbed")
NORM_EPS = 1e-6  # of the inner norms, whatever the config says: as transformers


class LatentCache(Cache):
    """Latents and rope keys of one layer in one tensor [B,max_len,C+R]: C+R numbers per token and nothing else."""

    def __init__(self, batch, max_len, latent, rope, dtype=torch.float32, device="cpu"):
        super().__init__(batch, max_len, (latent + rope,), dtype=dtype, device=device)


class MLA(nn.Module):
    """Multi-head Latent Attention: attn(x [B,T,D], cos, sin [T,R/2], cache=None) gives [B,T,D] (V3 eq. 1-11).

    With a cache the T tokens follow what it holds. `form` is "auto", "expanded" or "absorbed"; `impl` is "auto" or
    "torch". Raises ValueError for another form, or where the cache is full.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.scale = cfg, softmax_scale(cfg)
        D, H, C, R = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
        if cfg.q_lora_rank:
            self.q_a_proj = nn.Linear(D, cfg.q_lora_rank, bias=cfg.attention_bias)
            self.q_a_layernorm = RMSNorm(cfg.q_lora_rank, NORM_EPS)
            self.q_b_proj = nn.Linear(cfg.q_lora_rank, H * cfg.qk_head_dim, bias=False)
        else:
            self.q_proj = nn.Linear(D, H * cfg.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(D, C + R, bias=cfg.attention_bias)
        self.kv_a_layernorm = RMSNorm(C, NORM_EPS)
        self.kv_b_proj = nn.Linear(C, H * (cfg.qk_nope_head_dim + cfg.v_head_dim), bias=False)
        self.o_proj = nn.Linear(H * cfg.v_head_dim, D, bias=cfg.attention_bias)

    def forward(self, x, cos, sin, cache=None, form="auto", impl="auto"):
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
        check_impl(impl, "MLA")
        q_nope, q_rope = self.queries(x, cos, sin)
        latents = self.latents(x, cos, sin)
        if cache is not None:
            latents = cache.append(latents)[0].to(q_nope.dtype)
        if form == "auto":
            form = "absorbed" if absorbing_pays(self.cfg, x.shape[1], latents.shape[1]) else "expanded"
        attend = self.absorbed if form == "absorbed" else self.expanded
        return self.o_proj(attend(q_nope, q_rope, latents).flatten(-2))

    def queries(self, x, cos, sin):
        """q_nope [B,T,H,P] and q_rope [B,T,H,R], turned (V3 eq. 6-9)."""
        cfg = self.cfg
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if cfg.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (cfg.num_attention_heads, cfg.qk_head_dim))
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        return q_nope, apply_rope(q_rope, cos, sin)

    def latents(self, x, cos, sin):
        """What is cached: c_kv after its norm beside k_rope, turned and without a norm, [B,T,C+R] (V3 eq. 1, 3)."""
        cfg = self.cfg
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        c_kv, k_rope = self.kv_a_layernorm(c_kv), apply_rope(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)
        return torch.cat([c_kv, k_rope.to(c_kv.dtype)], -1)

    def expanded(self, q_nope, q_rope, latents):
        """As reference.attend_expanded, by the fused attention of torch; latents [B,S,C+R] to [B,T,H,V]."""
        cfg = self.cfg
        c_kv, k_rope = latents.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (cfg.num_attention_heads, -1))
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        k_rope = k_rope.to(k_nope.dtype).unsqueeze(-2).expand(-1, -1, cfg.num_attention_heads, -1)
        q = torch.cat([q_nope, q_rope.to(q_nope.dtype)], -1)
        return causal_attention(q, torch.cat([k_nope, k_rope], -1), v, self.scale)

    def absorbed(self, q_nope, q_rope, latents):
        """As reference.attend_absorbed: the H heads of a token are rows of one product with the cache [B,S,C+R]."""
        C, P, (B, T, H, _), S = self.cfg.kv_lora_rank, self.cfg.qk_nope_head_dim, q_nope.shape, latents.shape[1]
        kv_b = self.kv_b_proj.weight.view(H, -1, C).to(q_nope.dtype)
        q_latent = torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, :P])
        q = torch.cat([q_latent, q_rope.to(q_latent.dtype)], -1).transpose(1, 2).reshape(B, H * T, -1)
        latents = latents.to(q.dtype)
        scores = torch.bmm(q * self.scale, latents.mT)
        if T > 1:
            seen = reference.visible(T, S, scores.device)
            scores = scores.view(B, H, T, S).masked_fill(~seen, float("-inf")).view(B, H * T, S)
        weights = torch.softmax(scores, -1, dtype=None if scores.dtype == torch.float64 else torch.float32)
        latent = torch.bmm(weights.to(latents.dtype), latents)[..., :C].view(B, H, T, C)
        return torch.einsum("bhtc,hvc->bthv", latent, kv_b[:, P:])


def absorbing_pays(cfg, T, S):
    """Whether the absorbed form needs fewer multiply-adds for T queries over S positions than the expanded one."""
    C, P, V = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    extra = T * S * max(2 * C - P - V, 0)
    return T * C * (P + V) + extra < S * C * (P + V)
