"""Lesson 02: right answers in other styles pass."""

import math
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from right_answers import Answers, passes

from minids import layers
from minids.lab import exercises

right = Answers()
my_decode_attention = exercises.reference("02.1")


@right("02.1")
def built_in(q, k, v, length, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k[:, :length], v[:, :length]))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


@right("02.1")
def emptied_and_masked(q, k, v, length, scale):
    filled = torch.arange(k.shape[1]) < length
    k, v = (torch.where(filled[:, None, None], t, 0) for t in (k, v))
    scores = (torch.einsum("bthd,bshd->bhts", q, k) * scale).masked_fill(~filled, -math.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


@right("02.1")
def key_by_key(q, k, v, length, scale):
    scores = [(q[:, 0] * k[:, s]).sum(-1, keepdim=True).double() * scale for s in range(length)]
    weights = torch.stack(scores).softmax(0)
    return sum(weights[s] * v[:, s] for s in range(length))[:, None].to(q.dtype)


@right("02.1")
def by_products(q, k, v, length, scale):
    k, v = k.narrow(1, 0, length).permute(0, 2, 3, 1), v.narrow(1, 0, length).permute(0, 2, 1, 3)
    return ((q.transpose(1, 2) @ k * scale).softmax(-1) @ v).transpose(1, 2)


@right("02.1")
def by_numpy(q, k, v, length, scale):
    q, k, v = q.numpy()[:, 0], k.numpy()[:, :length], v.numpy()[:, :length]
    weights = np.exp(np.einsum("bhd,bshd->bhs", q, k) * scale)
    return torch.from_numpy(np.einsum("bhs,bshd->bhd", weights / weights.sum(-1, keepdims=True), v))[:, None]


@right("02.2")
def pieces_laid_together(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    q, k = (layers.apply_rope(t, cos[length][None], sin[length][None]) for t in (q, k))
    k_cache = torch.cat([k_cache[:, :length], k, k_cache[:, length + 1 :]], 1)
    v_cache = torch.cat([v_cache[:, :length], v, v_cache[:, length + 1 :]], 1)
    return my_decode_attention(q, k_cache, v_cache, length + 1, scale), k_cache, v_cache


@right("02.2")
def chosen_by_place(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    here = (torch.arange(k_cache.shape[1]) == length)[:, None, None]
    q, k = (layers.apply_rope(t, cos[length], sin[length]) for t in (q, k))
    k_cache, v_cache = torch.where(here, k, k_cache), torch.where(here, v, v_cache)
    return [my_decode_attention(q, k_cache, v_cache, length + 1, scale), k_cache, v_cache]


@right("02.2")
def turned_by_hand(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    def turn(x):
        even, odd = x.double()[..., ::2], x.double()[..., 1::2]
        turned = even * cos[length] - odd * sin[length], even * sin[length] + odd * cos[length]
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)

    keys, values = deepcopy(k_cache), deepcopy(v_cache)
    keys[:, length : length + 1].copy_(turn(k))
    values[:, length : length + 1].copy_(v)
    weights = ((turn(q) * keys[:, : length + 1]).sum(-1, keepdim=True) * scale).softmax(1)
    return (weights * values[:, : length + 1]).sum(1, keepdim=True), keys, values


@right("02.2")
def by_index_copy(q, k, v, k_cache, v_cache, length, cos, sin, scale):
    at = torch.tensor([length])
    q, k = layers.apply_rope(torch.cat((q, k)), cos[at], sin[at]).chunk(2)
    k_cache, v_cache = k_cache.index_copy(1, at, k), v_cache.index_copy(1, at, v)
    return built_in(q, k_cache, v_cache, length + 1, scale), k_cache, v_cache


@right("02.3")
def by_copies(q, k, v, scale):
    n = q.shape[2] // k.shape[2]
    return built_in(q, k.repeat_interleave(n, 2), v.repeat_interleave(n, 2), k.shape[1], scale)


@right("02.3")
def built_in_groups(q, k, v, scale):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).transpose(1, 2)


@right("02.3")
def head_by_head(q, k, v, scale):
    heads = []
    for h in range(q.shape[2]):
        g = h * k.shape[2] // q.shape[2]
        weights = (torch.einsum("bd,bsd->bs", q[:, 0, h], k[:, :, g]) * scale).softmax(-1)
        heads.append(torch.einsum("bs,bsd->bd", weights, v[:, :, g]))
    return torch.stack(heads, 1)[:, None]


@right("02.3")
def expanded(q, k, v, scale):
    B, S, G, d = k.shape
    n = q.shape[2] // G
    k, v = (t[:, :, :, None].expand(B, S, G, n, d).flatten(2, 3) for t in (k, v))
    return torch.einsum("bhs,bshd->bhd", (torch.einsum("bthd,bshd->bhs", q, k) * scale).softmax(-1), v)[:, None]


@right("02.3")
def by_einops(q, k, v, scale):
    queries = rearrange(q.double(), "b 1 (g n) d -> b g n d", g=k.shape[2])
    weights = (queries @ rearrange(k.double(), "b s g d -> b g d s") * scale).softmax(-1)
    return rearrange(weights @ rearrange(v.double(), "b s g d -> b g s d"), "b g n d -> b 1 (g n) d").to(q.dtype)


@right("02.4")
def by_bits(cfg, dtype):
    numbers = 2 * cfg.num_hidden_layers * cfg.kv_heads * cfg.attention_head_dim
    return numbers * torch.finfo(dtype).bits / 8


@right("02.4")
def by_a_tensor_without_memory(cfg, dtype):
    shape = 2, cfg.num_hidden_layers, cfg.kv_heads, cfg.attention_head_dim
    return torch.empty(shape, dtype=dtype, device="meta").nbytes


@right("02.5")
def by_int(memory, weights, bytes_per_token, context):
    return max(int((memory - weights) / (bytes_per_token * context)), 0)


@right("02.5")
def divided_twice(memory, weights, bytes_per_token, context):
    return 0 if weights > memory else math.floor((memory - weights) // bytes_per_token / context)


@right("02.5")
def by_torch(memory, weights, bytes_per_token, context):
    return torch.tensor((memory - weights) // (bytes_per_token * context)).clamp(min=0)


@right("02.5")
def one_by_one(memory, weights, bytes_per_token, context):
    users = 0
    while weights + (users + 1) * bytes_per_token * context <= memory:
        users += 1
    return users


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
