"""The mini-DeepSeek out of the learner's own functions: what has passed is used, the rest is the reference.

    parts = Parts()                      # a Part for each function of the model: yours, or the reference
    model = MiniDeepSeek(cfg, parts)     # model(tokens [B,T]) gives logits [B,T,V]

The weights are those of minids.Transformer, under the same names: so the optimizers, checkpoints and generation of
minids work with it. What is computed with them is computed by the parts alone, in fp32, in which they passed.

A whole that has passed is used as it is, with whatever it was made of. A whole that has not is put together here, of
smaller parts: so an absorb_query that has passed serves an attend_absorbed that has not. With FP8 the wholes that
multiply by weights are always put together, for their products become linear_forward and linear_backward.
"""

import torch
import torch.nn.functional as F

from minids.fp8 import reference as fp8
from minids.lab import exercises, progress
from minids.lab.parts import USED, Part
from minids.layers import causal_attention, rope_tables, softmax_scale
from minids.mla.layer import NORM_EPS
from minids.model import Transformer, check_tokens


class Parts:
    """The parts of the model by their names, `parts.swiglu(x, ...)`; `parts.all` is {name: Part}, `parts.fp8` whether
    products by weights are FP8. `own` {exercise: function} takes the place of what was kept in .minids/passed.
    """

    def __init__(self, fp8=False, own=None):
        self.fp8, self.all = fp8, {}
        made_here = {name.removeprefix("made_"): getattr(self, name) for name in dir(self) if name.startswith("made_")}
        for exercise in (exercises.find(number) for place in USED.values() for number in place):
            mine = progress.kept(exercise) if own is None else own.get(exercise.id)
            reference = made_here.get(exercise.name, exercise.reference)
            self.all[exercise.name] = Part(exercise, mine, reference)
        for name in ("swiglu", "compress_kv", "attend_expanded", "moe_forward") if fp8 else ():
            part = self.all[name]
            part.trouble = "its products are FP8 here, so it is put together of them" if part.own else ""
            part.own = None

    def __getattr__(self, name):
        try:
            return self.__dict__["all"][name]
        except KeyError:
            raise AttributeError(f"the model has no part {name!r}") from None

    def __deepcopy__(self, memo):
        return self  # a copied model counts into the same parts

    def linear(self, x, w):
        """x W^T of x [...,K] and w [N,K], in FP8 where that is asked for."""
        if not self.fp8:
            return F.linear(x, w)
        return Fp8Product.apply(x.flatten(0, -2), w, self).unflatten(0, x.shape[:-1])

    def as_multiplied(self, w):
        """w [N,K] itself, or what FP8 makes of it, for a form that does not multiply by it alone."""
        return fp8.dequantize_blocks(*self.quantize_blocks(w, True)) if self.fp8 else w

    # Wholes, put together of smaller parts -----------------------------------------------------------------------

    def made_swiglu(self, x, w_gate, w_up, w_down):
        return self.linear(F.silu(self.linear(x, w_gate)) * self.linear(x, w_up), w_down)

    def made_compress_kv(self, x, w_kv_a, norm_weight, cos, sin, eps):
        c_kv, k_rope = self.linear(x, w_kv_a).split([len(norm_weight), 2 * cos.shape[-1]], -1)
        return self.rms_norm(c_kv, norm_weight, eps), self.apply_rope(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)

    def made_decoupled_rope(self, q, heads, nope, cos, sin):
        q = q.unflatten(-1, (heads, -1))
        return q[..., :nope], self.apply_rope(q[..., nope:], cos, sin)

    def made_attend_expanded(self, q_nope, q_rope, c_kv, k_rope, kv_b, scale):
        H, P = q_nope.shape[-2:]
        k_nope, v = self.split_heads_kv(self.linear(c_kv, kv_b.flatten(0, 1)), H, P)
        k = torch.cat([k_nope, k_rope.unsqueeze(-2).expand(-1, -1, H, -1)], -1)
        return causal_attention(torch.cat([q_nope, q_rope], -1), k, v, scale)

    def made_attend_absorbed(self, q_nope, q_rope, c_kv, k_rope, kv_b, scale):
        q = torch.cat([self.absorb_query(q_nope, kv_b), q_rope], -1)
        k, v = torch.cat([c_kv, k_rope], -1).unsqueeze(-2), c_kv.unsqueeze(-2)  # one head of keys and values for all
        return self.project_values(causal_attention(q, k, v, scale), kv_b, q_nope.shape[-1])

    def made_route(self, logits, bias, top_k, n_group, topk_group, factor):
        scores = logits.sigmoid()
        allowed = scores.detach() + bias
        if n_group > 1:
            allowed = self.group_limit(allowed, n_group, topk_group)
        indices = allowed.topk(top_k, -1).indices
        gates = scores.gather(-1, indices)
        return indices, factor * gates / gates.sum(-1, keepdim=True)

    def made_moe_forward(self, x, indices, gates, gate_up_proj, down_proj, shared):
        out = self.swiglu(x, *shared)
        for expert, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
            token, place = (indices == expert).nonzero(as_tuple=True)
            if len(token):
                y = self.swiglu(x[token], *gate_up.chunk(2), down)
                out = out.index_add(0, token, y * gates[token, place, None])
        return out

    def made_balance_loss(self, scores, indices, alpha):
        shares = scores / scores.sum(-1, keepdim=True)
        return alpha * (self.load_fractions(indices, scores.shape[-1]) * shares.mean(-2)).sum(-1).mean()

    def made_fprop(self, x_fp8, x_scale, w_fp8, w_scale):
        return self.matmul_blockscaled(x_fp8, x_scale, w_fp8, w_scale)

    def made_dgrad(self, dy_fp8, dy_scale, w_fp8, w_scale):
        return self.matmul_blockscaled(dy_fp8, dy_scale, w_fp8.T, w_scale.T)

    def made_wgrad(self, dy, x_fp8, x_scale, power_of_2=False):
        x = fp8.dequantize_tiles(x_fp8, x_scale)
        tiles = *self.quantize_tiles(dy.T, power_of_2), *self.quantize_tiles(x.T, power_of_2)
        return fp8.matmul_blockscaled(*tiles)  # both in tiles: lesson 11's takes blocks for the second one

    def made_linear_forward(self, x, w, power_of_2=False):
        kept = *self.quantize_tiles(x, power_of_2), *self.quantize_blocks(w, power_of_2)
        return self.fprop(*kept), *kept

    def made_linear_backward(self, dy, x_fp8, x_scale, w_fp8, w_scale, power_of_2=False):
        dx = self.dgrad(*self.quantize_tiles(dy, power_of_2), w_fp8, w_scale)
        return dx, self.wgrad(dy, x_fp8, x_scale, power_of_2)


