"""The MLA layer with its latent cache: expanded for training and prefill, absorbed for decode.

With a cache of S positions, expanding costs S*C*(P+V) multiply-adds a head however few the T queries are; absorbing
costs T*C*(P+V) once, and then T*S*(C - P + C - V) more in the attention. `form="auto"` takes the cheaper one.

The absorbed form reads each cached row once for all heads: on a GPU by kernels.decode. The expanded form is plain
attention over keys of P+R and values of V numbers, and torch's fused kernel does that, forward and backward. It wants
one width, so zeros are put after the values (192 and 128 wide: a sixth of the arithmetic). No kernel here takes its
place: none has been measured to be faster than the one that its makers tune for each GPU.
"""

import torch
from torch import nn

from minids.layers import Cache, RMSNorm, apply_rope, causal_attention, softmax_scale, use_kernel
from minids.mla import reference

NORM_EPS = 1e-6  # of the inner norms, whatever the config says: as transformers


class LatentCache(Cache):
    """Latents and rope keys of one layer in one tensor [B,max_len,C+R]: C+R numbers per token and nothing else."""

    def __init__(self, batch, max_len, latent, rope, dtype=torch.float32, device="cpu"):
        super().__init__(batch, max_len, (latent + rope,), dtype=dtype, device=device)


class MLA(nn.Module):
    """Multi-head Latent Attention: attn(x [B,T,D], cos, sin [T,R/2], cache=None) gives [B,T,D] (V3 eq. 1-11).

    With a cache the T tokens follow what it holds. `form` is "auto", "expanded" or "absorbed". `impl` "auto" takes the
    Triton kernels on a GPU; "torch" takes none; "triton" asks for them, and so for the absorbed form, which has no
    backward pass there. Raises ValueError for a form and an impl that do not go together, or where the cache is full.
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
        """See the class."""
        if form not in ("auto", "expanded", "absorbed"):
            raise ValueError(f"form is {form!r}; it must be one of auto, expanded, absorbed")
        if (form, impl) == ("expanded", "triton"):
            raise ValueError("form 'expanded' has no Triton kernel (torch attends); use impl='auto' or 'torch'")
        q_nope, q_rope = self.queries(x, cos, sin, impl)
        latents = self.latents(x, cos, sin, impl)
        if cache is not None:
            latents = cache.append(latents)[0].to(q_nope.dtype)
        if form == "auto":
            pays = impl == "triton" or absorbing_pays(self.cfg, x.shape[1], latents.shape[1])
            form = "absorbed" if pays else "expanded"
        if form == "absorbed":
            return self.o_proj(self.absorbed(q_nope, q_rope, latents, impl).flatten(-2))
        return self.o_proj(self.expanded(q_nope, q_rope, latents).flatten(-2))

    def queries(self, x, cos, sin, impl="auto"):
        """q_nope [B,T,H,P] and q_rope [B,T,H,R], turned (V3 eq. 6-9)."""
        cfg = self.cfg
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x), impl)) if cfg.q_lora_rank else self.q_proj(x)
        q = q.unflatten(-1, (cfg.num_attention_heads, cfg.qk_head_dim))
        q_nope, q_rope = q.split([cfg.qk_nope_head_dim, cfg.qk_rope_head_dim], -1)
        return q_nope, apply_rope(q_rope, cos, sin, impl)

    def latents(self, x, cos, sin, impl="auto"):
        """What is cached: c_kv after its norm beside k_rope, turned and without a norm, [B,T,C+R] (V3 eq. 1, 3)."""
        cfg = self.cfg
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        c_kv, k_rope = self.kv_a_layernorm(c_kv, impl), apply_rope(k_rope.unsqueeze(-2), cos, sin, impl).squeeze(-2)
        return torch.cat([c_kv, k_rope.to(c_kv.dtype)], -1)

    def expanded(self, q_nope, q_rope, latents):
        """As reference.attend_expanded, by the fused attention of torch; latents [B,S,C+R] to [B,T,H,V]."""
        cfg = self.cfg
        c_kv, k_rope = latents.split([cfg.kv_lora_rank, cfg.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(c_kv).unflatten(-1, (cfg.num_attention_heads, -1))
        k_nope, v = kv.split([cfg.qk_nope_head_dim, cfg.v_head_dim], -1)
        k_rope = k_rope.to(k_nope.dtype).unsqueeze(1).expand(-1, cfg.num_attention_heads, -1, -1)
        # heads first, as attention wants them
        q = torch.cat([q_nope.transpose(1, 2), q_rope.to(q_nope.dtype).transpose(1, 2)], -1)
        k = torch.cat([k_nope.transpose(1, 2), k_rope], -1)
        return causal_attention(q.transpose(1, 2), k.transpose(1, 2), v, self.scale)

    def absorbed(self, q_nope, q_rope, latents, impl="auto"):
        """As reference.attend_absorbed: queries go to the latents, and their sum comes back; [B,S,C+R] to [B,T,H,V]."""
        C, P, H = self.cfg.kv_lora_rank, self.cfg.qk_nope_head_dim, self.cfg.num_attention_heads
        kv_b = getattr(self.kv_b_proj, "dequantized", lambda: self.kv_b_proj.weight)()  # what fp8.Fp8Linear multiplies
        kv_b = kv_b.view(H, -1, C).to(q_nope.dtype)
        q_latent = torch.einsum("bthp,hpc->bthc", q_nope, kv_b[:, :P])
        q = torch.cat([q_latent, q_rope.to(q_latent.dtype)], -1)
        attend = attend_by_kernel if decodes(impl, q, C) else attend_by_torch
        return torch.einsum("bthc,hvc->bthv", attend(q, latents.to(q.dtype), self.scale, C), kv_b[:, P:])


def attend_by_torch(q, latents, scale, rank):
    """Causal attention of q [B,T,H,C+R] over latents [B,S,C+R], [B,T,H,C]: a token's heads are rows of one product."""
    B, T, H, width = q.shape
    scores = torch.bmm(q.reshape(B, T * H, width) * scale, latents.mT)
    if T > 1:
        seen = reference.visible(T, latents.shape[1], scores.device).unsqueeze(1)
        scores = scores.view(B, T, H, -1).masked_fill(~seen, float("-inf")).view(scores.shape)
    weights = torch.softmax(scores, -1, dtype=None if scores.dtype == torch.float64 else torch.float32)
    return torch.bmm(weights.to(latents.dtype), latents)[..., :rank].view(B, T, H, rank)


def attend_by_kernel(q, latents, scale, rank):
    """The same by kernels.decode."""
    from minids.mla import kernels

    lengths = torch.full(q.shape[:1], latents.shape[1], dtype=torch.int32, device=q.device)
    return kernels.decode(q, latents, lengths, scale, rank)[0]


def decodes(impl, q, rank):
    """Whether kernels.decode attends for q [B,T,H,C+R]: see use_kernel; not where a gradient is needed."""
    needs_gradient = torch.is_grad_enabled() and q.requires_grad
    if impl == "triton" and needs_gradient:
        raise ValueError("MLA's decode kernel has no backward pass; call it under torch.no_grad(), or with impl='auto'")
    fits = rank <= 512 and q.shape[-1] - rank <= 128
    return (impl == "triton" or (fits and not needs_gradient)) and use_kernel(impl, q, "MLA's decoding")


def absorbing_pays(cfg, T, S):
    """Whether the absorbed form needs fewer multiply-adds for T queries over S positions than the expanded one."""
    C, P, V = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    extra = T * S * max(2 * C - P - V, 0)
    return T * C * (P + V) + extra < S * C * (P + V)
