"""The model's configuration, in the hub's own field names.

A hub `config.json` of the DeepSeek-V2/V3 family opens as it is (`ModelConfig.from_hf`) and goes back without loss
(`to_hf`). Three presets are ours and can be trained here (tiny, small, base); five are published models.

Letters in shapes, for the whole package:

    B batch              T query positions      S key positions        D hidden_size
    H heads              C kv_lora_rank         Q q_lora_rank          P qk_nope_head_dim
    R qk_rope_head_dim   V v_head_dim (or the vocabulary, where no head is near)
    E n_routed_experts   A num_experts_per_tok  F expert width         G K/V heads of GQA
    M, N, K              sizes of a GEMM; in MoE, M is the number of dispatched rows (tokens × A)
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args

from minids.presets import PRESETS

ARCHITECTURES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
SAME_ARCHITECTURE = {"deepseek_v2", "deepseek_v3", "kimi_k2", "minids"}  # model types whose checkpoints open here

# Sizes that a model needs, and that must be positive; those of MLA; those of experts.
SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
SIZES += ["rms_norm_eps", "max_position_embeddings"]
MLA_SIZES = ["kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]
MOE_SIZES = ["moe_intermediate_size", "num_experts_per_tok"]
YARN_SIZES = ("factor", "original_max_position_embeddings")
YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")  # may be left out

# What near model types have that minids has not; keys of which minids computes one value alone.
RELATIVES = {"deepseek": "plain attention", "deepseek_v32": "sparse attention", "deepseek_v4": "sparse attention"}
ONLY = {"hidden_act": "silu", "mlp_bias": False, "use_mla": True, "rope_interleave": True}


class ConfigError(ValueError):
    """A configuration that cannot be built; the message names the field, its value and what was expected."""


@dataclass
class ModelConfig:
    """Sizes and switches of one model; every field that the hub has carries the hub's name.

    `attention` is "mla", "gqa" or "mha"; a model with `n_routed_experts` 0 is dense. `hub` keeps the hub config
    that was read, so that `to_hf` gives back every key of it. Raises ConfigError.
    """

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 384
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 4
    attention: str = "mla"
    head_dim: int = 0  # of "mha" and "gqa"; 0 means hidden_size / num_attention_heads
    kv_lora_rank: int = 64
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    n_shared_experts: int = 1
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    first_k_dense_replace: int = 1
    moe_layer_freq: int = 1
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    aux_loss_alpha: float = 0.0001  # sequence-wise balance loss, V3 eq. 17
    num_nextn_predict_layers: int = 0  # modules of multi-token prediction (MTP), V3 section 2.2
    max_position_embeddings: int = 4096
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    hub: dict | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.attention == "mla":
            self.num_key_value_heads = self.num_attention_heads  # as hub configs say it; the cache has none of them
        validate(self)
        self.rope_scaling = self.rope_scaling and dict(self.rope_scaling)  # its own: presets share theirs

    @classmethod
    def preset(cls, name, **changes):
        """The configuration called `name`, such as "tiny" or "deepseek-v3", with `changes`; raises ConfigError."""
        if name not in PRESETS:
            raise ConfigError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_hf(cls, source):
        """Read a hub config: a dict, a `config.json`, or the folder that holds one. Raises ConfigError."""
        hub = source if isinstance(source, dict) else _read_json(source)
        return cls(**_fields_from_hub(hub), hub=dict(hub))

    def to_hf(self):
        """The hub's config.json as a dict: what `from_hf` read, or what transformers opens for a model made here."""
        own = {k: v for k, v in asdict(self).items() if k != "hub"}
        if self.hub and (self.attention == "mla" or self.hub["model_type"] == "minids"):
            read = asdict(ModelConfig.from_hf(self.hub))  # give back what was read, with what has changed since
            edits = {k: v for k, v in own.items() if read[k] != v}
            rope = _hub_rope(self) if edits.keys() & {"rope_theta", "rope_scaling"} else {}
            if "num_nextn_predict_layers" in edits and "num_mtp_layers" in self.hub:
                edits["num_mtp_layers"] = edits["num_nextn_predict_layers"]
            return {**self.hub, **edits, **rope}
        if self.attention != "mla":  # a baseline: only minids opens it
            return {"architectures": ["Transformer"], "model_type": "minids", **own, **_hub_rope(self)}
        kind = "deepseek_v3" if self.topk_method == "noaux_tc" else "deepseek_v2"
        if not self.n_routed_experts:
            own["first_k_dense_replace"] = self.num_hidden_layers
        own |= {"hidden_act": "silu", "rope_interleave": True, "num_key_value_heads": self.num_attention_heads}
        own = {k: v for k, v in own.items() if k not in ("attention", "head_dim")}
        return {"architectures": [ARCHITECTURES[kind]], "model_type": kind, **own, **_hub_rope(self)}

    @property
    def qk_head_dim(self):
        """Width of a head's query and key in MLA, P+R."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def attention_head_dim(self):
        """Width of a head in the baselines "mha" and "gqa"."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self):
        """Key-value heads of the baselines: all of them for "mha"."""
        return self.num_attention_heads if self.attention == "mha" else self.num_key_value_heads

    def is_moe_layer(self, index):
        """Whether layer `index` has experts: from first_k_dense_replace on, every moe_layer_freq-th."""
        past_dense = index >= self.first_k_dense_replace and index % self.moe_layer_freq == 0
        return self.n_routed_experts > 0 and past_dense


