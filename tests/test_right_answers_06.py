"""Right answers to lesson 06 in other styles, its kernel's too."""

import math
from collections import namedtuple

import numpy as np
import pytest
import torch
from right_answers import Answers, passes

from minids import triton_env
from minids.lab import exercises
from minids.lab.exercises import l06
from minids.lab.slip import slip

right = Answers()
Part = namedtuple("Part", "out lse")


@right("06.1")
def row_by_row(q, latents, scale, rank):
    top = torch.full(q.shape[:2], -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros(*q.shape[:2], rank)
    for row in latents.unbind(1):
        scores = (q * row[:, None]).sum(-1) * scale
        new = torch.maximum(top, scores)
        weight, shrink = torch.exp(scores - new), torch.exp(top - new)
        total, top = total * shrink + weight, new
        out = out * shrink[..., None] + weight[..., None] * row[:, None, :rank]
    return out / total[..., None], top + total.log()


@right("06.1")
def attention_of_torch(q, latents, scale, rank):
    out = torch.nn.functional.scaled_dot_product_attention(q, latents, latents[..., :rank], scale=scale)
    return [out, torch.logsumexp(torch.einsum("bhw,bnw->bhn", q, latents) * scale, -1)]


@right("06.1")
def positions_first(q, latents, scale, rank):
    logs = (latents @ (q * scale).mT).log_softmax(1)
    return Part((latents[..., :rank].mT @ logs.exp()).mT, ((latents @ q.mT) * scale - logs)[:, 0])


@right("06.2")
def part_after_part(outs, lses):
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    for part, log in zip(outs, lses, strict=True):
        new = torch.logaddexp(lse, log)
        old, fresh = (torch.where(one.isneginf(), 0.0, (one - new).exp())[..., None] for one in (lse, log))
        out, lse = old * out + torch.where(fresh > 0, fresh * part, 0.0), new
    return out, lse


@right("06.2")
def numbers_alone_count(outs, lses):
    top = lses.amax(0)
    weights = torch.exp(lses - top)
    total = weights.sum(0)
    return (weights[..., None] * outs.nan_to_num(0.0, 0.0, 0.0)).sum(0) / total[..., None], top + total.log()


@right("06.2")
def a_copy_with_zeros(outs, lses):
    outs = outs.clone()
    outs[lses == -torch.inf] = 0
    return torch.einsum("nbh,nbhc->bhc", torch.softmax(lses, 0), outs), lses.logsumexp(0)


@right("06.2")
def sequence_by_sequence(outs, lses):
    out, lse = torch.empty(outs.shape[1:]), torch.empty(lses.shape[1:])
    for b, h in np.ndindex(*lse.shape):
        logs = lses[:, b, h].tolist()
        weights = [math.exp(log - max(logs)) for log in logs]
        lse[b, h] = max(logs) + math.log(sum(weights))
        out[b, h] = sum(w / sum(weights) * o for w, o in zip(weights, outs[:, b, h].double(), strict=True) if w)
    return out, lse


@right("06.3")
def whole_numbers(batch, heads, length, sms):
    programs, blocks, best = batch * -(-heads // 64), -(-length // 64), None
    for n in range(1, 129):
        cost = -(-programs * n // sms) * (14 * -(-blocks // n) + (14 + min(heads, 64)) * (n > 1))
        if n == 1 or (n <= blocks // 2 and cost < best[0]):
            best = cost, n
    return best[1]


@right("06.3")
def smallest_of_pairs(batch, heads, length, sms):
    blocks, programs = math.ceil(length / 64), batch * math.ceil(heads / 64)
    cost = {
        n: math.ceil(programs * n / sms) * math.ceil(blocks / n) for n in range(1, 129) if n == 1 or 2 * n <= blocks
    }
    extra = {n: math.ceil(programs * n / sms) * (14 + min(heads, 64)) / 14 * (n > 1) for n in cost}
    return sorted((cost[n] + extra[n], n) for n in cost)[0][1]


@right("06.3")
def tensors(batch, heads, length, sms):
    blocks, programs = (length + 63) // 64, batch * ((heads + 63) // 64)
    n = torch.arange(1, max(1, min(128, blocks // 2)) + 1)
    cost = torch.ceil(programs * n / sms) * (torch.ceil(blocks / n) + (n > 1) * (1 + min(heads, 64) / 14))
    return n[cost.argmin()]


@right("06.3")
def arrays(batch, heads, length, sms):
    blocks, programs = math.ceil(length / 64), batch * math.ceil(heads / 64)
    n = np.arange(1.0, max(1, min(128, blocks // 2)) + 1)
    return n[np.argmin(np.ceil(programs * n / sms) * (np.ceil(blocks / n) + (n > 1) * (1 + min(heads, 64) / 14)))]


@right.each
def test_it_passes(name, answer):
    passes(name, answer)


ADDED = "acc * shrink[:, None] + tl.dot(p.to(c_kv.dtype), c_kv)"
SCORES = "tl.dot(q_c, tl.trans(c_kv)) + tl.dot(q_r, tl.trans(k_rope))"
LOOP = "for start in range(0, n, BLOCK_N):"
KERNELS = {  # changes in the reference that leave it right
    "while_and_exp2": [
        (LOOP, "start = 0\nwhile start < n:"),
        ("scores * scale", "scores * (scale * 1.4426950408889634)"),
        ("tl.exp(", "tl.exp2("),
        ("m + tl.log(total)", "(m + tl.log2(total)) / 1.4426950408889634"),
        ("m = top", "m = top\nstart += BLOCK_N"),
    ],
    "blocks_by_number_in_float32": [
        (LOOP, "for i in tl.range(0, tl.cdiv(n, BLOCK_N), num_stages=2):\n    start = i * BLOCK_N"),
        ("tl.dot(p.to(c_kv.dtype), c_kv)", 'tl.dot(p, c_kv.to(tl.float32), input_precision="ieee")'),
    ],
    "a_large_number_for_infinity": [
        ('float("-inf")', "-1e30"),
        ("tl.exp(scores - top[:, None]),", "tl.where(there[None, :], tl.exp(scores - top[:, None]), 0.0),"),
    ],
    "sums_in_the_dot": [
        (ADDED, "tl.dot(p.to(c_kv.dtype), c_kv, acc * shrink[:, None])"),
        (SCORES, "tl.dot(q_r, k_rope.T, acc=tl.dot(q_c, c_kv.T))"),
    ],
    "rope_keys_loaded_as_columns": [
        (
            "tl.load(at + C + r, mask=there[:, None], other=0.0)",
            "tl.load(latents + b * stride_b + C + tl.trans(r) + (start + j)[None, :] * stride_n, "
            "mask=there[None, :], other=0.0)",
        ),
        ("tl.trans(k_rope)", "k_rope"),
    ],
}


@pytest.mark.skipif(triton_env.mode() != "interpreter", reason="kernels are counted in Triton's interpreter alone")
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_passes(name):
    kernel = slip(l06.decode_block_kernel, name, *KERNELS[name])
    assert exercises.find("06.4").kernel is not kernel
    passes("06.4", kernel)
