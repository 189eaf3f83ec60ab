"""Lesson 08: right answers in other styles pass."""

import collections
import math

import numpy as np
import torch
import torch.nn.functional as F
from right_answers import Answers, passes

from minids.moe.reference import load_fractions

right = Answers()


@right("08.1")
def counted_in_python(indices, n_experts):
    counts = [collections.Counter(row) for row in indices.flatten(1).tolist()]
    return torch.tensor([[n_experts * c[e] / c.total() for e in range(n_experts)] for c in counts])


@right("08.1")
def by_one_hot(indices, n_experts):
    return n_experts * F.one_hot(indices, n_experts).float().mean((1, 2))


@right("08.1")
def by_shifted_numbers(indices, n_experts):
    shifted = indices + n_experts * torch.arange(len(indices))[:, None, None]
    counts = torch.bincount(shifted.ravel(), minlength=len(indices) * n_experts).view(-1, n_experts)
    return counts / counts.double().mean(-1, keepdim=True).float()


@right("08.1")
def turned(indices, n_experts):
    rows = [(indices == e).sum((-2, -1)) for e in range(n_experts)]
    return torch.stack(rows).T * (n_experts / math.prod(indices.shape[1:]))


@right("08.2")
def one_less_than_the_ratio(load):
    return load.amax() / load.mean() - 1


@right("08.2")
def by_shares(load):
    return F.normalize(load.double(), p=1, dim=0).topk(1).values[0].float() * load.numel() - 1


@right("08.2")
def by_a_list(load):
    numbers = load.tolist()
    mean = sum(numbers) / len(numbers)
    return torch.tensor((max(numbers) - mean) / mean)


@right("08.3")
def sequence_by_sequence(scores, indices, alpha):
    total = 0
    for s, chosen in zip(scores, indices, strict=True):
        for expert in range(s.shape[-1]):
            f = s.shape[-1] * (chosen == expert).sum() / chosen.numel()
            total = total + f * (s[:, expert] / s.sum(-1)).mean()
    return alpha * total / len(scores)


@right("08.3")
def gathered(scores, indices, alpha):
    P = F.normalize(scores, p=1, dim=-1).mean(1)
    return alpha * scores.shape[-1] * P.gather(1, indices.flatten(1)).mean()


@right("08.3")
def by_a_softmax_of_logarithms(scores, indices, alpha):
    f = load_fractions(indices, scores.shape[-1]).double()
    return (alpha * torch.linalg.vecdot(f, scores.double().log().softmax(-1).mean(1)).mean()).float()


@right("08.4")
def by_comparing(bias, load, rate):
    mean = sum(load.tolist()) / len(load)
    steps = [rate * ((x < mean) - (x > mean)) for x in load.tolist()]
    return bias + torch.tensor(steps)


@right("08.4")
def by_multiples_of_the_mean(bias, load, rate):
    return torch.add(bias, (load / load.mean() - 1).sign(), alpha=-rate)


@right("08.4")
def by_numpy(bias, load, rate):
    return bias + torch.from_numpy(rate * np.sign(load.numpy().mean() - load.numpy()))


@right("08.4")
def by_nested_where(bias, load, rate):
    return torch.where(load < load.mean(), bias + rate, torch.where(load > load.mean(), bias - rate, bias))


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
