"""The named configurations as one table: a row per field of ModelConfig, a column per model.

`tiny`, `small` and `base` are ours, to be trained here: a laptop CPU in minutes, a consumer GPU of 8 GB (about 150M
parameters, 50M active), an H200-class card (about 1B, 200M active). `tiny` is ModelConfig's defaults, which hold for
all that the table does not name. The others are the published models, from the config.json of each on the hub.
"""

import ast

MODELS = """
                            small     base deepseek-v2-lite          deepseek-v2 deepseek-v3 moonlight-16b-a3b  kimi-k2
vocab_size                   8192    32768           102400               102400      129280            163840   163840
hidden_size                   512     1024             2048                 5120        7168              2048     7168
intermediate_size            1536     3072            10944                12288       18432             11264    18432
moe_intermediate_size         256      384             1408                 1536        2048              1408     2048
num_hidden_layers              10       16               27                   60          61                27       61
num_attention_heads             8       16               16                  128         128                16       64
num_key_value_heads             8       16               16                  128         128                16       64
q_lora_rank                  None     None             None                 1536        1536              None     1536
kv_lora_rank                  128      256              512                  512         512               512      512
qk_nope_head_dim               64       64              128                  128         128               128      128
qk_rope_head_dim               32       32               64                   64          64                64       64
v_head_dim                     64       64              128                  128         128               128      128
n_routed_experts               32       48               64                  160         256                64      384
n_shared_experts                1        1                2                    2           1                 2        1
num_experts_per_tok             4        4                6                    6           8                 6        8
first_k_dense_replace           1        1                1                    1           3                 1        1
n_group                         1        1                1                    8           8                 1        1
topk_group                      1        1                1                    3           4                 1        1
scoring_func              sigmoid  sigmoid          softmax              softmax     sigmoid           sigmoid  sigmoid
topk_method              noaux_tc noaux_tc           greedy group_limited_greedy    noaux_tc          noaux_tc noaux_tc
norm_topk_prob               True     True            False                False        True              True     True
routed_scaling_factor         1.0      1.0              1.0                 16.0         2.5             2.446    2.827
aux_loss_alpha             0.0001   0.0001            0.001                0.001      0.0001            0.0001   0.0001
num_nextn_predict_layers        0        0                0                    0           1                 0        0
max_position_embeddings      4096     4096           163840               163840      163840              8192   131072
rms_norm_eps                 1e-6     1e-6             1e-6                 1e-6        1e-6              1e-5     1e-6
rope_theta                10000.0  10000.0          10000.0              10000.0     10000.0           50000.0  50000.0
yarn_factor                  None     None               40                   40          40              None       32
yarn_mscale                  None     None            0.707                  1.0         1.0              None      1.0
yarn_beta_fast               None     None               32                   32          32              None        1
"""


def read_table(text):
    """{model: {field: value}} of a table; its three rows of YaRN become one field, rope_scaling."""
    names, *rows = (line.split() for line in text.strip().splitlines())
    models = {name: {} for name in names}
    for field, *cells in rows:
        for name, cell in zip(names, cells, strict=True):
            models[name][field] = cell if cell[0].islower() else ast.literal_eval(cell)  # a word, or a value
    return {name: join_yarn(fields) for name, fields in models.items()}


def join_yarn(fields):
    """The fields with rope_scaling in place of yarn_*; all published models stretch 4096 positions, with one mscale."""
    factor, mscale, beta_fast = (fields.pop(f"yarn_{name}", None) for name in ("factor", "mscale", "beta_fast"))
    if factor:
        yarn = {"type": "yarn", "factor": factor, "original_max_position_embeddings": 4096}
        yarn |= {"beta_fast": beta_fast, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": mscale}
        fields["rope_scaling"] = yarn
    return fields


PRESETS = {"tiny": {}, **read_table(MODELS)}

# Dense models by others, for their sizes alone: minids opens no weights of theirs, so they are no presets. Where read:
# LLaMA-3.1 8B and 70B in oumi's configs/recipes/llama3_1, 405B in torchtune's llama3_1_405b; Qwen2.5-72B in copies of
# its config.json (its 819,200 biases of q, k and v are not counted); DeepSeek-67B, which V2's paper compares itself
# with, second-hand, in a list that links to its config.json.
DENSE = """
                    llama-3.1-8b llama-3.1-70b llama-3.1-405b qwen2.5-72b deepseek-67b
vocab_size                128256        128256         128256      152064       102400
hidden_size                 4096          8192          16384        8192         8192
intermediate_size          14336         28672          53248       29568        22016
num_hidden_layers             32            80            126          80           95
num_attention_heads           32            64            128          64           64
num_key_value_heads            8             8              8           8            8
"""
PUBLISHED_DENSE = {
    name: {**fields, "attention": "gqa", "n_routed_experts": 0} for name, fields in read_table(DENSE).items()
}
