"""The MoE layer: a gate that chooses, experts that compute, and the shared expert that sees every token.

The fast path has no loop over experts. It sorts the N = M*A dispatched rows by expert, so that each expert's rows lie
together, and multiplies all of them in one `grouped_mm`:

    x [M,D] --dispatch--> [N,D] --gate_up--> [N,2F] --silu(gate) * up * g--> [N,F] --down--> [N,D] --combine--> [M,D]

Dispatch copies a token to its A rows, combine sums A rows into their token: each is the other's transpose, hence its
backward. Both only gather (the sums go over the inverse permutation), so no scatter has to add atomically, and a step
is the same each time. The gate multiplies before the down-projection, where a row is F wide, instead of D after it.
For a few tokens, as in decoding, sorting costs more than it saves: there the chosen experts' weights are gathered.

On a GPU the kernels of dispatch_kernels.py and kernels.py do all of this, and make no copy of the rows. Of a step they
keep x [M,D], the pre-activations [N,2F] and the plan; with `recompute` not even those [N,2F].
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minids.layers import SwiGLU, product_dtype, silu_mul, use_kernel
from minids.moe import reference

FEW = 2**18  # gathered weights up to which copying them is cheaper than sorting (measured on a CPU)


class Gate(nn.Module):
    """The router: gate(x [M,D]) gives indices [M,A] int64, gates [M,A] fp32 and scores [M,E] fp32.

    The logits are fp32 even under autocast, and so are the bias (only of topk_method "noaux_tc") and `load` [E], the
    number of choices of each expert in training since the last `update_bias`. A token's choices are in no order. A NaN
    logit makes its token's gates NaN, and so what the token gets; its indices are experts all the same. A gate of your
    own in a MoE needs the forward alone; `load` and `update_bias` too where the model's update_expert_bias is called.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        E = cfg.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, cfg.hidden_size))
        nn.init.normal_(self.weight, std=cfg.initializer_range)
        bias = torch.zeros(E, dtype=torch.float32) if cfg.topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("load", torch.zeros(E, dtype=torch.float32), persistent=False)

    def forward(self, x):
        """See the class."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        routed = self.route(logits)
        if self.training:
            chosen = routed[0].flatten()
            self.load.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float32))
        return routed

    def route(self, logits):
        """What forward gives, from the logits [M,E] fp32."""
        cfg = self.cfg
        A, factor = cfg.num_experts_per_tok, cfg.routed_scaling_factor
        groups = (1, 1) if cfg.topk_method == "greedy" else (cfg.n_group, cfg.topk_group)
        if cfg.topk_method == "noaux_tc":
            bias = self.e_score_correction_bias
            return reference.route_v3(logits, bias, A, *groups, normalize=cfg.norm_topk_prob, factor=factor)
        return reference.route_v2(logits, A, *groups, factor=factor)

    @torch.no_grad()
    def update_bias(self, rate):
        """Move the bias by `rate` towards balance (V3 eq. 16), zero `load`, and give its MaxVio as a 0-dim tensor."""
        violation = reference.max_violation(self.load)
        if self.e_score_correction_bias is not None:
            moved = reference.update_bias(self.e_score_correction_bias, self.load, rate)
            self.e_score_correction_bias.copy_(moved)
        self.load.zero_()
        return violation

    def _apply(self, fn, recurse=True):
        """Move to another device as usual, but stay fp32 when the model is cast: a bias moves by 0.001 a step."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            if old is not None and self._buffers[name].dtype != torch.float32:
                self._buffers[name] = old.to(self._buffers[name].device)
        return self


class Experts(nn.Module):
    """The routed experts: experts(x [M,D], indices [M,A], gates [M,A]) gives the gated sum [M,D].

    gate_up_proj is [E,2F,D], the gate half first; down_proj is [E,D,F]. Under autocast the products are in its dtype.
    `impl` "auto" takes the Triton kernels on a GPU and "torch" (grouped_mm) elsewhere; "loop" is the reference. With
    `recompute`, an attribute too, backward computes the pre-activations again, and does not keep them. An index that is
    no expert's adds nothing in the kernels. Raises ValueError for one on a CPU, and for shapes that do not fit.
    """

    grouped_product = None  # fp8.convert puts its own here, which then computes whatever `impl` says: see experts_by

    def __init__(self, n_experts, hidden, width, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(n_experts, hidden, width))
        for weight in (self.gate_up_proj, self.down_proj):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x, indices, gates, impl="auto"):
        """See the class."""
        check(x, indices, gates, self.gate_up_proj, impl)
        dtype, weights = product_dtype(x), (self.gate_up_proj, self.down_proj)
        x = x.to(dtype)
        if self.grouped_product:
            scales = (getattr(self, f"{name}_proj_scale_inv", None) for name in ("gate_up", "down"))
            parts = 1 if self.down_proj.shape[2] % 128 == 0 else 2  # no block of 128 rows in both gate and up
            return experts_by(self.grouped_product, x, indices, gates, *zip(weights, scales, strict=True), parts)
        by_loop = impl == "loop" or (dtype == torch.float64 and impl != "triton")  # grouped_mm has no float64
        by_kernels = not by_loop and use_kernel(impl, x, "the experts")
        few = indices.numel() * sum(weight.numel() for weight in weights) <= FEW * len(weights[0])
        if few and not by_loop and not by_kernels:
            return experts_gathered(x, indices, gates, *weights)
        given = x, indices, gates, *(weight.to(dtype) for weight in weights)
        keep = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if by_kernels:
            return ExpertsByKernels.apply(*given, keep, self.recompute)
        run = reference.experts_loop if by_loop else experts_grouped
        if keep and self.recompute:
            return checkpoint(run, *given, use_reentrant=False, preserve_rng_state=False)
        return run(*given)


