"""The model against transformers: logits, greedy tokens, and checkpoints in both directions."""

import pytest
import torch

from minids import ModelConfig, Transformer, accounting, generate
from minids.numerics import relative_error, seed_everything

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 72,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": None,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "routed_scaling_factor": 1.7,
    "initializer_range": 0.3,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 32}
YARN |= {"beta_fast": 32, "beta_slow": 1}
BOTH = {"mscale": 0.707, "mscale_all_dim": 1.0}
CASES = {
    "v3": ("V3", {}),
    "v3 low-rank queries, groups": ("V3", {"q_lora_rank": 20, "n_group": 4, "topk_group": 2}),
    "v3 yarn": ("V3", {"rope_parameters": {**YARN, **BOTH}}),
    "v3 yarn without mscale": ("V3", {"rope_parameters": YARN, "first_k_dense_replace": 0}),
    "v3 tied, biases, all dense": (
        "V3",
        {"tie_word_embeddings": True, "attention_bias": True, "q_lora_rank": 20, "first_k_dense_replace": 3},
    ),
    "v3 gates not normalised": ("V3", {"norm_topk_prob": False, "first_k_dense_replace": 2}),
    "v2": ("V2", {"topk_method": "greedy"}),
    "v2 groups, yarn": (
        "V2",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "q_lora_rank": 20,
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
}


@pytest.fixture(params=CASES)
def theirs(request):
    """A random model of transformers, the router's biases negative too."""
    seed_everything(3)
    kind, changes = CASES[request.param]
    cfg = getattr(transformers, f"Deepseek{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"Deepseek{kind}ForCausalLM")._from_config(cfg, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.uniform_(-2, 0.5)
    return model


def here(model, folder):
    model.save_pretrained(folder)
    return Transformer.from_pretrained(folder)


@torch.no_grad()
def test_logits_equal_transformers(theirs, tmp_path):
    ours, tokens = here(theirs, tmp_path), torch.randint(96, (3, 50))
    assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-5
    assert accounting.parameters(ours.cfg).total == sum(t.numel() for t in ours.state_dict().values()) - (
        ours.lm_head.weight.numel() if ours.cfg.tie_word_embeddings else 0
    )


@torch.no_grad()
def test_64_greedy_tokens_equal_transformers_with_and_without_a_cache(theirs, tmp_path):
    ours, prompt = here(theirs, tmp_path), torch.randint(96, (1, 9))
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    want = theirs.generate(prompt, **options)
    assert torch.equal(generate(ours, prompt, 64), want)
    assert torch.equal(generate(ours, prompt, 64, use_cache=False), want)


@torch.no_grad()
@pytest.mark.parametrize("shard", [5 * 10**9, 40_000])
def test_saved_here_opens_there(theirs, tmp_path, shard):
    ours, tokens = here(theirs, tmp_path / "a"), torch.randint(96, (2, 20))
    ours.save_pretrained(tmp_path / "b", max_shard_bytes=shard)
    assert (tmp_path / "b" / "model.safetensors.index.json").exists() == (shard < 10**6)
    opened = type(theirs).from_pretrained(tmp_path / "b", attn_implementation="eager").eval()
    opened.set_experts_implementation("eager")
    assert relative_error(opened(tokens).logits, theirs(tokens).logits) < 1e-5
    again = Transformer.from_pretrained(tmp_path / "b")
    assert torch.equal(again(tokens), ours(tokens)) and again.cfg == ours.cfg


def small(**changes):
    seed_everything(5)
    return Transformer(ModelConfig(**{**SIZES, **changes})).eval()


@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
def test_cache_bytes_are_those_of_accounting(attention):
    model = small(attention=attention, num_key_value_heads=2)
    cache = model.new_cache(2, 30)
    live = sum(t.numel() * t.element_size() for layer in cache for t in layer.tensors)
    assert live == sum(layer.nbytes for layer in cache) == 60 * accounting.kv_bytes_per_token(model.cfg, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["mla", "gqa", "mha"])
def test_pieces_through_the_cache_equal_one_pass(attention):
    model, tokens = small(attention=attention, num_key_value_heads=2), torch.randint(96, (3, 40))
    cache = model.new_cache(3, 40)
    parts = [model(piece, cache) for piece in tokens.split([17, 1, 5, 1, 16], 1)]
    assert relative_error(torch.cat(parts, 1), model(tokens)) < 1e-5
    with pytest.raises(ValueError, match="the cache holds 40 of 40 positions"):
        model(tokens[:, :1], cache)


def test_the_loss_is_the_cross_entropy_of_the_logits_and_so_are_its_gradients():
    model, tokens = small(aux_loss_alpha=0.0), torch.randint(96, (5, 150))
    targets = torch.randint(96, (5, 150)).masked_fill(torch.rand(5, 150) < 0.1, -100)
    loss, nats = model.loss(tokens, targets)
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    want = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    want.backward()
    assert relative_error(nats, want) < 1e-5
    assert max(relative_error(got[name], p.grad) for name, p in model.named_parameters() if p.grad.any()) < 1e-4


@pytest.mark.parametrize(
    "tokens", [torch.tensor([[96]]), torch.tensor([[-1]]), torch.zeros(3, dtype=torch.int64), torch.zeros(1, 2)]
)
def test_tokens_that_cannot_be_are_refused(tokens):
    with pytest.raises(ValueError, match="token"):
        small()(tokens)
