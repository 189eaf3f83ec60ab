"""What every model is made of: RMSNorm, RoPE with YaRN, SwiGLU, causal attention with a cache, and the loss.

RMSNorm, RoPE, SwiGLU and the loss take `impl`: "auto" runs the Triton kernel (layer_kernels.py, loss_kernels.py) on a
GPU and torch elsewhere; "triton" asks for the kernel, on a CPU in the interpreter; "torch" never takes it.

RoPE turns each pair (2i, 2i+1) of a vector by position * f_i, and leaves it in place, as hub checkpoints have it; then
the product of a query and a key depends on the distance of their positions alone. YaRN (2309.00071) stretches the slow
frequencies, which a short training never saw turn once, and leaves the fast ones: f = f/s * ramp + f * (1 - ramp).
"""

import importlib.util
import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minids.functions import BlockAttention, LinearCrossEntropy, NormOnCPU, root_mean_square


def rms_norm(x, weight, eps, impl="auto"):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32; given in the wider dtype (1910.07467)."""
    if use_kernel(impl, x, "RMSNorm"):
        return layer_kernels().rms_norm(x, weight, eps)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    fp32 = torch.promote_types(dtype, torch.float32)
    wide, weight = x.to(fp32), weight.to(fp32)
    if x.device.type != "cpu":
        out = F.rms_norm(wide, weight.shape, weight, eps)
    elif x.requires_grad:
        out = NormOnCPU.apply(wide, weight, eps)
    else:
        out = wide * (weight / root_mean_square(wide, eps))
    return out.to(dtype)


class RMSNorm(nn.Module):
    """rms_norm with a learned weight [D]; [...,D] to [...,D], in the dtype of the products that follow."""

    def __init__(self, width, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x, impl="auto"):
        """See the class."""
        return rms_norm(x, self.weight, self.eps, impl).to(product_dtype(x))


def swiglu(x, w_gate, w_up, w_down, impl="auto"):
    """down(silu(gate(x)) * up(x)); x [...,D], w_gate and w_up [W,D], w_down [D,W] to [...,D] (2002.05202)."""
    return F.linear(silu_mul(F.linear(x, w_gate), F.linear(x, w_up), impl), w_down)


def silu_mul(gate, up, impl="auto"):
    """silu(gate) * up, of one shape."""
    return layer_kernels().silu_mul(gate, up) if use_kernel(impl, gate, "SwiGLU") else F.silu(gate) * up


class SwiGLU(nn.Module):
    """The feed-forward `swiglu` with its three projections; [...,D] to [...,D], `width` inside."""

    def __init__(self, hidden, width):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x, impl="auto"):
        """See the class."""
        return self.down_proj(silu_mul(self.gate_proj(x), self.up_proj(x), impl))


def rope_tables(cfg, positions):
    """cos and sin [T,R/2] fp32 of `positions` [T]; YaRN's factor for them included (2309.00071).

    R is qk_rope_head_dim for "mla", and the whole width of a head for "mha" and "gqa".
    """
    width = cfg.qk_rope_head_dim if cfg.attention == "mla" else cfg.attention_head_dim
    scaling = tuple(sorted((cfg.rope_scaling or {}).items()))
    frequencies = inverse_frequencies(width, cfg.rope_theta, scaling, positions.device)
    angles = positions[:, None].float() * frequencies
    factor = table_factor(cfg.rope_scaling)
    return (angles.cos(), angles.sin()) if factor == 1 else (angles.cos() * factor, angles.sin() * factor)


@lru_cache(maxsize=32)
def inverse_frequencies(width, theta, scaling, device):
    """f_i = theta^(-2i/R), [R/2] fp32, stretched as YaRN says where `scaling` (its settings as pairs) is not empty."""
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
    if not scaling:
        return frequencies.float()
    yarn = dict(scaling)
    original = yarn["original_max_position_embeddings"]

    def turns_at(rotations):  # the dimension that turns so often over the original length
        return width * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_at(yarn.get("beta_fast") or 32)), 0)
    high = min(math.ceil(turns_at(yarn.get("beta_slow") or 1)), width - 1)
    index = torch.arange(width // 2, dtype=torch.float64, device=device)
    ramp = ((index - low) / (high - low or 0.001)).clamp(0, 1)
    return (frequencies / yarn["factor"] * ramp + frequencies * (1 - ramp)).float()


def mscale(factor, weight=1.0):
    """YaRN's m = 0.1 * weight * ln(factor) + 1, by which attention over a stretched context is sharpened."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def table_factor(scaling):
    """The factor of cos and sin: m(mscale) / m(mscale_all_dim), or m where a config omits either (as transformers)."""
    if not scaling:
        return 1.0
    if scaling.get("attention_factor") is not None:
        return scaling["attention_factor"]
    one, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if one and all_dim:
        return mscale(scaling["factor"], one) / mscale(scaling["factor"], all_dim)
    return mscale(scaling["factor"])


def softmax_scale(cfg):
    """The factor of the attention scores: the head's width ^ -0.5, for MLA with YaRN times m(mscale_all_dim)^2."""
    if cfg.attention != "mla":
        return cfg.attention_head_dim**-0.5
    weight = (cfg.rope_scaling or {}).get("mscale_all_dim")
    return cfg.qk_head_dim**-0.5 * (mscale(cfg.rope_scaling["factor"], weight) ** 2 if weight else 1.0)


