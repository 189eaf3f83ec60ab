"""The flat step: one more token for each sequence of a batch, on a CPU, in few operations.

A small model that decodes on a CPU spends its time on calls, not on arithmetic: for a token of preset `tiny` the
modules run some 450 operations of torch on a few numbers each. This step runs 180 and gives the same logits. What it
computes with is prepared once per cache and kept in it:

- Attention is absorbed (V2 section 2.1.2). With W_UK inside the queries' projection and W_UV inside W_O

      score = (W_UK^T q_nope) . c_kv + q_rope . k_rope,        u = sum_h W_O,h W_UV,h (sum_s p_hs c_kv,s)

  all heads' queries and the new latent are one product with x, and the way back is another.
- RMSNorm divides by sqrt(mean(x^2) + eps) = |(x, sqrt(N eps))| / sqrt(N): a constant beside x, and one norm does it.
- RoPE is one complex product: it turns the pairs of all heads and of the key where they lie.
- The router and the shared experts read the same y: one product. The chosen experts are read where they lie.

`find_step` says when it applies: no gradient, no autocast, fp32, MLA whose folded weights stay small, no hook anywhere
(the modules are not called). All else takes the ordinary path. As the latents do, the prepared weights belong to the
model that read the prompt: after a change of its weights, fill a cache anew.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as torch_hooks

from minids.layers import RMSNorm, SwiGLU, rope_tables
from minids.mla import MLA
from minids.moe import Experts, Gate, MoE

PIECES, LONG = 8, 2048  # torch multiplies one narrow matrix in one thread, and several in as many as there are
PARTS = {MLA, MoE, Gate, Experts, SwiGLU, RMSNorm, nn.Linear, nn.Embedding, nn.ModuleList}


def find_step(model, tokens, cache, kinds):
    """The Step for `tokens` after `cache`, or None where the ordinary path has to go; `kinds` are the model's classes.

    It is prepared with the first token after a prompt, and dropped with the next prompt, or for another model.
    """
    if not cache or tokens.dim() != 2:
        return None
    first, (B, T) = cache[0], tokens.shape
    if T > 1 or first.length == 0 or getattr(first.step, "model", model) is not model:
        first.step = None
    if T > 1 or torch.is_grad_enabled() or model.training or torch.is_autocast_enabled("cpu"):
        return None
    if first.step is None:
        first.step = covered(model, cache, kinds) and Step(model, first)
    fits = first.step and first.length < first.max_len and first.step.x.shape[0] == B
    return first.step if fits and not any(first.step.hooks) else None


def covered(model, cache, kinds):
    """Whether `model` has only parts that Step knows, in fp32 on a CPU, and attention that it can fold."""
    known = PARTS | set(kinds)
    own = {"forward", "grouped_product"}  # another's, put into an object: its own computation
    if not all(type(part) in known and not own & vars(part).keys() for part in model.modules()):
        return False
    tensors = [*model.parameters(), *cache[0].tensors]
    plain = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return plain and model.cfg.kv_lora_rank % 2 == 0 and folds_small(model.cfg)  # even: for RoPE's pairs


def folds_small(cfg):
    """Whether neither folded weight is more than twice its parts; not so in the published models, whose C is large."""
    C, R = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    growth = max((C + R) / cfg.qk_head_dim, C / cfg.v_head_dim)
    return growth <= 2 and not (cfg.q_lora_rank or cfg.attention_bias)


def fold(attn):
    """The absorbed form's two weights: [(H+1)*(C+R),D] from x to latent and queries, [D,H*C] from latents to out."""
    H, P = attn.cfg.num_attention_heads, attn.cfg.qk_nope_head_dim
    kv_b, q = (part.weight.unflatten(0, (H, -1)) for part in (attn.kv_b_proj, attn.q_proj))
    (w_uk, w_uv), (nope, rope) = kv_b.tensor_split([P], 1), q.tensor_split([P], 1)
    queries = torch.cat([w_uk.mT @ nope, rope], 1).flatten(0, 1) * attn.scale
    out = attn.o_proj.weight.unflatten(1, (H, -1)).transpose(0, 1) @ w_uv
    return torch.cat([attn.kv_a_proj_with_mqa.weight, queries]), out.transpose(0, 1).flatten(1)


class Norm:
    """RMSNorm of wide[:, 1:], to `out` (None: in place); wide [B,1+N] has sqrt(N eps) in its first column."""

    def __init__(self, norm, wide, out=None):
        N = norm.weight.shape[0]
        self.wide, self.x, self.size = wide, wide[:, 1:], wide.new_empty(len(wide), 1)
        self.out = self.x if out is None else out
        self.weight = norm.weight * N**0.5
        wide[:, 0] = (N * norm.eps) ** 0.5

    def __call__(self):
        torch.linalg.vector_norm(self.wide, dim=-1, keepdim=True, out=self.size)
        return torch.div(self.x, self.size, out=self.out).mul_(self.weight)


