"""Lesson 13: right answers in other styles pass."""

import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import torch
from right_answers import Answers, passes

from minids import accounting

right = Answers()


@right("13.1")
def folded(x, attention, feed_forward, norm_1, norm_2):
    pairs = (norm_1, attention), (norm_2, feed_forward)
    return functools.reduce(lambda h, pair: h + pair[1](pair[0](h)), pairs, x)


@right("13.1")
def in_place_of_a_copy(x, attention, feed_forward, norm_1, norm_2):
    out = x.clone(memory_format=torch.contiguous_format)
    out += attention(norm_1(x))
    return torch.add(feed_forward(norm_2(out)), out)


@right("13.1")
def of_modules(x, attention, feed_forward, norm_1, norm_2):
    class Residual(torch.nn.Module):
        def __init__(self, norm, part):
            super().__init__()
            self.norm, self.part = norm, part

        def forward(self, y):
            return y + self.part(self.norm(y))

    both = torch.nn.Sequential(Residual(norm_1, attention), Residual(norm_2, feed_forward))
    return both(x.double()).to(x.dtype)


@right("13.2")
def emptied_before(run, batches, bias_rate, clip):
    losses = torch.empty(len(batches))
    for step, batch in enumerate(batches):
        run.model.zero_grad()
        loss, losses[step] = run.model.loss(*batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(run.model.parameters()), max_norm=clip)
        run.model.update_expert_bias(bias_rate)
        for optimizer in run.optimizers:
            optimizer.step()
    return losses


@right("13.2")
def limited_by_hand(run, batches, bias_rate, clip):
    weights, found = list(run.model.parameters()), []
    for inputs, targets in batches:
        loss, nats = run.model.loss(inputs, targets)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        length = math.sqrt(sum(g.double().square().sum().item() for g in gradients if g is not None))
        for weight, g in zip(weights, gradients, strict=True):
            weight.grad = None if g is None else g * min(1, clip / (length + 1e-6))
        [optimizer.step() for optimizer in run.optimizers]
        run.model.update_expert_bias(bias_rate)
        found.append(nats.item())
    return torch.tensor(found)


@right("13.3")
def by_accounting(cfg):
    experts = accounting.moe_parameters(cfg)[1] / 3 / cfg.hidden_size
    layers = range(cfg.num_hidden_layers)
    return np.round(np.mean([experts if cfg.is_moe_layer(i) else cfg.intermediate_size for i in layers]))


@right("13.3")
def in_fractions(cfg):
    experts = (cfg.n_shared_experts + cfg.num_experts_per_tok) * cfg.moe_intermediate_size
    experts += Fraction(cfg.n_routed_experts * (cfg.hidden_size + 1), 3 * cfg.hidden_size)
    first, L = cfg.first_k_dense_replace, cfg.num_hidden_layers
    return int((first * cfg.intermediate_size + (L - first) * experts) / L + Fraction(1, 2))


@right("13.4")
def pair_by_pair(times, bits, target):
    points = list(zip(times.tolist(), bits.tolist(), strict=True))
    if points[0][1] <= target:
        return points[0][0]
    for (t0, b0), (t1, b1) in itertools.pairwise(points):
        if b1 <= target:
            share = (target - b1) / (b0 - b1)
            return share * t0 + (1 - share) * t1
    return math.inf


@right("13.4")
def by_the_lowest_so_far(times, bits, target):
    lowest = np.minimum.accumulate(bits.double().numpy())
    at = int(np.searchsorted(-lowest, -target))
    if at in (0, len(lowest)):
        return np.inf if at else times[0]
    return np.interp(target, [bits[at], bits[at - 1]], [times[at], times[at - 1]])


@right("13.4")
def by_tensors(times, bits, target):
    places = torch.nonzero(bits <= target)
    if places.numel() == 0:
        return torch.tensor(torch.inf)
    after = places[0, 0]
    before = (after - 1).clamp_min(0)
    share = (bits[before] - target) / (bits[before] - bits[after])
    return torch.lerp(times[before], times[after], share.nan_to_num(0.0)) if after else times[after]


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