def validate(cfg):
    """Raise ConfigError for the first field that cannot work, with its value and what was expected."""
    _check_types(cfg)
    _check_positive(cfg)
    _choice(cfg, "attention", ("mla", "gqa", "mha"))
    _choice(cfg, "scoring_func", ("sigmoid", "softmax"))
    _choice(cfg, "topk_method", ("noaux_tc", "greedy", "group_limited_greedy"))
    if cfg.attention == "mla":
        _need(cfg.q_lora_rank is None or cfg.q_lora_rank > 0, f"q_lora_rank is {cfg.q_lora_rank}; give None or > 0")
        _need(cfg.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim is {cfg.qk_rope_head_dim}; RoPE turns pairs: even")
    else:
        _check_baseline(cfg)
    if cfg.n_routed_experts:
        _check_experts(cfg)
    if cfg.rope_scaling:
        _check_rope(cfg)


def _check_types(cfg):
    for spec in fields(cfg):
        value, kinds = getattr(cfg, spec.name), get_args(spec.type) or (spec.type,)
        kinds += (int,) if float in kinds else ()
        good = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        _need(good, f"{spec.name} is {value!r}; it must be of type {getattr(spec.type, '__name__', spec.type)}")


def _check_positive(cfg):
    names = [*SIZES, "rope_theta", "moe_layer_freq"] + MLA_SIZES * (cfg.attention == "mla")
    for name in names + [*MOE_SIZES, "n_group", "topk_group"] * bool(cfg.n_routed_experts):
        _need((getattr(cfg, name) or 0) > 0, f"{name} is {getattr(cfg, name)}; it must be positive")
    counts = ["n_routed_experts", "n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"]
    for name in [*counts, "initializer_range"]:
        _need((getattr(cfg, name) or 0) >= 0, f"{name} is {getattr(cfg, name)}; it must be 0 or more")


def _check_baseline(cfg):
    heads, groups = cfg.num_attention_heads, cfg.kv_heads
    _need(not cfg.attention_bias, "attention_bias is True; only attention 'mla' can have biases")
    unequal = f"hidden_size {cfg.hidden_size} is not a multiple of num_attention_heads {heads}; set head_dim"
    _need(cfg.head_dim or cfg.hidden_size % heads == 0, unequal)
    unequal = f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"
    _need(groups and heads % groups == 0, f"{unequal}; each key head serves as many")
    _need(cfg.attention_head_dim % 2 == 0, f"the head's width is {cfg.attention_head_dim}; RoPE turns pairs: even")


def _check_experts(cfg):
    E, A, groups = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.n_group
    _need(A <= E, f"num_experts_per_tok {A} is more than n_routed_experts {E}")
    _need(E % groups == 0, f"n_routed_experts {E} is not a multiple of n_group {groups}")
    _need(cfg.topk_group <= groups, f"topk_group {cfg.topk_group} is more than n_group {groups}")
    reachable = cfg.topk_group * (E // groups)
    if cfg.topk_method != "greedy":
        _need(reachable >= A, f"num_experts_per_tok {A} exceeds the {reachable} experts of {cfg.topk_group} groups")
    scores, method = cfg.scoring_func, cfg.topk_method
    needed = "sigmoid" if method == "noaux_tc" else "softmax"
    _need(scores == needed, f"scoring_func is {scores!r}; topk_method {method!r} needs {needed!r}")
    alone = f"n_group {groups} leaves {E // groups} expert a group; the V3 router scores it by 2"
    _need(E // groups >= 2 or method != "noaux_tc", alone)


def _check_rope(cfg):
    yarn, kind = cfg.rope_scaling, cfg.rope_scaling.get("type")
    _need(kind == "yarn", f"rope_scaling has type {kind!r}; minids knows 'yarn', or None for plain RoPE")
    for name in YARN_SIZES:
        _need(name in yarn, f"rope_scaling has no {name!r}; YaRN needs it")
    for name, value in yarn.items():
        _need(name in ("type", *YARN_SIZES, *YARN), f"rope_scaling has {name!r}, which minids does not know")
        number = isinstance(value, int | float) and (value > 0 or (value == 0 and name in YARN))
        good = number or name == "type" or (value is None and name in YARN)
        _need(good, f"rope_scaling's {name} is {value!r}; it must be a positive number")


def _choice(cfg, name, allowed):
    _need(getattr(cfg, name) in allowed, f"{name} is {getattr(cfg, name)!r}; it must be one of {', '.join(allowed)}")


def _need(condition, message):
    if not condition:
        raise ConfigError(message)


# The hub's config.json -------------------------------------------------------------------------------------------


def _read_json(source):
    path = Path(source, "config.json") if Path(source).is_dir() else Path(source)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no {path}; give a config.json, or a folder that holds one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error})") from None
    _need(isinstance(read, dict), f"{path} holds a {type(read).__name__}; a config.json is an object of fields")
    return read


def _fields_from_hub(hub):
    kind = hub.get("model_type")
    _need(kind in SAME_ARCHITECTURE and not hub.get("index_topk"), _other_architecture(hub))
    required = SIZES + MLA_SIZES * (kind != "minids")
    required += [*MOE_SIZES, "first_k_dense_replace", "routed_scaling_factor"] * bool(hub.get("n_routed_experts"))
    missing = ", ".join(name for name in required if name not in hub)
    _need(not missing, f"the hub config lacks {missing}; is this the whole config.json?")
    for name, value in ONLY.items():
        _need(hub.get(name, value) in (value, None), f"{name} is {hub.get(name)!r}; minids computes {value!r} alone")
    own, values = {f.name for f in fields(ModelConfig)} - {"hub"}, _hub_defaults(kind)
    values |= {k: hub[k] for k in own & hub.keys() if hub[k] is not None or k in required}  # else null is the default
    if kind != "minids":
        values |= {"attention": "mla", "head_dim": 0}
    rope = hub.get("rope_parameters") or hub.get("rope_scaling")
    if isinstance(rope, dict):  # transformers 5 keeps theta and the scaling in one place
        values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
    mtp = {} if hub.get("num_mtp_layers") is None else {"num_nextn_predict_layers": hub["num_mtp_layers"]}
    return {**values, **mtp, "rope_scaling": _plain_scaling(rope)}


def _other_architecture(hub):
    """Why a config is not opened: what it is of, and what is; where such a model lies inside, how to read its sizes."""
    kind, opens = hub.get("model_type"), ", ".join(sorted(SAME_ARCHITECTURE))
    why = RELATIVES.get("deepseek_v32" if hub.get("index_topk") else kind)
    for name, inner in hub.items():
        if isinstance(inner, dict) and inner.get("model_type") in SAME_ARCHITECTURE:
            why, opens = f"a {name} beside other parts", f"{opens}; for its sizes give from_hf config[{name!r}]"
    found = [repr(kind), *(f"({name})" for name in hub.get("architectures") or []), *([f"with {why}"] if why else [])]
    return f"model_type is {' '.join(found)}; minids opens {opens}"


def _hub_defaults(kind):
    """What a key means that the hub config leaves out: the architecture's default, not that of our presets."""
    v2 = {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False, "aux_loss_alpha": 0.001}
    v3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "aux_loss_alpha": 0.0001}
    none = {"n_routed_experts": 0, "n_shared_experts": 0, "num_nextn_predict_layers": 0, "q_lora_rank": None}
    none |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "rope_theta": 10000.0}
    return {**(v2 if kind == "deepseek_v2" else v3), **none}


def _plain_scaling(rope):
    _need(rope is None or isinstance(rope, dict), f"rope_scaling is {rope!r}; give None, or YaRN's settings")
    for name in ("partial_rotary_factor", "truncate") if rope else ():  # 1 and True are as if they were not there
        _need(rope.get(name, 1) in (1, None), f"{name} of RoPE is {rope.get(name)!r}; minids computes 1 alone")
    kind = (rope or {}).get("rope_type") or (rope or {}).get("type") or "default"
    if kind == "default":
        return None
    dropped = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "truncate")
    return {"type": kind, **{k: v for k, v in rope.items() if k not in dropped}}


def _hub_rope(cfg):
    """RoPE's settings where transformers 4 looks for them (rope_theta, rope_scaling) and where 5 does."""
    scaling = cfg.rope_scaling or {"type": "default"}
    rest = {k: v for k, v in scaling.items() if k != "type"}
    parameters = {"rope_type": scaling["type"], "rope_theta": cfg.rope_theta, **rest}
    return {"rope_theta": cfg.rope_theta, "rope_scaling": cfg.rope_scaling, "rope_parameters": parameters}
