"""What a configuration costs: published tables, to the digits they print, and where one does not come out."""

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from minids import ModelConfig, Transformer, accounting
from minids.accounting import published
from minids.presets import PUBLISHED_DENSE

V2, V3, OLD = published("deepseek-v2"), published("deepseek-v3"), published("deepseek-67b")
QWEN, LLAMA = published("qwen2.5-72b"), published("llama-3.1-405b")


def small(**changes):
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 64, "n_routed_experts": 8}
    return ModelConfig(**{**sizes, **changes})


# Parameters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("qwen2.5-72b", 72_706_203_648 - 80 * (8192 + 2 * 1024)),  # without its biases of q, k, v
    ],
)
def test_published_counts_of_dense_models(name, count):
    """The numbers of parameters in the hub's metadata of their safetensors."""
    cfg = published(name)
    assert accounting.parameters(cfg) == (count, count - cfg.vocab_size * cfg.hidden_size)


def test_deepseek_moe_16b():
    """2401.06066's model has plain attention with experts; the count is that of transformers' modules."""
    names = {"attention": "mha", "scoring_func": "softmax", "topk_method": "greedy", "num_hidden_layers": 28}
    names |= {"hidden_size": 2048, "vocab_size": 102400, "num_attention_heads": 16, "num_key_value_heads": 16}
    names |= {"intermediate_size": 10944, "moe_intermediate_size": 1408, "n_shared_experts": 2}
    cfg = ModelConfig(**names, n_routed_experts=64, num_experts_per_tok=6)
    assert accounting.parameters(cfg).total == 16_375_728_128


def test_both_conventions_of_active_parameters():
    assert f"{accounting.parameters(V3).active / 1e9:.2f}" == "36.63"
    assert f"{accounting.active_with_embedding(V3) / 1e9:.2f}" == "37.55"
    assert round(accounting.parameters(V3).total / 1e9) == 671
    assert round(accounting.active_with_embedding(V2) / 1e9) == round(accounting.parameters(V2).active / 1e9) == 21


def test_a_tied_head_is_multiplied_with_under_either_convention():
    tied = small(tie_word_embeddings=True)
    assert accounting.active_with_embedding(tied) == accounting.parameters(tied).active


def test_mtp_of_v3():
    mtp = accounting.mtp_parameters(V3)
    assert f"{mtp.total / 1e9:.2f}" == "11.61"
    eh_proj, table = 2 * V3.hidden_size**2, V3.vocab_size * V3.hidden_size
    # README_WEIGHTS.md of DeepSeek-V3 says 11.5B, and 2.4B active with embedding and head: both without eh_proj.
    assert f"{(mtp.total - eh_proj) / 1e9:.1f}" == "11.5"
    assert f"{(mtp.active - eh_proj + 2 * table) / 1e9:.1f}" == "2.4"


@pytest.mark.parametrize("changes", [{}, {"n_routed_experts": 0}, {"q_lora_rank": 12, "attention_bias": True}])
def test_mtp_parameters_are_those_of_the_modules(changes):
    cfg = small(num_nextn_predict_layers=2, **changes)
    modules = Transformer(cfg).mtp
    assert len(modules) == 2
    assert accounting.mtp_parameters(cfg).total == sum(t.numel() for t in modules.state_dict().values())
    assert accounting.mtp_parameters(small()) == (0, 0)


# Cache --------------------------------------------------------------------------------------------------------------


def test_cache_per_token_of_isca_table_1():
    sizes = [accounting.kv_bytes_per_token(cfg, torch.bfloat16) for cfg in (V3, QWEN, LLAMA)]
    assert sizes == [70_272, 327_680, 516_096]
    assert f"{sizes[1] / sizes[0]:.2f}" == "4.66"
    assert f"{sizes[2] / sizes[0]:.2f}" == "7.34"  # the table prints 7.28, which its own sizes do not give


def test_v2_table_1_counts_numbers():
    width, layers = V2.qk_nope_head_dim, V2.num_hidden_layers  # d_h of the paper
    heads = {"hidden_size": 1024, "num_hidden_layers": layers, "num_attention_heads": 8, "head_dim": width}
    gqa = ModelConfig(attention="gqa", num_key_value_heads=2, **heads)
    assert accounting.kv_elements_per_token(ModelConfig(attention="mha", **heads)) == 2 * 8 * width * layers
    assert accounting.kv_elements_per_token(gqa) == 2 * 2 * width * layers
    assert accounting.kv_elements_per_token(V2) == 4.5 * width * layers == 2 * 2.25 * width * layers


def test_the_headline_of_93_percent_needs_six_bits():
    ours, old = accounting.kv_elements_per_token(V2), accounting.kv_elements_per_token(OLD)
    assert f"{1 - ours * 0.75 / (old * 2):.1%}" == "93.3%"
    assert f"{1 - ours / old:.1%}" == "82.2%"


# Training -----------------------------------------------------------------------------------------------------------


