"""Lesson 14: right answers in other styles pass."""

import math
from collections import namedtuple

import numpy as np
from right_answers import Answers, passes

from minids import accounting

right = Answers()


@right("14.1")
def layers_counted(cfg):
    D, V, L = cfg.hidden_size, cfg.vocab_size, cfg.num_hidden_layers
    moe = sum(map(cfg.is_moe_layer, range(L)))
    total, active = accounting.moe_parameters(cfg) if moe else (0, 0)
    always = L * (2 * D + accounting.attention_parameters(cfg)) + (L - moe) * 3 * D * cfg.intermediate_size + D
    tables = 1 if cfg.tie_word_embeddings else 2
    return always + moe * total + tables * V * D, always + moe * active + V * D


@right("14.1")
def idle_ones_taken_off(cfg):
    D, V = cfg.hidden_size, cfg.vocab_size
    total, idle = 2.0 * V * D + D, 1.0 * V * D
    for i in range(cfg.num_hidden_layers):
        total += 2 * D + accounting.attention_parameters(cfg)
        if not cfg.is_moe_layer(i):
            total += 3 * D * cfg.intermediate_size
            continue
        experts = accounting.moe_parameters(cfg)
        total, idle = total + experts.total, idle + experts.total - experts.active
    return [total - (V * D if cfg.tie_word_embeddings else 0), total - idle]


@right("14.1")
def by_numpy(cfg):
    D, tables = cfg.hidden_size, np.array([1 if cfg.tie_word_embeddings else 2, 1])
    dense = (3 * D * cfg.intermediate_size,) * 2
    layers = [accounting.moe_parameters(cfg) if cfg.is_moe_layer(i) else dense for i in range(cfg.num_hidden_layers)]
    rest = len(layers) * (2 * D + accounting.attention_parameters(cfg)) + D
    return namedtuple("Size", "total active")(*(np.sum(layers, 0) + rest + tables * cfg.vocab_size * D))


@right("14.2")
def backward_twice_forward(cfg, seq_len):
    mla = cfg.attention == "mla"
    widths = [cfg.qk_nope_head_dim + cfg.qk_rope_head_dim, cfg.v_head_dim] if mla else [cfg.attention_head_dim] * 2
    forward = 2 * accounting.parameters(cfg)[1]
    for _ in range(cfg.num_hidden_layers):
        forward += cfg.num_attention_heads * 2 * sum(widths) * (seq_len / 2)
    return forward + 2 * forward


@right("14.2")
def in_whole_numbers(cfg, seq_len):
    width = cfg.qk_head_dim + cfg.v_head_dim if cfg.attention == "mla" else 2 * cfg.attention_head_dim
    pairs = cfg.num_hidden_layers * cfg.num_attention_heads * seq_len
    return 6 * accounting.parameters(cfg).active + 3 * 2 * pairs * width // 2


@right("14.3")
def by_tokens_per_second(flops_per_token, tokens, peak, mfu, price):
    hours = tokens / (peak * mfu / flops_per_token) / 60 / 60
    return hours, price * hours


@right("14.3")
def by_numpy_numbers(flops_per_token, tokens, peak, mfu, price):
    hours = np.float64(flops_per_token) * tokens / (3600 * peak * mfu)
    return [hours, hours * price]


@right("14.4")
def all_but_those_missed(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    E, A = cfg.n_routed_experts, cfg.num_experts_per_tok
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    numbers = accounting.parameters(cfg).active
    for i in range(cfg.num_hidden_layers):
        if cfg.is_moe_layer(i):
            numbers += (E - A) * expert - E * (1 - A / E) ** batch * expert
    return numbers * weight_bytes, cache_bytes * accounting.kv_elements_per_token(cfg) * context * batch


@right("14.4")
def by_logarithms(cfg, batch, context, weight_bytes, cache_bytes):
    share = -math.expm1(batch * math.log1p(-cfg.num_experts_per_tok / cfg.n_routed_experts))
    more = share * cfg.n_routed_experts - cfg.num_experts_per_tok
    layers = len([i for i in range(cfg.num_hidden_layers) if cfg.is_moe_layer(i)])
    weights = accounting.parameters(cfg)[1] + layers * more * 3 * cfg.hidden_size * cfg.moe_intermediate_size
    return [weight_bytes * weights, cache_bytes * batch * context * accounting.kv_elements_per_token(cfg)]


@right("14.5")
def by_hours(tokens_per_second, price_per_hour, gpus):
    return 1_000_000 / tokens_per_second / 60 / 60 * gpus * price_per_hour


@right("14.5")
def by_seconds(tokens_per_second, price_per_hour, gpus=1):
    dollars_per_second = np.float64(price_per_hour) * gpus / 3600
    return dollars_per_second / tokens_per_second * 1e6


@right.each
def test_a_right_answer_passes(name, answer):
    passes(name, answer)
