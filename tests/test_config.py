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
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling has type 'linear'"),
    ],
)
def test_a_value_that_cannot_work_is_named(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        ModelConfig(**changes)


def test_an_unknown_preset_is_answered_by_those_there_are():
    with pytest.raises(ConfigError, match=r"no preset 'huge'; the presets are tiny, small, base"):
        ModelConfig.preset("huge")