def check(x, indices, gates, gate_up_proj, impl):
    """Raise for an `impl` that is not there, and for shapes that do not fit, with both of them."""
    if impl not in ("auto", "torch", "loop", "triton"):
        raise ValueError(f"impl is {impl!r}; it must be one of auto, torch, loop, triton")
    if x.dim() != 2 or x.shape[1] != gate_up_proj.shape[2]:
        raise ValueError(f"x is {list(x.shape)}; these experts take [M,{gate_up_proj.shape[2]}]")
    if indices.dim() != 2 or indices.shape != gates.shape or indices.shape[0] != x.shape[0]:
        shapes = f"indices are {list(indices.shape)} and gates {list(gates.shape)}"
        raise ValueError(f"{shapes}; both must be [M,A], with M = {x.shape[0]} as in x")
    if indices.device.type == "cpu" and indices.numel():  # elsewhere it would wait for the GPU
        low, high = (int(one) for one in indices.aminmax())
        if low < 0 or high >= len(gate_up_proj):
            raise ValueError(f"indices go from {low} to {high}; the experts are 0 to {len(gate_up_proj) - 1}")


class ExpertsByKernels(torch.autograd.Function):
    """The experts' sum by the kernels, with its gradients; `keep` for a backward pass, which may `recompute` pre."""

    @staticmethod
    def forward(ctx, x, indices, gates, gate_up_proj, down_proj, keep, recompute):
        from minids.moe import dispatch_kernels, kernels  # here: `import minids` works without Triton

        order, token, place, ends = dispatch_kernels.dispatch_plan(indices, len(gate_up_proj))
        act, pre = kernels.up(x, gate_up_proj, gates, order, ends, keep and not recompute)
        if keep:
            ctx.save_for_backward(x, gates, gate_up_proj, down_proj, order, token, place, ends, pre)
        return dispatch_kernels.combine(kernels.grouped_gemm(act, down_proj, ends), place)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        from minids.moe import dispatch_kernels, kernels

        x, gates, gate_up_proj, down_proj, order, token, place, ends, pre = ctx.saved_tensors
        if pre is None:
            pre = kernels.up(x, gate_up_proj, gates, order, ends)[1]
        dout, (need_x, _, _, need_gate_up, need_down, *_) = dout.contiguous(), ctx.needs_input_grad
        d_pre, act, d_gates = kernels.down_backward(dout, down_proj, gates, pre, order, ends)
        d_rows = kernels.grouped_gemm(d_pre, gate_up_proj.transpose(1, 2), ends) if need_x else None
        d_x = dispatch_kernels.combine(d_rows, place) if need_x else None
        d_gate_up = kernels.grouped_gemm_dw(x, d_pre, ends, x_token=token) if need_gate_up else None
        d_down = kernels.grouped_gemm_dw(act, dout, ends, dy_token=token) if need_down else None
        return d_x, None, d_gates.to(gates.dtype), d_gate_up, d_down, None, None


def experts_grouped(x, indices, gates, gate_up_proj, down_proj):
    """The experts' sum by two grouped products over rows sorted by expert; arguments as experts_loop."""
    D = x.shape[1]
    x, gate_up_proj, down_proj = pad_to_16_bytes(x, gate_up_proj, down_proj)

    def product(rows, weight, ends, scale):
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)

    return experts_by(product, x, indices, gates, (gate_up_proj, None), (down_proj, None), 1, impl="torch")[:, :D]