class Attention:
    """x += absorbed attention of the normalised x, whose latent goes into the cache."""

    def __init__(self, attn, norm):
        B, cfg = len(norm.x), attn.cfg
        H, C, R = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_rope_head_dim
        into, out = fold(attn)
        room = into.new_zeros(B, 2 + len(into))  # two more numbers: the latent's norm wants one, pairs an even number
        self.norm, self.into, self.out, self.projected = norm, into.t(), out.t(), room[:, 2:]
        rows = self.projected.unflatten(1, (H + 1, C + R))
        self.new, self.queries = rows[:, 0], rows[:, 1:]
        self.pairs = torch.view_as_complex(rows[..., C:].unflatten(-1, (-1, 2)))
        self.latent_norm = Norm(attn.kv_a_layernorm, room[:, 1 : C + 2])
        self.read = into.new_empty(B, H, C)
        self.flat_read = self.read.flatten(1)

    def __call__(self, cache, phase):
        torch.mm(self.norm(), self.into, out=self.projected)
        self.latent_norm()
        self.pairs.mul_(phase)
        (latents,) = cache.tensors
        latents[:, cache.length] = self.new
        cache.length += 1
        if not self.in_pieces(latents, cache.length):
            latents = latents[:, : cache.length]
            scores = torch.bmm(self.queries, latents.mT)
            torch.bmm(torch.softmax(scores, -1, out=scores), latents[..., : self.read.shape[-1]], out=self.read)
        self.norm.x.addmm_(self.flat_read, self.out)

    def in_pieces(self, latents, length):
        """Attend over a long cache in PIECES equal pieces, which torch shares among threads; whether that was done."""
        C, L = self.read.shape[-1], -(-length // PIECES)
        if length < LONG or len(latents) > 1 or latents.shape[1] < PIECES * L:
            return False
        latents = latents[0, : PIECES * L].unflatten(0, (PIECES, L))
        scores = torch.bmm(self.queries.expand(PIECES, -1, -1), latents.mT).transpose(0, 1).flatten(1)
        scores[:, length:] = float("-inf")  # what lies behind the last position
        weights = torch.softmax(scores, -1, out=scores).unflatten(1, (PIECES, L)).transpose(0, 1)
        torch.sum(torch.bmm(weights, latents[..., :C]), 0, keepdim=True, out=self.read)
        return True


class FeedForward:
    """x += SwiGLU of the normalised x: the dense one, or the shared experts and the gated sum of the chosen ones."""

    def __init__(self, mlp, norm):
        self.moe, self.norm, self.y = mlp if isinstance(mlp, MoE) else None, norm, norm.out
        always, E = (mlp.shared_experts, mlp.cfg.n_routed_experts) if self.moe else (mlp, 0)
        weights = [mlp.gate.weight] if self.moe else []
        weights += [always.gate_proj.weight, always.up_proj.weight] if always else []
        self.into = torch.cat(weights).t()
        self.inner = self.into.new_empty(len(norm.x), self.into.shape[1])
        self.logits, (self.gate, self.up) = self.inner[:, :E], self.inner[:, E:].chunk(2, 1)
        self.down = always.down_proj.weight.detach().t() if always else self.into.new_empty(0, norm.x.shape[1])
        if self.moe and len(norm.x) == 1:
            experts, A = mlp.experts, mlp.cfg.num_experts_per_tok
            self.gate_ups, self.downs = list(experts.gate_up_proj.detach()), list(experts.down_proj.detach())
            rows = self.into.new_empty(A, experts.gate_up_proj.shape[1])
            self.rows, (self.gates, self.ups), self.acts = list(rows), rows.chunk(2, 1), list(rows.chunk(2, 1)[0])

    def __call__(self):
        x, y = self.norm.x, self.norm()
        torch.mm(y, self.into, out=self.inner)
        x.addmm_(F.silu(self.gate, inplace=True).mul_(self.up), self.down)
        if self.moe:
            indices, gates, _ = self.moe.gate.route(self.logits)
            if len(x) > 1:
                x.add_(self.moe.experts(y, indices, gates))
            else:
                self.add_chosen(x[0], y[0], indices[0].tolist(), gates[0].tolist())

    def add_chosen(self, x, y, chosen, gates):
        """x [D] += sum_i g_i FFN_i(y) (V3 eq. 12) of the chosen experts, whose weights are not copied."""
        for row, expert in zip(self.rows, chosen, strict=True):
            torch.mv(self.gate_ups[expert], y, out=row)
        F.silu(self.gates, inplace=True).mul_(self.ups)
        for act, expert, gate in zip(self.acts, chosen, gates, strict=True):
            x.addmv_(self.downs[expert], act, alpha=gate)


class Step:
    """step(tokens [B,1], cache) gives logits [B,1,V] and adds the tokens to the cache."""

    @torch.inference_mode(False)  # so that what is prepared serves in and out of inference mode
    @torch.no_grad()
    def __init__(self, model, cache):
        self.model = model
        cfg, (B, max_len) = model.cfg, cache.tensors[0].shape[:2]
        wide, y = torch.empty(B, 1 + cfg.hidden_size), torch.empty(B, cfg.hidden_size)
        self.x, self.norm = wide[:, 1:], Norm(model.norm, wide, y)
        self.embedding, self.head = model.embed_tokens.weight.detach(), model.lm_head.weight.detach()
        self.phases = torch.complex(*rope_tables(cfg, torch.arange(max_len)))
        self.layers = [
            (
                Attention(layer.self_attn, Norm(layer.input_layernorm, wide, y)),
                FeedForward(layer.mlp, Norm(layer.post_attention_layernorm, wide, y)),
            )
            for layer in model.layers
        ]
        self.hooks = [torch_hooks._global_forward_hooks, torch_hooks._global_forward_pre_hooks]
        self.hooks += [hooks for part in model.modules() for hooks in (part._forward_hooks, part._forward_pre_hooks)]

    def __call__(self, tokens, cache):
        torch.index_select(self.embedding, 0, tokens[:, 0], out=self.x)
        phase = self.phases[cache[0].length]
        for (attention, feed_forward), layer_cache in zip(self.layers, cache, strict=True):
            attention(layer_cache, phase)
            feed_forward()
        return F.linear(self.norm(), self.head).unsqueeze(1)

    def __deepcopy__(self, memo):
        """None: a copied cache prepares its own."""
