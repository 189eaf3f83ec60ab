"""Lesson 07: right answers in other styles pass."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from right_answers import Answers, passes

import minids
from minids.layers import swiglu
from minids.moe import reference

right = Answers()


@right("07.1")
def counted_one_by_one(cfg):
    total = active = cfg.n_routed_experts * cfg.hidden_size + cfg.n_routed_experts
    for expert in range(cfg.n_shared_experts + cfg.n_routed_experts):
        numbers = 3 * math.prod((cfg.hidden_size, cfg.moe_intermediate_size))
        total += numbers
        active += numbers * (expert < cfg.n_shared_experts + cfg.num_experts_per_tok)
    return [total, active]


@right("07.1")
def of_a_module_without_memory(cfg):
    with torch.device("meta"):
        moe = minids.moe.MoE(cfg)
    idle = sum(p.numel() for p in moe.experts.parameters()) // cfg.n_routed_experts
    total = sum(p.numel() for p in moe.parameters()) + cfg.n_routed_experts  # the bias is a buffer
    return total, total - idle * (cfg.n_routed_experts - cfg.num_experts_per_tok)


@right("07.1")
def by_numpy(cfg):
    experts = np.array([cfg.n_routed_experts, cfg.num_experts_per_tok]) + cfg.n_shared_experts
    count = 3.0 * experts * cfg.hidden_size * cfg.moe_intermediate_size + cfg.n_routed_experts * (cfg.hidden_size + 1)
    return tuple(count)


@right("07.2")
def group_by_group(biased, n_group, topk_group):
    out = torch.full_like(biased, -math.inf)
    for row, scores in zip(out, biased, strict=True):
        groups = list(enumerate(scores.split(len(scores) // n_group)))
        for g, group in sorted(groups, key=lambda pair: -sum(sorted(pair[1].tolist())[-2:]))[:topk_group]:
            row[g * len(group) : (g + 1) * len(group)] = group
    return out


@right("07.2")
def by_ranks(biased, n_group, topk_group):
    groups = biased.double().reshape(len(biased), n_group, -1)
    ranks = groups.sort(-1, descending=True).values[..., :2].mean(-1).argsort(-1, descending=True).argsort(-1)
    stay = (ranks < topk_group).repeat_interleave(groups.shape[-1], 1)
    return torch.where(stay, biased, -torch.inf)


@right("07.2")
def by_a_logarithm(biased, n_group, topk_group):
    groups = torch.stack(biased.chunk(n_group, -1), 1)
    best = groups.topk(2).values.sum(2).topk(topk_group, sorted=False).indices
    stay = F.one_hot(best, n_group).sum(1)
    return (groups + stay.log().unsqueeze(-1)).permute(2, 1, 0).contiguous().permute(2, 1, 0).flatten(1)


@right("07.3")
def token_by_token(logits, bias, top_k, n_group, topk_group, factor):
    scores = 1 / (1 + torch.exp(-logits))
    limited = reference.group_limit(scores + bias, n_group, topk_group).tolist()
    best = [sorted(range(len(row)), key=row.__getitem__, reverse=True)[:top_k] for row in limited]
    gates = [torch.stack([row[e] for e in chosen]) for row, chosen in zip(scores, best, strict=True)]
    return [torch.tensor(best), torch.stack([factor * g / g.sum() for g in gates])]


@right("07.3")
def by_logarithms(logits, bias, top_k, n_group, topk_group, factor):
    with torch.no_grad():
        limited = reference.group_limit(logits.double().sigmoid() + bias, n_group, topk_group)
        indices = limited.argsort(-1, descending=True)[:, :top_k].int()
    return indices, factor * F.logsigmoid(logits).take_along_dim(indices.long(), 1).softmax(-1)


@right("07.3")
def values_without_the_bias(logits, bias, top_k, n_group, topk_group, factor):
    values, indices = reference.group_limit(logits.sigmoid() + bias, n_group, topk_group).topk(top_k)
    return indices, factor * F.normalize(values - bias[indices], p=1, dim=-1)


@right("07.4")
def weights_of_each_token(x, indices, gates, gate_up_proj, down_proj, shared):
    gate, up = torch.einsum("md,mafd->maf", x, gate_up_proj[indices]).tensor_split(2, -1)
    w_gate, w_up, w_down = shared
    routed = torch.einsum("maf,madf,ma->md", F.silu(gate) * up, down_proj[indices], gates)
    return routed + (F.silu(x @ w_gate.T) * (x @ w_up.mT)) @ w_down.t()


@right("07.4")
def all_experts_for_all(x, indices, gates, gate_up_proj, down_proj, shared):
    weights = torch.zeros(len(x), len(down_proj), dtype=gates.dtype).scatter(1, indices, gates)
    gate, up = (x.double() @ gate_up_proj.double().transpose(1, 2)).chunk(2, -1)
    y = (gate * gate.sigmoid() * up) @ down_proj.double().transpose(1, 2)
    return (y * weights.T[..., None]).sum(0).float() + swiglu(x, *shared)


@right("07.4")
def rows_sorted_by_expert(x, indices, gates, gate_up_proj, down_proj, shared):
    order = indices.flatten().argsort()
    counts = torch.bincount(indices.flatten(), minlength=len(down_proj)).tolist()
    results = []
    for rows, w, down in zip(x[order // indices.shape[1]].split(counts), gate_up_proj, down_proj, strict=True):
        gate, up = F.linear(rows, w).chunk(2, -1)
        results.append(F.linear(F.silu(gate) * up, down))
    y = torch.empty(len(order), x.shape[1]).index_copy(0, order, torch.cat(results))
    out = swiglu(x, *shared)
    out += (y.unflatten(0, gates.shape) * gates.unsqueeze(-1)).sum(1)
    return out


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