def test_flops_per_token_of_isca_table_2():
    assert [f"{accounting.train_flops_per_token(cfg, 4096) / 1e9:.1f}" for cfg in (V2, V3)] == ["155.3", "250.5"]
    assert [int(accounting.train_flops_per_token(cfg, 4096) / 1e9) for cfg in (V2, V3)] == [155, 250]


@pytest.mark.parametrize(("cfg", "printed"), [(QWEN, 394e9), (LLAMA, 2448e9)])
def test_dense_rows_of_isca_table_2_do_not_come_out(cfg, printed):
    """The formula that gives both rows of experts gives more than the table prints for both dense models."""
    ours = accounting.train_flops_per_token(cfg, 4096)
    assert f"{ours / 1e9:.0f}" == ("445" if cfg is QWEN else "2473")
    assert 1.01 < ours / printed < 1.13
    without_attention = 6 * accounting.parameters(cfg).active
    no_head = ours - 6 * cfg.vocab_size * cfg.hidden_size
    assert all(abs(other / printed - 1) > 0.004 for other in (ours, without_attention, no_head))


def test_hours_and_dollars_of_v3():
    hours = {"pre-training": 2664e3, "context": 119e3, "post-training": 5e3}
    assert sum(hours.values()) == 2788e3
    assert sum(hours.values()) * 2 == 5.576e6
    assert hours["pre-training"] == 180e3 * 14.8
    assert f"{180e3 / 2048 / 24:.1f}" == "3.7"  # days for a trillion tokens
    assert (202 + 10 + 82) == 294  # R1, thousands of dollars
    assert f"{1 - 172.8 / 300.6:.1%}" == "42.5%"  # V2 against the 67B, hours per trillion tokens
    rate = 1e12 / (180e3 * 3600)  # tokens per second and GPU
    share = accounting.mfu(accounting.train_flops_per_token(V3, 4096), rate, "H800")
    assert f"{share:.0%}" == "39%"  # as in table 4 of ISCA


def routers(cfg):
    """6 FLOPs for each number of the routers: their matrices and biases."""
    moe_layers = sum(map(cfg.is_moe_layer, range(cfg.num_hidden_layers)))
    return 6 * moe_layers * cfg.n_routed_experts * (cfg.hidden_size + 1)


@pytest.mark.parametrize(
    ("tokens_a_day", "shares"), [(272.80e9, ("38.94%", "43.73%")), (272.52e9, ("38.90%", "43.68%"))]
)
def test_utilisation_of_isca_table_4(tokens_a_day, shares):
    """All eight printed figures come out without the routers' FLOPs and with a peak of 989 TFLOP/s."""
    rate = tokens_a_day / 86400 / 2048
    causal = accounting.train_flops_per_token(V3, 4096) - routers(V3)
    attention = 3 * 61 * 128 * (128 + 64 + 128) * 4096
    flops = [causal * rate, (causal + attention) * rate]
    assert [f"{value / 1e12:.0f}" for value in flops] == ["385", "432"]
    assert [f"{value / 989e12:.2%}" for value in flops] == list(shares)
    ours = accounting.mfu(causal, rate, "H800")  # the datasheet's peak is 989.5
    assert ours == pytest.approx(flops[0] / 989.5e12)


def test_gpu_hours_and_utilisation_undo_each_other():
    flops = accounting.train_flops_per_token(V3, 4096)
    hours = accounting.gpu_hours(flops * 1e12, 0.39, "H800")
    assert accounting.mfu(flops, 1e12 / (3600 * hours), "H800") == pytest.approx(0.39)
    assert accounting.gpu_hours(flops, 0.5, dtype=torch.float8_e4m3fn) == pytest.approx(
        accounting.gpu_hours(flops, 1.0, dtype=torch.bfloat16)
    )
    for share in (0, -0.1, 1.01, 39):
        with pytest.raises(ValueError, match="give the share of the peak, above 0 and at most 1"):
            accounting.gpu_hours(flops, share)


# Serving ------------------------------------------------------------------------------------------------------------


def test_the_margin_of_545_percent():
    cost = 226.75 * 8 * 2 * 24
    income = (342e9 * 0.14 + 266e9 * 0.55 + 168e9 * 2.19) / 1e6
    assert cost == 87_072
    assert income == pytest.approx(562_100)
    assert f"{562_027 / cost - 1:.0%}" == "545%"  # the published income, from unrounded counts
    assert f"{income / cost - 1:.0%}" == "546%"
    rate = 168e9 / 86400
    assert accounting.dollars_per_million(rate, 2, gpus=226.75 * 8) == pytest.approx(1e6 * cost / 168e9)


def test_the_bound_of_67_tokens_per_second():
    once = (1 + 2) * 32 * 9 * 7000 / 50e9
    assert f"{once * 1e6:.2f}" == "120.96"
    step = 2 * once * V3.num_hidden_layers
    assert f"{step * 1e3:.2f}" == "14.76"
    assert int(1 / step) == 67
    assert math.floor(1 / (step * V3.hidden_size / 7000)) == 66  # with the true width


