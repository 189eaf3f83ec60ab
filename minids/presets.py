"""The named configurations, as the fields of ModelConfig in which they differ from its defaults.

`tiny`, `small` and `base` are ours, to be trained here: a laptop CPU in minutes, a consumer GPU of 8 GB (about 150M
parameters, 50M active), an H200-class card (about 1B, 200M active). The others are the published models, from the
config.json of each on the hub.
"""


def _yarn(factor, mscale, beta_fast=32):
    return {
        "type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": 4096,
        "beta_fast": beta_fast,
        "beta_slow": 1,
        "mscale": mscale,
        "mscale_all_dim": mscale,
    }


PUBLISHED_HEAD = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V2_ROUTER = {"scoring_func": "softmax", "norm_topk_prob": False, "aux_loss_alpha": 0.001}

LITE = {  # what DeepSeek-V2-Lite and Moonlight share
    **PUBLISHED_HEAD,
    "hidden_size": 2048,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
}

DEEPSEEK_V3 = {
    **PUBLISHED_HEAD,
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_scaling": _yarn(40, 1.0),
}

PRESETS = {
    "tiny": {},
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 256,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
    },
    "base": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "n_routed_experts": 48,
        "num_experts_per_tok": 4,
    },
    "deepseek-v2-lite": {
        **LITE,
        **V2_ROUTER,
        "vocab_size": 102400,
        "intermediate_size": 10944,
        "topk_method": "greedy",
        "max_position_embeddings": 163840,
        "rope_scaling": _yarn(40, 0.707),
    },
    "deepseek-v2": {
        **DEEPSEEK_V3,
        **V2_ROUTER,
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 16.0,
        "num_nextn_predict_layers": 0,
    },
    "deepseek-v3": DEEPSEEK_V3,
    "moonlight-16b-a3b": {
        **LITE,
        "vocab_size": 163840,
        "intermediate_size": 11264,
        "routed_scaling_factor": 2.446,
        "max_position_embeddings": 8192,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
    },
    "kimi-k2": {
        **DEEPSEEK_V3,
        "vocab_size": 163840,
        "num_attention_heads": 64,
        "num_key_value_heads": 64,
        "n_routed_experts": 384,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 131072,
        "rope_theta": 50000.0,
        "rope_scaling": _yarn(32, 1.0, beta_fast=1),
    },
}
