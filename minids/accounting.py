"""Parameters, KV-cache bytes and FLOPs from a configuration alone, and what they take at best on a GPU by name.

No weight is allocated. Conventions, chosen so that the published figures come out:
- parameters: without MTP modules, with the router's biases. `active` leaves out the routed experts that a token does
  not visit, and the input embedding (a look-up multiplies nothing) unless the head is tied to it: V3's "37B" is 36.63
  billion. With the embedding it is `active_with_embedding`.
- training FLOPs: 6 per active parameter, and 3 passes of attention over a causal window (half of S) at 2 FLOPs per
  multiply-add for scores and values, in the expanded form (DeepSeek-V3 at the ISCA conference, table 2).
"""

from typing import NamedTuple

import torch

from minids.config import ModelConfig
from minids.presets import PRESETS, PUBLISHED_DENSE


def published(name):
    """The ModelConfig of a preset, or of a dense model by others (sizes alone); raises ValueError with the names."""
    models = {**PRESETS, **PUBLISHED_DENSE}
    if name not in models:
        raise ValueError(f"no model {name!r}; the tables have {', '.join(models)}")
    return ModelConfig(**models[name])


class Parameters(NamedTuple):
    """Number of parameters: all of them, and those that one token's forward pass multiplies with."""

    total: int
    active: int


def parameters(cfg):
    """Total and active parameters of `cfg`, without MTP modules."""
    layers = [block_parameters(cfg, index) for index in range(cfg.num_hidden_layers)]
    total, active = (cfg.hidden_size + sum(part) for part in zip(*layers, strict=True))  # with the final norm
    table = cfg.vocab_size * cfg.hidden_size
    return Parameters(total + (1 if cfg.tie_word_embeddings else 2) * table, active + table)


def active_with_embedding(cfg):
    """Active parameters with the input embedding among them: V3's 37.55 billion (its "37B" fits the count without)."""
    return parameters(cfg).active + (0 if cfg.tie_word_embeddings else cfg.vocab_size * cfg.hidden_size)


def mtp_parameters(cfg):
    """Total and active parameters of all MTP modules; embedding and head are the model's own (V3 section 2.2)."""
    D, L = cfg.hidden_size, cfg.num_hidden_layers
    blocks = [block_parameters(cfg, L + index) for index in range(cfg.num_nextn_predict_layers)]
    glue = len(blocks) * (2 * D * D + 3 * D)  # eh_proj, and the norms enorm, hnorm, shared_head.norm
    return Parameters(*(glue + sum(block[kind] for block in blocks) for kind in range(2)))


def block_parameters(cfg, index):
    """Total and active parameters of layer `index`: two norms, attention, and experts or a dense feed-forward."""
    shared, dense = attention_parameters(cfg) + 2 * cfg.hidden_size, 3 * cfg.hidden_size * cfg.intermediate_size
    layer = moe_parameters(cfg) if cfg.is_moe_layer(index) else Parameters(dense, dense)
    return Parameters(shared + layer.total, shared + layer.active)


def moe_parameters(cfg):
    """Total and active parameters of one MoE layer: router with its bias, shared and routed experts (V3 eq. 12)."""
    expert = 3 * cfg.hidden_size * cfg.moe_intermediate_size
    bias = cfg.n_routed_experts if cfg.topk_method == "noaux_tc" else 0
    always = cfg.n_routed_experts * cfg.hidden_size + bias + cfg.n_shared_experts * expert
    return Parameters(always + cfg.n_routed_experts * expert, always + cfg.num_experts_per_tok * expert)


