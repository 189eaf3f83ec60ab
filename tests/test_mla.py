"""MLA: expanded, absorbed and the reference are one function."""

import pytest
import torch

from minids import ModelConfig
from minids.layers import rope_tables
from minids.mla import MLA, LatentCache, reference
from minids.mla.layer import absorbing_pays
from minids.numerics import relative_error, seed_everything

SIZES = {"hidden_size": 48, "num_attention_heads": 3, "kv_lora_rank": 20, "qk_nope_head_dim": 12}
SIZES |= {"qk_rope_head_dim": 8, "v_head_dim": 10}


def layer(**changes):
    seed_everything(1)
    attn = MLA(ModelConfig(**{**SIZES, **changes}))
    for p in attn.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return attn


@pytest.mark.parametrize(("B", "T", "S"), [(1, 1, 1), (1, 1, 33), (3, 17, 17), (2, 5, 19)])
def test_both_references_agree(B, T, S):
    seed_everything(2)
    shapes = [(B, T, 3, 12), (B, T, 3, 8), (B, S, 20), (B, S, 8), (3, 22, 20)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    a, b = reference.attend_expanded(*inputs, 0.2), reference.attend_absorbed(*inputs, 0.2)
    assert a.shape == (B, T, 3, 10) and relative_error(a, b) < 1e-12
    weight = torch.randn_like(a)
    for x, y in zip(torch.autograd.grad(a, inputs, weight), torch.autograd.grad(b, inputs, weight), strict=True):
        assert (x - y).abs().max() < 1e-11


@pytest.mark.parametrize("q_lora_rank", [None, 16])
@pytest.mark.parametrize("past", [0, 1, 30])
@pytest.mark.parametrize("T", [1, 3, 17])
def test_the_layer_in_both_forms_is_the_reference(q_lora_rank, past, T):
    attn = layer(q_lora_rank=q_lora_rank)
    x = torch.randn(2, past + T, 48)
    cos, sin = rope_tables(attn.cfg, torch.arange(past + T))
    q_nope, q_rope = attn.queries(x, cos, sin)
    c_kv, k_rope = attn.latents(x, cos, sin).split([20, 8], -1)
    kv_b = attn.kv_b_proj.weight.view(3, 22, 20)
    want = attn.o_proj(reference.attend_expanded(q_nope, q_rope, c_kv, k_rope, kv_b, attn.scale).flatten(-2))
    for form in ("expanded", "absorbed", "auto"):
        cache = LatentCache(2, past + T, 20, 8)
        if past:
            attn(x[:, :past], cos[:past], sin[:past], cache, form=form)
        got = attn(x[:, past:], cos[past:], sin[past:], cache, form=form)
        assert cache.length == past + T and relative_error(got, want[:, past:]) < 1e-5


def test_gradients_of_both_forms_agree():
    attn, x = layer(), torch.randn(2, 11, 48)
    tables = rope_tables(attn.cfg, torch.arange(11))
    grads = [torch.autograd.grad(attn(x, *tables, form=f).square().sum(), list(attn.parameters())) for f in FORMS]
    assert max(relative_error(a, b) for a, b in zip(*grads, strict=True)) < 1e-4


FORMS = ("expanded", "absorbed")


@pytest.mark.parametrize("form", FORMS)
def test_bf16_and_autocast(form):
    attn, x = layer(), torch.randn(2, 9, 48)
    tables = rope_tables(attn.cfg, torch.arange(9))
    want = attn(x, *tables)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(attn(x, *tables, form=form).float(), want) < 5e-2
    assert relative_error(attn.bfloat16()(x.bfloat16(), *tables, form=form).float(), want) < 5e-2


def test_what_is_not_there_is_said():
    attn, x = layer(), torch.randn(1, 2, 48)
    tables = rope_tables(attn.cfg, torch.arange(2))
    with pytest.raises(ValueError, match="form is 'folded'"):
        attn(x, *tables, form="folded")
    with pytest.raises(ValueError, match="impl is 'cuda'; it must be one of auto, torch, triton"):
        attn(x, *tables, impl="cuda")
    with pytest.raises(ValueError, match="form 'expanded' has no Triton kernel"):
        attn(x, *tables, form="expanded", impl="triton")
    with pytest.raises(ValueError, match="holds 0 of 1 positions; 2 more"):
        attn(x, *tables, LatentCache(1, 1, 20, 8))


@pytest.mark.parametrize("preset", ["tiny", "small", "deepseek-v2-lite", "deepseek-v3"])
@pytest.mark.parametrize("S", [2, 7, 64, 1000, 100_000])
def test_the_crossover_is_where_both_forms_cost_the_same(preset, S):
    cfg = ModelConfig.preset(preset)
    sizes = cfg.kv_lora_rank, cfg.qk_nope_head_dim, cfg.v_head_dim
    at = reference.crossover(*sizes, S)
    assert 0 < at < S
    C, P, V = sizes
    for T in {1, int(at), int(at) + 1, S} - {0}:
        costs = [reference.decode_flops(f, cfg.num_attention_heads, C, 64, P, V, T, S) for f in FORMS]
        assert (costs[1] < costs[0]) == (at > T) == absorbing_pays(cfg, T, S)
    with pytest.raises(ValueError, match="form is 'folded'"):
        reference.decode_flops("folded", 1, C, 64, P, V, 1, S)


def test_parts_of_a_cache_merge_to_the_whole():
    q, latents = torch.randn(2, 3, 40).double(), torch.randn(2, 50, 40).double()
    whole, lse = reference.decode_block(q, latents, 9.0, 32)
    parts = [reference.decode_block(q, part, 9.0, 32) for part in latents.split(7, 1)]
    outs, lses = map(torch.stack, zip(*parts, strict=True))
    outs, lses = torch.cat((outs, torch.full_like(outs[:1], torch.nan))), torch.cat((lses, lses[:1] - torch.inf))
    merged = reference.merge_splits(outs, lses)
    assert relative_error(merged[0], whole) < 1e-12 and relative_error(merged[1], lse) < 1e-12
    nothing = reference.merge_splits(outs[-1:], lses[-1:])
    assert not nothing[0].any() and (nothing[1] == -torch.inf).all()