def apply_rope(x, cos, sin, impl="auto"):
    """Turn the pairs (2i, 2i+1) of x [...,T,H,R] by cos and sin [T,R/2]; in fp32, given in x's dtype (2104.09864)."""
    if use_kernel(impl, x, "RoPE"):
        return layer_kernels().rope(x, cos, sin)
    pairs = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (-1, 2)).contiguous()
    turned = torch.view_as_complex(pairs) * torch.complex(cos, sin).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class Cache:
    """Room for `max_len` positions of a batch: tensors [B,max_len,...] of which the first `length` are filled.

    `step` of the first layer's cache is what decode.py prepares for decoding with it.
    """

    def __init__(self, batch, max_len, *shapes, dtype=torch.float32, device="cpu"):
        self.max_len, self.length, self.step = max_len, 0, None
        self.tensors = [torch.zeros(batch, max_len, *shape, dtype=dtype, device=device) for shape in shapes]

    def append(self, *new):
        """Add `new` tensors [B,T,...] after what is there; gives all that is filled, [B,S,...] each.

        Raises ValueError where they do not fit.
        """
        batch, added = new[0].shape[:2]
        end = self.length + added
        if end > self.max_len:
            raise ValueError(f"the cache holds {self.length} of {self.max_len} positions; {added} more do not fit")
        if batch != self.tensors[0].shape[0]:
            raise ValueError(f"the cache is for a batch of {self.tensors[0].shape[0]}; {batch} sequences were given")
        for tensor, piece in zip(self.tensors, new, strict=True):
            tensor[:, self.length : end] = piece
        self.length = end
        return [tensor[:, :end] for tensor in self.tensors]

    @property
    def nbytes(self):
        """Bytes of the tensors themselves, for all `max_len` positions."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def causal_attention(q, k, v, scale):
    """softmax(q k^T * scale) v, where the T queries are the last of the S positions; q [B,T,H,*], k, v [B,S,G,*].

    A kernel of our own would not pay: on Hopper cuDNN multiplies keys and narrower values as they are, at about twice
    flash's rate (pytorch#142132); elsewhere flash wants one width, and zeros behind MLA's values (128 of 192) make the
    products 1.2 times as many at most. `python -m minids.bench attention` times them all.
    """
    (B, T, H, _), S, width, more = q.shape, k.shape[1], v.shape[-1], q.shape[2] // k.shape[2]
    if q.requires_grad and q.device.type == "cpu" and T == S and B * H * T * T <= BlockAttention.ROOM:
        k, v = (t.repeat_interleave(more, 2) if more > 1 else t for t in (k, v))
        return BlockAttention.apply(q, k, v, scale)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T) if 1 < T < S else None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    options = {"attn_mask": mask, "is_causal": T == S > 1, "enable_gqa": more > 1}
    if prefers_cudnn(q.device) and options["is_causal"] and cudnn_takes(q, k, v, **options):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, scale=scale, **options).transpose(1, 2)
    if width < q.shape[-1]:  # torch's other fused attentions take q, k and v of one width only
        v = F.pad(v, (0, q.shape[-1] - width))
    return F.scaled_dot_product_attention(q, k, v, scale=scale, **options)[..., :width].transpose(1, 2)


@lru_cache
def prefers_cudnn(where):
    """Whether cuDNN's is torch's fastest attention for many queries on a device: on Hopper (transformers#48163).

    Before cuDNN 9.15.1 it is wrong for lengths that 128 does not divide (pytorch#169849).
    """
    hopper = where.type == "cuda" and torch.cuda.get_device_capability(where)[0] == 9
    return hopper and (torch.backends.cudnn.version() or 0) > 91500


def cudnn_takes(q, k, v, attn_mask, is_causal, enable_gqa):
    """Whether cuDNN has an attention for these tensors [B,H,T,*], their dtype, and their gradients where needed."""
    inputs = torch.backends.cuda.SDPAParams(q, k, v, attn_mask, 0.0, is_causal, enable_gqa)
    return torch.backends.cuda.can_use_cudnn_attention(inputs)


def linear_cross_entropy(x, weight, targets, impl="auto"):
    """See LinearCrossEntropy; the products are in autocast's dtype where it is on. x [N,D], weight [V,D]."""
    dtype, function = product_dtype(x), LinearCrossEntropy.apply
    if use_kernel(impl, x, "the loss"):
        from minids.loss_kernels import linear_cross_entropy as function
    with torch.autocast(x.device.type, enabled=False):
        return function(x, weight, targets, dtype, torch.is_grad_enabled())


def product_dtype(x):
    """The dtype in which x is multiplied: autocast's where it is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def use_kernel(impl, x, what):
    """Whether the Triton kernel of `what` runs for x: if asked for, or by "auto" on a GPU, not in fp64.

    Raises ValueError for an unknown `impl`, TritonUnavailable where the kernel is asked for and cannot run.
    """
    if impl == "torch" or (impl == "auto" and not x.is_cuda):
        return False
    if impl not in ("auto", "triton"):
        raise ValueError(f"impl is {impl!r}; it must be one of auto, torch, triton")
    from minids import triton_env  # here: it chooses how Triton runs in this process

    if impl == "auto":
        return x.dtype != torch.float64 and triton_env.compiles()
    return bool(triton_env.require(f"the kernel of {what}"))


def late_modules(package, public, *kernels):
    """__getattr__ and __dir__ of a `package` whose other modules are imported when they are asked for.

    So `import minids` works without Triton, and needs torch alone; tab completion shows `public` and the `kernels`.
    """

    def find(name):
        if name.startswith("_") or importlib.util.find_spec(f"{package}.{name}") is None:
            raise AttributeError(f"{package} has no {name!r}; it has {', '.join([*public, *kernels])}")
        return importlib.import_module(f"{package}.{name}")

    return find, lambda: [*public, *kernels]


def layer_kernels():
    """The module of that name, imported when a kernel is first used: `import minids` works without Triton."""
    from minids import layer_kernels

    return layer_kernels