def attention_parameters(cfg):
    """Parameters of one attention layer, its inner norms and biases included."""
    D, H = cfg.hidden_size, cfg.num_attention_heads
    if cfg.attention != "mla":
        return 2 * D * (H + cfg.kv_heads) * cfg.attention_head_dim
    C, Q, R = cfg.kv_lora_rank, cfg.q_lora_rank, cfg.qk_rope_head_dim
    query = Q * (D + 1 + H * cfg.qk_head_dim) if Q else D * H * cfg.qk_head_dim
    latent = D * (C + R) + C + C * H * (cfg.qk_nope_head_dim + cfg.v_head_dim)
    biases = (Q or 0) + C + R + D if cfg.attention_bias else 0
    return query + latent + H * cfg.v_head_dim * D + biases


def kv_elements_per_token(cfg):
    """Numbers that the cache keeps for one token, over all layers: C+R each with MLA (V2 table 1), else K and V."""
    if cfg.attention == "mla":
        return cfg.num_hidden_layers * (cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    return cfg.num_hidden_layers * 2 * cfg.kv_heads * cfg.attention_head_dim


def kv_bytes_per_token(cfg, dtype=torch.bfloat16):
    """Bytes that the cache keeps for one token, over all layers, in `dtype`."""
    return kv_elements_per_token(cfg) * dtype.itemsize


def train_flops_per_token(cfg, seq_len=4096):
    """Training FLOPs per token at `seq_len`: 6·N(active, with the head) + 3·L·H·(n+r+v)·S, causal."""
    widths = cfg.qk_head_dim + cfg.v_head_dim if cfg.attention == "mla" else 2 * cfg.attention_head_dim
    attention = 3 * cfg.num_hidden_layers * cfg.num_attention_heads * widths * seq_len
    return 6 * parameters(cfg).active + attention


# --- One step of decoding ------------------------------------------------------------------------------------------


def experts_touched(cfg, batch):
    """Different experts of a layer that `batch` tokens visit on average, E (1 - (1 - A/E)^B), if they choose alone."""
    E = cfg.n_routed_experts
    return E * (1 - (1 - cfg.num_experts_per_tok / E) ** batch) if E else 0.0


def decode_bytes(cfg, batch, context, weight_bytes=2, cache_bytes=2):
    """Bytes that a step of decoding reads for `batch` sequences of `context` tokens: (weights, caches).

    A weight is read once for the whole batch, of a routed expert only if a token visits it; a cache by its sequence.
    """
    experts = sum(map(cfg.is_moe_layer, range(cfg.num_hidden_layers)))
    idle = experts_touched(cfg, batch) - cfg.num_experts_per_tok  # beside the A that `active` counts; may be 0
    others = experts * idle * 3 * cfg.hidden_size * cfg.moe_intermediate_size if experts else 0
    weights = weight_bytes * (parameters(cfg).active + others)
    return weights, cache_bytes * batch * context * kv_elements_per_token(cfg)


def decode_flops(cfg, batch, context):
    """FLOPs of a step of decoding: 2 per active parameter and token, and attention over the cache (MLA's absorbed)."""
    L, H = cfg.num_hidden_layers, cfg.num_attention_heads
    widths = 2 * cfg.kv_lora_rank + cfg.qk_rope_head_dim if cfg.attention == "mla" else 2 * cfg.attention_head_dim
    return 2 * batch * (parameters(cfg).active + L * H * widths * context)


def decode_seconds(cfg, batch, context, gpu="H200", gpus=1, weight_bytes=2, dtype=torch.bfloat16):
    """Seconds that a step takes at least on `gpus` of one kind that share bytes and FLOPs evenly and send nothing.

    The cache is in 2 bytes, products in `dtype`. Raises ValueError as `roofline_seconds` does.
    """
    nbytes = sum(decode_bytes(cfg, batch, context, weight_bytes))
    return roofline_seconds(decode_flops(cfg, batch, context) / gpus, nbytes / gpus, gpu, dtype)


# --- GPUs: what a kernel's bytes and FLOPs cost at best ---------------------------------------------------------------


class Gpu(NamedTuple):
    """One GPU's published peaks: bytes/s, dense FLOP/s per dtype, bytes of memory, and who says so."""

    bandwidth: float
    flops: dict
    memory: float
    source: str


def _gpu(bandwidth, memory, source, fp32, half, fp8=None):
    """A Gpu from TB/s, GB and TFLOP/s; `half` is for bf16 and fp16, sums in fp32; `fp32` is without tensor cores."""
    tera = {torch.float32: fp32, torch.float16: half, torch.bfloat16: half}
    if fp8:
        tera |= {torch.float8_e4m3fn: fp8, torch.float8_e5m2: fp8}
    return Gpu(bandwidth * 1e12, {dtype: value * 1e12 for dtype, value in tera.items()}, memory * 1e9, source)


GPUS = {
    "H100": _gpu(3.35, 80, "NVIDIA's H100 datasheet, SXM; its sparse figures halved", 67, 989.5, 1979),
    "H200": _gpu(4.8, 141, "NVIDIA's H200 datasheet, SXM; its sparse figures halved", 67, 989.5, 1979),
    "H800": _gpu(3.35, 80, "the H100's; NVLink and fp64 are cut (DeepSeek-V3 at ISCA)", 67, 989.5, 1979),
    "A100": _gpu(2.039, 80, "NVIDIA's A100 80GB datasheet, SXM", 19.5, 312),
    "RTX 4090": _gpu(1.008, 24, "NVIDIA's Ada whitepaper, appendix A; sums in fp32", 82.6, 165.2, 330.3),
    "RTX 4060 Laptop": _gpu(0.256, 8, "24 of the 4090's SMs at 2.37 GHz, the highest boost clock", 14.6, 29.1, 58.2),
}


def roofline_seconds(flops, bytes, gpu="H200", dtype=torch.bfloat16):
    """Seconds that `flops` in `dtype` and `bytes` of traffic take at least on `gpu`: the longer of the two.

    Raises ValueError for a GPU that is not in GPUS, and for a dtype that it does not multiply.
    """
    return max(bytes / gpu_named(gpu).bandwidth, flops / peak(gpu, dtype))


def ridge(gpu="H200", dtype=torch.bfloat16):
    """FLOPs per byte from which on `gpu` is busy multiplying in `dtype`, and no longer waiting for memory."""
    return peak(gpu, dtype) / gpu_named(gpu).bandwidth


def peak(gpu, dtype):
    """FLOP/s that `gpu` reaches in `dtype` at most, dense; raises ValueError where it has no such unit."""
    flops = gpu_named(gpu).flops
    if dtype not in flops:
        raise ValueError(f"{gpu} does not multiply {dtype}; it has {', '.join(map(str, flops))}")
    return flops[dtype]


def gpu_named(name):
    """The Gpu called `name`; raises ValueError with the names there are."""
    if name not in GPUS:
        raise ValueError(f"no GPU {name!r}; the table has {', '.join(GPUS)}")
    return GPUS[name]


# --- Hours and dollars ----------------------------------------------------------------------------------------------


def mfu(flops_per_token, tokens_per_second, gpu="H800", dtype=torch.bfloat16):
    """Model FLOPs utilisation: the share of one GPU's peak that `tokens_per_second` on it amount to."""
    return flops_per_token * tokens_per_second / peak(gpu, dtype)


def gpu_hours(flops, utilisation, gpu="H800", dtype=torch.bfloat16):
    """Hours of one GPU that `flops` take at a utilisation (MFU) between 0 and 1; raises ValueError for another."""
    if not 0 < utilisation <= 1:
        raise ValueError(f"the utilisation is {utilisation}; give the share of the peak, above 0 and at most 1")
    return flops / (utilisation * peak(gpu, dtype)) / 3600


def dollars_per_million(tokens_per_second, price_per_hour, gpus=1):
    """Dollars that a million tokens cost at a price per GPU-hour, where `gpus` together make `tokens_per_second`."""
    return 1e6 * gpus * price_per_hour / (3600 * tokens_per_second)