def test_experts_touched_is_the_mean_over_all_choices():
    """Against all pairs of choices of 2 out of 4: exact."""
    cfg = small(n_routed_experts=4, num_experts_per_tok=2)
    sets = [{a, b} for a in range(4) for b in range(a)]
    mean = Fraction(sum(len(one | two) for one in sets for two in sets), len(sets) ** 2)
    assert accounting.experts_touched(cfg, 2) == pytest.approx(float(mean))
    assert accounting.experts_touched(V3, 1) == pytest.approx(8)
    assert accounting.experts_touched(V3, 10**6) == pytest.approx(256)
    assert accounting.experts_touched(LLAMA, 5) == 0


@pytest.mark.parametrize("cfg", [V3, LLAMA, small(), small(n_routed_experts=0)])
def test_a_step_reads_active_weights_for_one_and_nearly_all_for_many(cfg):
    size = accounting.parameters(cfg)
    assert accounting.decode_bytes(cfg, 1, 0, 1)[0] == pytest.approx(size.active)
    not_read = size.total - size.active - cfg.vocab_size * cfg.hidden_size  # all but the input embedding is, in the end
    assert accounting.decode_bytes(cfg, 10**7, 0, 2)[0] == pytest.approx(2 * (size.active + not_read))
    assert accounting.decode_bytes(cfg, 3, 100)[1] == 300 * accounting.kv_bytes_per_token(cfg, torch.bfloat16)
    assert accounting.decode_flops(cfg, 1, 0) == 2 * size.active


def test_attention_over_the_cache_in_a_step():
    one_more = accounting.decode_flops(V3, 2, 1) - accounting.decode_flops(V3, 2, 0)
    assert one_more == 2 * 2 * 61 * 128 * (512 + 64 + 512)  # a score and a value in the latent, absorbed
    one_more = accounting.decode_flops(LLAMA, 2, 1) - accounting.decode_flops(LLAMA, 2, 0)
    assert one_more == 2 * 2 * 126 * 128 * (128 + 128)


def test_a_step_takes_the_longer_of_both():
    step = accounting.decode_seconds(LLAMA, 1, 0, "H200", gpus=8)
    assert step == pytest.approx(2 * accounting.parameters(LLAMA).active / (8 * 4.8e12))
    step = accounting.decode_seconds(LLAMA, 10**5, 0, "H200", gpus=8)
    assert step == pytest.approx(2 * 10**5 * accounting.parameters(LLAMA).active / (8 * 989.5e12))


def test_fine_experts_make_more_teams():
    """2401.06066: each expert cut into four, and four times as many chosen."""
    coarse, fine = small(n_routed_experts=16, num_experts_per_tok=2), small(n_routed_experts=64, num_experts_per_tok=8)
    teams = [math.comb(cfg.n_routed_experts, cfg.num_experts_per_tok) for cfg in (coarse, fine)]
    assert teams == [120, 4_426_165_368]
    quarter = accounting.moe_parameters(small(n_routed_experts=64, num_experts_per_tok=8, moe_intermediate_size=16))
    whole = accounting.moe_parameters(small(n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=64))
    shared = 3 * 32 * (64 - 16)  # the one shared expert is narrower too
    assert quarter.active == whole.active - shared + 48 * (32 + 1)  # equal, but for the router's rows


# Tables -------------------------------------------------------------------------------------------------------------


def test_an_unknown_model_is_answered_by_those_there_are():
    with pytest.raises(ValueError, match=r"no model 'gpt-4'; the tables have tiny, .*deepseek-v3.*llama-3.1-405b"):
        published("gpt-4")


def test_dense_models_by_others_are_no_presets():
    for name in PUBLISHED_DENSE:
        assert published(name).attention == "gqa" and published(name).n_routed_experts == 0
        with pytest.raises(ValueError, match="there is no preset"):
            ModelConfig.preset(name)


@pytest.mark.parametrize("name", accounting.GPUS)
def test_a_gpu_says_who_says_so(name):
    gpu = accounting.GPUS[name]
    assert gpu.source and gpu.bandwidth > 1e11 and gpu.memory >= 8e9
    assert gpu.flops[torch.float32] < gpu.flops[torch.bfloat16] == gpu.flops[torch.float16]
    if name == "A100":  # Ampere: no FP8 to compute with
        assert torch.float8_e4m3fn not in gpu.flops
    else:
        assert gpu.flops[torch.float8_e4m3fn] == pytest.approx(2 * gpu.flops[torch.bfloat16], rel=0.01)


def test_the_readme_says_of_v3_what_arithmetic_says():
    v3, llama = (accounting.kv_bytes_per_token(cfg, torch.bfloat16) for cfg in (V3, LLAMA))
    total, active = (
        round(count / 1e9) for count in (accounting.parameters(V3).total, accounting.parameters(V3).active)
    )
    said = " ".join((Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert f"a cache of {v3:,} bytes a token where LLaMA-3.1-405B keeps {llama:,}" in said
    assert f"{active} of {total} billion parameters" in said
