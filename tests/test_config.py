"""Configurations and what they cost: the published figures, and the hub's config.json in and out."""

import json

import pytest
import torch

from minids import ConfigError, ModelConfig, accounting
from minids.presets import PRESETS

TOTALS = {
    "deepseek-v3": 671_026_419_200,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "moonlight-16b-a3b": 15_960_110_208,
    "kimi-k2": 1_026_408_232_448,
}


@pytest.mark.parametrize("name", TOTALS)
def test_published_parameters(name):
    assert accounting.parameters(ModelConfig.preset(name)).total == TOTALS[name]


def test_published_cache_and_flops():
    v2, v3 = ModelConfig.preset("deepseek-v2"), ModelConfig.preset("deepseek-v3")
    assert accounting.kv_bytes_per_token(v3, torch.bfloat16) == 70_272
    assert f"{accounting.train_flops_per_token(v2, 4096) / 1e9:.1f}" == "155.3"
    assert f"{accounting.train_flops_per_token(v3, 4096) / 1e9:.1f}" in ("250.4", "250.5")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_goes_out_and_comes_back(name):
    cfg = ModelConfig.preset(name)
    assert ModelConfig.from_hf(json.loads(json.dumps(cfg.to_hf()))) == cfg


def test_every_key_of_a_hub_config_is_given_back():
    hub = {**ModelConfig.preset("deepseek-v3").to_hf(), "auto_map": {"AutoConfig": "x"}, "unknown": [1]}
    assert ModelConfig.from_hf(hub).to_hf() == hub


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"attention": "mlp"}, "attention is 'mlp'; it must be one of mla, gqa, mha"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok 17 is more than n_routed_experts 16"),
        ({"n_group": 3}, "n_routed_experts 16 is not a multiple of n_group 3"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim is 7"),
        ({"initializer_range": -0.02}, "initializer_range is -0.02; it must be 0 or more"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling has type 'linear'"),
    ],
)
def test_a_value_that_cannot_work_is_named(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig(**changes)


def test_a_changed_config_leaves_its_preset_alone():
    cfg = ModelConfig.preset("deepseek-v3")
    cfg.rope_scaling["factor"] = 2
    assert ModelConfig.preset("deepseek-v3").rope_scaling["factor"] == 40


def test_an_unknown_preset_is_answered_by_those_there_are():
    with pytest.raises(ConfigError, match=r"no preset 'huge'; the presets are tiny, small, base"):
        ModelConfig.preset("huge")


# Others' config.json ------------------------------------------------------------------------------------------------

V3 = ModelConfig.preset("deepseek-v3").to_hf()
YARN = V3["rope_scaling"]
KIMI_VL = {"model_type": "kimi_vl", "architectures": ["KimiVLForConditionalGeneration"], "text_config": V3}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.mark.parametrize(
    ("hub", "sentence"),
    [
        (LLAMA, r"model_type is 'llama' \(LlamaForCausalLM\); minids opens deepseek_v2, deepseek_v3, kimi_k2"),
        ({"model_type": "deepseek"}, "'deepseek' with plain attention; minids opens"),
        ({**V3, "model_type": "deepseek_v32", "index_topk": 2048}, "with sparse attention; minids opens"),
        ({**V3, "index_topk": 2048}, "with sparse attention; minids opens"),  # V3.2 under the name of V3
        (KIMI_VL, r"with a text_config beside other parts; .* for its sizes give from_hf config\['text_config'\]"),
        ({**V3, "use_mla": False}, "use_mla is False; minids computes True alone"),
        ({**V3, "hidden_act": "gelu"}, "hidden_act is 'gelu'; minids computes 'silu' alone"),
        ({**V3, "mlp_bias": True}, "mlp_bias is True; minids computes False alone"),
        ({**V3, "rope_interleave": False}, "rope_interleave is False; minids computes True alone"),
        ({**V3, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor of"),
        ({**V3, "rope_parameters": {**YARN, "truncate": False}}, "truncate of RoPE is False"),
        ({**V3, "rope_parameters": {**YARN, "mscale": "1.0"}}, "mscale is '1.0'; it must be a positive number"),
        ({**V3, "rope_parameters": {**YARN, "beta_fast": "32"}}, "beta_fast is '32'; it must be a positive number"),
        ({**V3, "rope_parameters": {**YARN, "mrope_section": [1, 2]}}, "'mrope_section', which minids does not know"),
        ({**V3, "rope_parameters": None, "rope_scaling": "yarn"}, "rope_scaling is 'yarn'; give None, or YaRN's"),
        ({**V3, "rms_norm_eps": "1e-06"}, "rms_norm_eps is '1e-06'; it must be of type float"),
        ({k: v for k, v in V3.items() if k != "routed_scaling_factor"}, "lacks routed_scaling_factor"),
    ],
)
def test_another_model_is_refused_in_a_sentence(hub, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig.from_hf(hub)


def test_what_a_config_leaves_null_is_the_architectures_default():
    names = ["n_group", "topk_group", "scoring_func", "moe_layer_freq", "aux_loss_alpha", "attention_bias"]
    names += ["tie_word_embeddings", "initializer_range", "topk_method", "norm_topk_prob"]
    nulls = {**V3, **dict.fromkeys(names)}
    assert ModelConfig.from_hf(nulls) == ModelConfig.preset("deepseek-v3", n_group=1, topk_group=1)
    assert ModelConfig.from_hf(nulls).to_hf() == nulls
    dense = {**V3, "n_routed_experts": None, "moe_intermediate_size": None, "routed_scaling_factor": None}
    assert ModelConfig.from_hf(dense).n_routed_experts == 0 and ModelConfig.from_hf(dense).to_hf() == dense
    unneeded = {**YARN, "truncate": True, "partial_rotary_factor": 1.0, "mscale": 0, "attention_factor": None}
    read = ModelConfig.from_hf({**V3, "rope_parameters": unneeded}).rope_scaling
    assert read == {**YARN, "mscale": 0, "attention_factor": None}


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", ""])
def test_a_file_that_is_no_config_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json (is not JSON|holds a \w+; a config\.json is an object)"):
        ModelConfig.from_hf(tmp_path)