class Fp8Product(torch.autograd.Function):
    """x W^T whose forward and backward are the parts linear_forward and linear_backward, as in lesson 12."""

    @staticmethod
    def forward(ctx, x, w, parts):
        y, *kept = parts.linear_forward(x, w, True)
        ctx.save_for_backward(*kept)
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx, dy):
        return *ctx.parts.linear_backward(dy, *ctx.saved_tensors, True), None


class MiniDeepSeek(Transformer):
    """minids.Transformer's weights, computed by `parts`: model(tokens [B,T]) gives logits [B,T,V] (see above).

    Raises ValueError for a configuration that has what no exercise is about.
    """

    def __init__(self, cfg, parts=None):
        check_config(cfg)
        super().__init__(cfg)
        self.parts = parts or Parts()

    def forward(self, tokens, cache=None, last_only=False):
        x = self.hidden(tokens, cache)
        return self.lm_head(x[:, -1:] if last_only else x)

    def hidden(self, tokens, cache=None):
        """The hidden states [B,T,D] behind the final norm; with a `cache` the tokens follow what it holds."""
        start = cache[0].length if cache else 0
        check_tokens(tokens, self.cfg, start)
        cos, sin = rope_tables(self.cfg, torch.arange(start, start + tokens.shape[1], device=tokens.device))
        with torch.autocast(tokens.device.type, enabled=False):
            x = self.embed_tokens(tokens)
            for index, layer in enumerate(self.layers):
                x = self.block(layer, x, cos, sin, (cache[index], start) if cache else None)
            return self.normed(self.norm, x)

    def block(self, layer, x, cos, sin, cache):
        """One layer: attention and feed-forward, in the frame that is exercise 13.1."""
        attend = self.latent_attention if self.cfg.attention == "mla" else self.plain_attention
        forward = self.experts if hasattr(layer.mlp, "gate") else self.dense
        return self.parts.block_forward(
            x,
            lambda y: self.parts.linear(attend(layer.self_attn, y, cos, sin, cache), layer.self_attn.o_proj.weight),
            lambda y: forward(layer.mlp, y),
            lambda y: self.normed(layer.input_layernorm, y),
            lambda y: self.normed(layer.post_attention_layernorm, y),
        )

    def normed(self, norm, x):
        return self.parts.rms_norm(x, norm.weight, norm.eps)

    # Attention: x [B,T,D] to [B,T,H*V], before o_proj --------------------------------------------------------------

    def latent_attention(self, attn, x, cos, sin, cache):
        """MLA: expanded for training and a prompt, absorbed where few tokens follow many."""
        cfg, parts = self.cfg, self.parts
        H, C, P, R = cfg.num_attention_heads, cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim
        q_nope, q_rope = parts.decoupled_rope(self.queries(attn, x), H, P, cos, sin)
        w, norm = attn.kv_a_proj_with_mqa.weight, attn.kv_a_layernorm.weight
        c_kv, k_rope = parts.compress_kv(x, w, norm, cos, sin, NORM_EPS)
        kv_b, attend = attn.kv_b_proj.weight, parts.attend_expanded
        if cache:
            c_kv, k_rope = put(cache, torch.cat([c_kv, k_rope], -1))[0].split([C, R], -1)
            if x.shape[1] < parts.crossover(C, P, cfg.v_head_dim, c_kv.shape[1]):
                kv_b, attend = parts.as_multiplied(kv_b), parts.attend_absorbed
        return attend(q_nope, q_rope, c_kv, k_rope, kv_b.view(H, -1, C), softmax_scale(cfg)).flatten(-2)

    def queries(self, attn, x):
        """[B,T,H*(P+R)]; through a latent of their own where the configuration has q_lora_rank."""
        if not self.cfg.q_lora_rank:
            return self.parts.linear(x, attn.q_proj.weight)
        c_q = self.normed(attn.q_a_layernorm, self.parts.linear(x, attn.q_a_proj.weight))
        return self.parts.linear(c_q, attn.q_b_proj.weight)

    def plain_attention(self, attn, x, cos, sin, cache):
        """MHA and GQA, the rungs below MLA; one token after others by lesson 02's functions."""
        parts, scale, mha = self.parts, softmax_scale(self.cfg), self.cfg.attention == "mha"
        weights = attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight
        q, k, v = (parts.linear(x, w).unflatten(-1, (-1, attn.width)) for w in weights)
        q, k = parts.apply_rope(q, cos, sin), parts.apply_rope(k, cos, sin)
        if cache:
            k, v = put(cache, k, v)
        if k.shape[1] == x.shape[1]:
            k, v = (t.repeat_interleave(attn.heads // attn.groups, 2) for t in (k, v))
            return parts.causal_attention(q, k, v, scale).flatten(-2)
        if x.shape[1] > 1:
            return causal_attention(q, k, v, scale).flatten(-2)
        if mha:
            return parts.decode_attention(q, *cache[0].tensors, cache[0].length, scale).flatten(-2)
        return parts.grouped_attention(q, k, v, scale).flatten(-2)

    # Feed-forward: x [B,T,D] to [B,T,D] ----------------------------------------------------------------------------

    def dense(self, mlp, x):
        return self.parts.swiglu(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)

    def experts(self, moe, x):
        """The router and what it chose; in training also the load of each expert, and the balance loss."""
        cfg, parts, gate, rows, own = self.cfg, self.parts, moe.gate, x.flatten(0, 1), moe.shared_experts
        logits, A = F.linear(rows, gate.weight), cfg.num_experts_per_tok
        limits = A, cfg.n_group, cfg.topk_group, cfg.routed_scaling_factor
        indices, gates = parts.route(logits, gate.e_score_correction_bias, *limits)
        shared = own.gate_proj.weight, own.up_proj.weight, own.down_proj.weight
        out = parts.moe_forward(rows, indices, gates, moe.experts.gate_up_proj, moe.experts.down_proj, shared)
        if self.training:
            gate.load += torch.bincount(indices.flatten(), minlength=cfg.n_routed_experts)
            scores = logits.sigmoid().unflatten(0, x.shape[:2])
            moe.balance_loss = parts.balance_loss(scores, scores.topk(A, -1).indices, cfg.aux_loss_alpha)
        else:
            moe.balance_loss = None
        return out.view_as(x)

    @torch.no_grad()
    def update_expert_bias(self, rate):
        """Move each router's bias towards balance; gives MaxVio and the loads, as Transformer.update_expert_bias."""
        gates = [moe.gate for moe in self.moe_layers()]
        if not gates:
            return torch.zeros(()), torch.zeros(0, 0)
        loads = torch.stack([gate.load for gate in gates])
        violations = torch.stack([self.parts.max_violation(load) for load in loads])
        for gate, load in zip(gates, loads, strict=True):
            gate.e_score_correction_bias.copy_(self.parts.update_bias(gate.e_score_correction_bias, load, rate))
            gate.load.zero_()
        return violations.mean(), loads / loads.mean(1, keepdim=True)


def put(cache, *new):
    """Append to a layer's cache after its first `start` positions; a second call of one step takes the same place."""
    layer, start = cache
    layer.length = start
    return layer.append(*new)


def check_config(cfg):
    """Raise ValueError for what the exercises do not cover."""
    foreign = {
        "attention_bias": cfg.attention_bias,
        "num_nextn_predict_layers": cfg.num_nextn_predict_layers,
    }
    if cfg.n_routed_experts:
        foreign["topk_method"] = cfg.topk_method != "noaux_tc"
        foreign["norm_topk_prob"] = not cfg.norm_topk_prob
        foreign["n_shared_experts"] = not cfg.n_shared_experts
    for name in (name for name, is_foreign in foreign.items() if is_foreign):
        value = getattr(cfg, name)
        raise ValueError(f"{name} is {value!r}; no exercise is about that, so take minids.Transformer for such a model")
