"""The flat step is the ordinary path: logits, tokens and cache; and where it may not go, it does not."""

import copy

import pytest
import torch
from torch import nn

from minids import ModelConfig, Transformer, decode
from minids.decode import fold, folds_small
from minids.model import Block
from minids.numerics import relative_error, seed_everything

SIZES = {"vocab_size": 64, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "kv_lora_rank": 14}
SIZES |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "intermediate_size": 50}
SIZES |= {"moe_intermediate_size": 18, "n_routed_experts": 12, "num_experts_per_tok": 3, "rms_norm_eps": 1e-3}
V2 = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 0.7, "mscale_all_dim": 1.0}


def build(**changes):
    seed_everything(3)
    model = Transformer(ModelConfig(**{**SIZES, "initializer_range": 0.2, **changes})).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("correction_bias"):
                tensor.uniform_(-3, 0.5)
    return model


def extend(model, tokens, cache, steps):
    """Greedy tokens behind `tokens`: the logits of each step [B,steps,V]."""
    logits = [model(tokens, cache, last_only=True)]
    while len(logits) < steps:
        logits.append(model(logits[-1].argmax(-1), cache))
    return torch.cat(logits, 1)


def ordinary(model, *args):
    """The same by the modules: a hook that does nothing keeps the flat step away."""
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    try:
        return extend(model, *args)
    finally:
        handle.remove()


CASES = {
    "v3": {},
    "v3 in groups": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5},
    "v3 not normalised": {"norm_topk_prob": False},
    "v2": {**V2, "routed_scaling_factor": 16.0},
    "v2 in groups": {**V2, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "two shared experts": {"n_shared_experts": 2},
    "no shared expert": {"n_shared_experts": 0},
    "dense": {"n_routed_experts": 0},
    "tied, YaRN": {"tie_word_embeddings": True, "rope_scaling": YARN},
}


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
@torch.no_grad()
def test_the_flat_step_is_the_ordinary_path(changes, B):
    model = build(**changes)
    prompt = torch.randint(64, (B, 5))
    caches = [model.new_cache(B, 60) for _ in range(2)]
    got, want = extend(model, prompt, caches[0], 50), ordinary(model, prompt, caches[1], 50)
    assert caches[0][0].step
    assert got.shape == (B, 50, 64) and relative_error(got, want) < 1e-5
    for flat, plain in zip(*caches, strict=True):
        assert flat.length == plain.length == 54 and relative_error(flat.tensors[0], plain.tensors[0]) < 1e-5


@torch.no_grad()
def test_the_same_experts_are_chosen():
    model = build(n_group=4, topk_group=2)
    cache, chosen = model.new_cache(1, 600), []
    gate = model.layers[-1].mlp.gate
    gate.route = lambda logits: chosen.append(type(gate).route(gate, logits)) or chosen[-1]
    prompt = torch.randint(64, (1, 600))
    for t in range(600):
        model(prompt[:, t : t + 1], cache)
    assert cache[0].step and len(chosen) == 600
    flat = torch.cat([routed[0] for routed in chosen]).sort(-1).values
    model(prompt, model.new_cache(1, 600))
    assert torch.equal(flat, chosen[-1][0].sort(-1).values)