def experts_by(product, x, indices, gates, gate_up, down, parts, impl="auto"):
    """The experts' sum [M,D] by product(rows [N,K], weight [E,J,K], ends [E], scale) over rows sorted by expert.

    gate_up and down are a weight and its scale, or None; `parts` 2 makes gate and up by a product each, 1 by one for
    both. `impl` is SwiGLU's.
    """
    plan = reference.dispatch_plan(indices, len(down[0]))
    rows = Dispatch.apply(x, plan.token, plan.place)
    pieces = zip(*([None] * parts if t is None else t.chunk(parts, 1) for t in gate_up), strict=True)
    pre = [product(rows, weight, plan.ends, scale) for weight, scale in pieces]
    gate, up = pre if parts == 2 else pre[0].chunk(2, 1)
    row_gates = gates.flatten().gather(0, plan.order).unsqueeze(1).to(x.dtype)
    y = product(silu_mul(gate, up, impl) * row_gates, down[0], plan.ends, down[1])
    return Combine.apply(y, plan.token, plan.place)


def pad_to_16_bytes(x, gate_up_proj, down_proj):
    """Zeros after D and F where a row is no multiple of 16 bytes, which grouped_mm asks for; they add nothing."""
    step = 16 // x.element_size()
    more_d, more_f = -x.shape[1] % step, -down_proj.shape[2] % step
    if not (more_d or more_f):
        return x, gate_up_proj, down_proj
    halves = F.pad(gate_up_proj.unflatten(1, (2, -1)), (0, more_d, 0, more_f)).flatten(1, 2)
    return F.pad(x, (0, more_d)), halves, F.pad(down_proj, (0, more_f, 0, more_d))


def experts_gathered(x, indices, gates, gate_up_proj, down_proj):
    """The experts' sum for a few tokens, by a copy of just the weights they chose; arguments as experts_loop."""
    (M, A), (_, two_f, D) = indices.shape, gate_up_proj.shape
    chosen = indices.flatten()
    gate_up = gate_up_proj.index_select(0, chosen).to(x.dtype).view(M, A * two_f, D)
    gate, up = torch.bmm(gate_up, x.unsqueeze(2)).view(M * A, two_f).chunk(2, dim=-1)
    rows = F.silu(gate) * up * gates.reshape(-1, 1).to(x.dtype)
    down = down_proj.index_select(0, chosen).to(x.dtype)
    return torch.bmm(rows.unsqueeze(1), down.transpose(1, 2)).view(M, A, D).sum(1)  # row times matrix: 3x faster


class Dispatch(torch.autograd.Function):
    """Copy each token to its A rows: x [M,D] to [N,D]; backward is Combine."""

    @staticmethod
    def forward(ctx, x, token, place):
        ctx.save_for_backward(token, place)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        return Combine.apply(grad, *ctx.saved_tensors), None, None


class Combine(torch.autograd.Function):
    """Sum each token's A rows: y [N,D] to [M,D]; backward is Dispatch."""

    @staticmethod
    def forward(ctx, y, token, place):
        ctx.save_for_backward(token, place)
        return F.embedding_bag(place, y, mode="sum")  # gather and sum at once, without [M,A,D] in between

    @staticmethod
    def backward(ctx, grad):
        return Dispatch.apply(grad, *ctx.saved_tensors), None, None


class MoE(nn.Module):
    """DeepSeekMoE (V3 eq. 12): moe(x [B,T,D]) gives shared experts + routed experts, [B,T,D].

    `balance_loss` is the 0-dim sequence-wise loss, times aux_loss_alpha, of the last forward in training; else None.
    `moe.experts.recompute = True` keeps less of a step: see Experts.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.gate = Gate(cfg)
        self.experts = Experts(cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size)
        shared = cfg.n_shared_experts * cfg.moe_intermediate_size
        self.shared_experts = SwiGLU(cfg.hidden_size, shared) if shared else None
        self.balance_loss = None

    def forward(self, x, impl="auto"):
        """See the class."""
        rows = x.flatten(0, 1)
        indices, gates, scores = self.gate(rows)
        out = self.experts(rows, indices, gates, impl).reshape(x.shape)
        self.balance_loss = self._balance(scores, indices, x.shape[:2]) if self.training else None
        return out if self.shared_experts is None else out + self.shared_experts(x)

    def _balance(self, scores, indices, shape):
        if not self.cfg.aux_loss_alpha:
            return scores.new_zeros(())
        if self.cfg.scoring_func == "sigmoid":  # V3 eq. 18 counts the best scores, not the biased choice
            indices = scores.topk(indices.shape[-1], dim=-1, sorted=False).indices
        return reference.balance_loss(scores.unflatten(0, shape), indices.unflatten(0, shape), self.cfg.aux_loss_alpha)

    def __getstate__(self):
        return {**self.__dict__, "balance_loss": None}  # it holds a graph, which cannot be copied
