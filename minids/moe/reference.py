"""DeepSeekMoE in equations: the two routers, the experts as a plain loop, balance, and the plan of the dispatch.

A token t with hidden state u_t goes to A of E routed experts, besides the shared ones (V3 eq. 12):

    h_t = u_t + sum over shared FFN_s(u_t) + sum over the A chosen experts i of g_it * FFN_i(u_t)

The router gives the A choices and the gates g. Balance is kept without a loss: an expert with too much load gets a
lower bias, with too little a higher one, and the bias counts for the choice only, never for the gate (V3 eq. 16).
These functions are the specification; `layer.py` is held against them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.layers import swiglu


class Plan(NamedTuple):
    """Where each of the N = M*A dispatched rows goes, when the rows are sorted by expert.

    order [N]: the flat position (token * A + choice) of each sorted row; token [N]: its token; place [M,A]: the sorted
    row of each choice, the inverse of order; ends [E] int32: the row after the last of each expert.
    """

    order: Tensor
    token: Tensor
    place: Tensor
    ends: Tensor


def route_v3(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by sigmoid scores; logits [M,E], bias [E] give indices [M,A], gates [M,A] and scores [M,E] (V3 eq. 13-16).

    Only the best `topk_group` groups can be chosen from; a group's score is the sum of its two best biased scores. A
    token's choices are in no order.
    """
    scores = logits.sigmoid()
    biased = scores.detach() + bias  # for the choice alone: no gradient, and no part in the gates
    if n_group > 1:
        biased = group_limit(biased, n_group, topk_group)
    indices = biased.topk(top_k, dim=-1, sorted=False).indices
    gates = scores.gather(-1, indices)
    if normalize:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return indices, gates * factor, scores


def route_v2(
    logits: Tensor, top_k: int, n_group: int = 1, topk_group: int = 1, factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Route by softmax scores; logits [M,E] give indices [M,A], gates [M,A] and scores [M,E] (V2 eq. 20-22).

    The gates are not normalised again. With n_group > 1 a group's score is its best expert's ("group_limited_greedy",
    V2 section 2.2.2).
    """
    scores = allowed = logits.softmax(-1)
    if n_group > 1:
        groups = scores.unflatten(-1, (n_group, -1))
        allowed = _keep_groups(groups, groups.amax(-1), topk_group, 0.0)
    gates, indices = allowed.topk(top_k, dim=-1, sorted=False)
    return indices, gates * factor, scores


def group_limit(biased: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Biased scores [M,E] with -inf outside the best `topk_group` of `n_group` groups of neighbours (V3 section 2.1.2).

    A group's score is the sum of its two best biased scores; so a token goes to few machines, each with one group.
    """
    groups = biased.unflatten(-1, (n_group, -1))
    group_scores = groups.topk(2, dim=-1).values.sum(-1)
    # -inf, not 0: where all biased scores are negative, 0 would win
    return _keep_groups(groups, group_scores, topk_group, float("-inf"))


def _keep_groups(groups: Tensor, group_scores: Tensor, topk_group: int, fill: float) -> Tensor:
    """[M,n_group,E/n_group] to [M,E], with `fill` outside the best `topk_group` groups."""
    best = group_scores.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, best, False)
    return groups.masked_fill(dropped.unsqueeze(-1), fill).flatten(-2)


def experts_loop(x: Tensor, indices: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor) -> Tensor:
    """Sum each token's A gated experts, one expert after the other; x [M,D], indices and gates [M,A] to [M,D].

    gate_up_proj is [E,2F,D], the gate half first; down_proj [E,D,F]. FFN_i(x) = W_down (silu(W_gate x) * W_up x).
    """
    out = torch.zeros_like(x)
    for expert, (gate_up, down) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        token, choice = (indices == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down) * gates[token, choice, None].to(x.dtype)
        out = out.index_add(0, token, y)
    return out


def moe_forward(
    x: Tensor, indices: Tensor, gates: Tensor, gate_up_proj: Tensor, down_proj: Tensor, shared: tuple
) -> Tensor:
    """Shared experts, unscaled, plus the gated routed ones; arguments as experts_loop, [M,D] (V3 eq. 12 without u_t).

    `shared` are the three projections (w_gate [W,D], w_up [W,D], w_down [D,W]) of one SwiGLU as wide as all of them.
    """
    return swiglu(x, *shared, impl="torch") + experts_loop(x, indices, gates, gate_up_proj, down_proj)


def dispatch_plan(indices: Tensor, n_experts: int) -> Plan:
    """Sort the choices [M,A] by expert, within an expert by token; nothing here waits for a GPU."""
    by_expert, order = indices.flatten().sort(stable=True)
    experts = torch.arange(n_experts, device=indices.device)
    ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return Plan(order, order // indices.shape[-1], place.view_as(indices), ends)


def grouped_gemm(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows by its own matrix; x [N,K], weights [E,J,K], ends [E] to [N,J].

    Rows ends[e-1] to ends[e] - 1 of x are expert e's (none where both are equal): y = x W_e^T.
    """
    y = x.new_empty(x.shape[0], weights.shape[1])
    for rows, weight in zip(_rows_of_experts(ends), weights, strict=True):
        y[rows] = x[rows] @ weight.T
    return y


def grouped_gemm_dw(x: Tensor, dy: Tensor, ends: Tensor) -> Tensor:
    """Gradient of grouped_gemm's weights: dW_e = dY_e^T X_e over expert e's rows; x [N,K], dy [N,J] to [E,J,K].

    An expert without rows gets zeros.
    """
    return torch.stack([dy[rows].T @ x[rows] for rows in _rows_of_experts(ends)])


def _rows_of_experts(ends: Tensor) -> list[slice]:
    last = ends.tolist()
    return [slice(begin, end) for begin, end in zip([0, *last], last, strict=False)]


def load_fractions(indices: Tensor, n_experts: int) -> Tensor:
    """Load of each expert as a multiple of the mean; indices [...,T,A] to f [...,E] (V3 eq. 18).

    f_i = E / (A T) * (how many of the T tokens chose expert i); 1 for all of them in perfect balance.
    """
    chosen = indices.flatten(-2)
    counts = torch.zeros(*chosen.shape[:-1], n_experts, device=indices.device)
    counts.scatter_add_(-1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
    return counts * (n_experts / max(chosen.shape[-1], 1))


def balance_loss(scores: Tensor, indices: Tensor, alpha: float) -> Tensor:
    """Sequence-wise balance loss; scores [B,T,E] and indices [B,T,A] to a 0-dim tensor (V3 eq. 17-20).

    L = alpha * sum_i f_i P_i, with P_i the sequence's mean of s'_it = s_it / sum_j s_jt, averaged over the B sequences.
    f has no gradient: the loss pulls down the scores of what is chosen most. V3 counts the A best scores without the
    bias (eq. 18); V2 has no bias, and its softmax is its own s' (V2 eq. 23-25, over each sequence).
    """
    shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    f = load_fractions(indices, scores.shape[-1])
    return alpha * (f * shares.mean(-2)).sum(-1).mean()


def update_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias [E] after a step with `load` [E]: up by `rate` below the mean load, down above it (V3 eq. 16)."""
    return bias + rate * torch.sign(load.mean() - load)


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load, of load [E]; 0 in perfect balance, or without load (2408.15664)."""
    mean = load.mean()
    return (load.max() - mean) / mean.clamp_min(torch.finfo(load.dtype).tiny)