def test_where_it_does_not_apply_the_modules_are_called():
    model, token = build(), torch.tensor([[5]])

    def is_flat(model, dtype=None, context=torch.no_grad):
        cache, ran = model.new_cache(1, 9, dtype), []
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3]]), cache)
        block = type(model.layers[0])
        forward, block.forward = block.forward, lambda *args: ran.append(1) or forward(*args)
        try:
            with context():
                model(token, cache)
        finally:
            block.forward = forward
        return not ran

    assert is_flat(model) and is_flat(model, context=torch.inference_mode)
    assert not is_flat(model, context=torch.enable_grad) and not is_flat(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_flat(model)
    assert not is_flat(build().train()) and not is_flat(build().double()) and not is_flat(build().bfloat16())
    assert not is_flat(build(q_lora_rank=8)) and not is_flat(build(attention="mha"))
    assert not is_flat(build(kv_lora_rank=64)), "the folded weights would be large"
    handle = model.layers[1].mlp.register_forward_pre_hook(lambda *_: None)
    assert not is_flat(model)
    handle.remove()
    assert is_flat(model)
    model.layers[1].mlp = nn.Sequential(model.layers[1].mlp)
    assert not is_flat(model), "a part that the flat step does not know"


@torch.no_grad()
def test_a_hook_between_two_tokens_sees_the_second():
    model, cache, seen = build(), None, []
    cache = model.new_cache(1, 9)
    extend(model, torch.tensor([[1, 2]]), cache, 2)
    handle = model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    model(torch.tensor([[3]]), cache)
    handle.remove()
    model(torch.tensor([[3]]), cache)
    assert seen == [1] and cache[0].length == 5


@torch.no_grad()
def test_changed_weights_are_seen_when_the_cache_is_filled_anew():
    model, prompt = build(), torch.randint(64, (1, 4))
    cache = model.new_cache(1, 12)
    for first in (4, 1):  # a prompt, and single tokens from the first on
        for _ in range(2):
            for p in model.parameters():
                p.mul_(0.9)
            for layer in cache:
                layer.length = 0
            got = extend(model, prompt[:, :first], cache, 6)
        assert relative_error(got, ordinary(model, prompt[:, :first], model.new_cache(1, 12), 6)) < 1e-5


@torch.no_grad()
def test_another_model_that_goes_on_with_a_cache_computes_by_its_own_weights():
    model, prompt = build(), torch.randint(64, (1, 4))
    cache = model.new_cache(1, 12)
    extend(model, prompt, cache, 3)
    torch.manual_seed(4)
    other, branch = Transformer(model.cfg).eval(), copy.deepcopy(cache)
    assert relative_error(other(prompt[:, :1], cache), ordinary(other, prompt[:, :1], branch, 1)) < 1e-5


def test_a_cache_goes_in_and_out_of_inference_mode_and_a_copy_of_it_goes_on_alone():
    model, prompt = build(), torch.randint(64, (1, 4))
    with torch.no_grad():
        cache, other = model.new_cache(1, 12), model.new_cache(1, 12)
        want = ordinary(model, prompt, other, 6)
    with torch.inference_mode():
        got = extend(model, prompt, cache, 3)
    branch = copy.deepcopy(cache)
    assert branch[0].step is None
    with torch.no_grad():
        for continued in (branch, cache):
            rest = extend(model, got[:, -1].argmax(-1, keepdim=True), continued, 3)
            assert relative_error(rest, want[:, 3:]) < 1e-5 and not rest.is_inference()


@torch.no_grad()
def test_bad_tokens_and_a_full_cache_are_told_as_ever():
    model = build(max_position_embeddings=8)
    for max_len, length, words in ((9, 8, "max_position_embeddings is 8"), (6, 6, "6 of 6 positions")):
        cache = model.new_cache(1, max_len)
        extend(model, torch.tensor([[1, 2]]), cache, length - 1)
        with pytest.raises(ValueError, match=words):
            model(torch.tensor([[1]]), cache)
    cache = model.new_cache(1, 8)
    extend(model, torch.tensor([[1, 2]]), cache, 2)
    for tokens, words in (([[64]], "0 to 63"), ([[-1]], "run from -1"), ([[1], [2]], "for a batch of 1")):
        with pytest.raises(ValueError, match=words):
            model(torch.tensor(tokens), cache)


def test_weights_fold_only_where_that_keeps_them_small():
    assert folds_small(ModelConfig.preset("small")) and not folds_small(ModelConfig(q_lora_rank=16))
    assert not folds_small(ModelConfig.preset("base")) and not folds_small(ModelConfig.preset("deepseek-v2-lite"))
    attn = Block(ModelConfig(), 0).self_attn
    into, out = fold(attn)
    assert into.shape == (5 * 80, 128) and out.shape == (128, 4 * 64)


@torch.no_grad()
def test_a_long_cache_in_pieces_is_the_same(monkeypatch):
    model, prompt = build(), torch.randint(64, (1, 37))
    want = ordinary(model, prompt, model.new_cache(1, 80), 40)
    for long, room in ((1, 80), (50, 77)):  # from the first token on; from the middle, to the last place of a cache
        monkeypatch.setattr(decode, "LONG", long)
        cache = model.new_cache(1, room)
        cache[0].tensors[0][:, 60:] = 1e4  # what lies behind does not count
        assert relative_error(extend(model, prompt, cache, 40), want) < 1e-5
    assert cache[0].length == 76
