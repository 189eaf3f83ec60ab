"""A Linear that trains in FP8, and a model converted to it (V3 section 3.3).

    forward   x in 1x128 tiles, W in 128x128 blocks                           y  = x W^T     kept: x_fp8, x_scale
    backward  dy in 1x128 tiles                                               dx = dy W
              dy in 128x1 tiles; x requantised from what was kept to 128x1    dW = dy^T x    in the master's dtype

The parameters stay as they are: masters in fp32 (or bf16), which the optimizer changes. Of x a byte a number is kept
for backward, and 4 bytes of scale for 128 of them. Linears that read one x share it: it is quantised and kept once.

Scales are powers of 2 unless asked otherwise. V3 rounded them so for three kinds of tensors only; from V3.1 on all are.
To scale is then exact. So requantising x along the other dimension changes (next to) nothing, which with amax / 448
itself is one more rounding; and bf16 holds what is emulated. It costs at most one bit of the range.

A frozen weight is E4M3 itself, beside its `weight_scale_inv` (the hub's name), one byte a number: to run, not to train.

`impl` "auto" takes the kernels on a GPU that multiplies FP8 (sm_89 or newer) and emulates elsewhere (emulate.py), which
it says once; "triton" asks for the kernels, on a CPU in the interpreter; "torch" emulates. torch.compile works around
these products: each is a break in its graph.
"""

import logging
from functools import lru_cache, partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from minids.fp8 import emulate
from minids.fp8.reference import E4M3
from minids.layers import product_dtype, use_kernel

log = logging.getLogger("minids")
BREAK = []  # what torch.compile calls for `product`, once it has
KEPT = {"lm_head", "gate", "eh_proj"}  # Linears that stay as they are: head, routers, MTP's (bf16 in V3's checkpoint)


class Product(torch.autograd.Function):
    """y = x W^T of rows x [M,K] and W [N,K], or the rows of experts up to `ends` [E] and W [E,N,K].

    `quantized` is x_fp8 and x_scale; `scale` those of a frozen W, else None; `engine` has the quantisers and products.
    """

    @staticmethod
    def forward(ctx, x, weight, scale, ends, quantized, power_of_2, engine):
        need_dx, need_dw = ctx.needs_input_grad[:2]
        if scale is None:
            w = engine.quantize_blocks(weight, power_of_2, transposed=need_dx)
        else:
            w = (weight, scale, weight.mT, scale.mT)
        kept = quantized if need_dw else (None, None)
        ctx.save_for_backward(*kept, *(w[2:] if need_dx else (None, None)), ends)
        ctx.options, ctx.dtype = (power_of_2, engine), weight.dtype
        return multiply(engine, quantized, w[:2], ends, x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_fp8, x_scale, wt_fp8, wt_scale, ends = ctx.saved_tensors
        (power_of_2, engine), dx, dw = ctx.options, None, None
        dy_tiles = engine.quantize_tiles(dy, power_of_2, both=x_fp8 is not None, ends=None if x_fp8 is None else ends)
        if wt_fp8 is not None:
            dx = multiply(engine, dy_tiles[:2], (wt_fp8, wt_scale), ends, dy.dtype)
        if x_fp8 is not None:
            key = (power_of_2, engine)
            xt = once(x_fp8, key, lambda: engine.requantize_transposed(x_fp8, x_scale, power_of_2, ends))
            if ends is None:
                dw = engine.matmul_blockscaled(*dy_tiles[2:], *xt, ctx.dtype)
            else:
                dw = engine.grouped_wgrad(*dy_tiles[2:], *xt, ends).to(ctx.dtype)
        return dx, dw, None, None, None, None, None


def multiply(engine, x, w, ends, dtype):
    """x w^T of codes and scales, or that of experts."""
    if ends is None:
        return engine.matmul_blockscaled(*x, *w, dtype)
    return engine.grouped_matmul(*x, *w, ends, dtype)


def once(tensor, key, compute):
    """compute(), kept on `tensor` until that changes or dies: Linears that read one x quantise it once."""
    key = (*key, None if tensor.is_inference() else tensor._version)
    kept = getattr(tensor, "_minids_fp8", None)
    if kept is None or kept[0] != key:
        tensor._minids_fp8 = kept = (key, compute())
    return kept[1]


def product(x, weight, scale=None, ends=None, power_of_2=True, impl="auto"):
    """x W^T in product_dtype(x), its three products in FP8: x [...,K], weight [N,K]; with `ends` [E,N,K] and x [M,K].

    `scale` holds the multipliers of a weight that is E4M3. Computed from x in fp32, fp16 or bf16 (fp64 in fp32). Raises
    ValueError for shapes and dtypes that do not fit, TritonUnavailable where kernels are asked for and cannot run.
    """
    if x.shape[-1:] != weight.shape[-1:]:
        raise ValueError(f"x is {list(x.shape)}; the weight is {list(weight.shape)} and takes [...,{weight.shape[-1]}]")
    if (scale is None) == (weight.dtype == E4M3):
        what = "without its scales" if scale is None else "beside the scales of E4M3"
        raise ValueError(f"the weight is {weight.dtype} {what}; a model kept in FP8 is not cast: load it in a dtype")
    dtype, engine = product_dtype(x), find_engine(impl, x)
    inner = torch.float32 if dtype == torch.float64 else dtype
    rows = x.to(inner).reshape(-1, x.shape[-1])
    key = (inner, power_of_2, engine)
    quantized = once(x, key, lambda: engine.quantize_tiles(rows.detach(), power_of_2))
    y = Product.apply(rows, weight, scale, ends, quantized, power_of_2, engine)
    return y.reshape(*x.shape[:-1], y.shape[-1]).to(dtype)


def outside_of_graphs(*arguments):
    """`product`, a break in the graph where torch.compile traces; that is prepared late, for it imports Triton."""
    if not torch.compiler.is_compiling():
        return product(*arguments)
    if not BREAK:
        BREAK.append(torch.compiler.disable(product))
    return BREAK[0](*arguments)


def find_engine(impl, x):
    """What quantises and multiplies for x: the kernels, or the module that emulates them; see `impl` above."""
    old = x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 9)
    if not (impl == "auto" and old) and use_kernel(impl, x, "FP8"):  # asked for on an old GPU, they say what is missing
        return kernels()
    if impl == "auto":
        say_emulated()
    return emulate


@lru_cache
def kernels():
    """The functions of the two files of kernels; they load when they are first used."""
    from minids.fp8 import kernels, quantize_kernels

    return SimpleNamespace(**{**vars(kernels), **vars(quantize_kernels)})


@lru_cache
def say_emulated():
    """Say, once in a process, that nothing gets faster here."""
    log.warning(
        "FP8 is emulated: this needs a GPU that multiplies FP8 (sm_89 or newer), and Triton. Numbers are quantised as "
        "there, then multiplied in bf16 or fp32: the results are FP8's, the speed is not."
    )


class Fp8Linear(nn.Linear):
    """nn.Linear whose three products are FP8: x [...,K] to [...,N] in product_dtype(x); see help(minids.fp8.layer).

    Sizes need not be multiples of 128: a last tile has fewer numbers. Raises what `product` raises.
    """

    def __init__(self, in_features, out_features, bias=False, power_of_2=True, impl="auto", **options):
        super().__init__(in_features, out_features, bias, **options)
        become_fp8(self, power_of_2, impl)

    def forward(self, x):
        """See the class."""
        y = outside_of_graphs(x, self.weight, self.weight_scale_inv, None, self.power_of_2, self.impl)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantized(self):
        """The weight [N,K] that is multiplied, quantised and back, where it is used by itself (MLA's absorbed form).

        The gradient goes to the master as it is.
        """
        weight, scale, engine = self.weight, self.weight_scale_inv, find_engine(self.impl, self.weight)
        if scale is not None:
            return engine.dequantize_blocks(weight, scale, torch.float32)
        rounded = engine.dequantize_blocks(*engine.quantize_blocks(weight.detach(), self.power_of_2), weight.dtype)
        return weight + (rounded - weight).detach()  # exact: rounded is 0 or within a factor of 2 (Sterbenz)


def become_fp8(module, power_of_2, impl):
    """Make an nn.Linear an Fp8Linear, which keeps its parameters and hooks."""
    module.__class__, module.power_of_2, module.impl = Fp8Linear, power_of_2, impl
    if "weight_scale_inv" not in module._parameters:
        module.register_parameter("weight_scale_inv", None)


def grouped_linear(rows, weight, ends, scale=None, power_of_2=True, impl="auto"):
    """y [N,J] = W_e x for the rows [N,K] of each expert e, up to ends[e]; weight [E,J,K]; all products in FP8.

    The 128x1 tiles of the weight gradient begin anew at each expert's first row. Raises what `product` raises.
    """
    return outside_of_graphs(rows, weight, scale, ends, power_of_2, impl)


def convert(model, power_of_2=True, impl="auto"):
    """Make every Linear of attention and feed-forward FP8, and every Experts' products; in place, gives `model`.

    The Parameter objects stay. What stays as it is: embedding, norms, routers, and Linears called as in KEPT.
    However small a layer is, it is converted. Raises ValueError where there is nothing to convert.
    """
    found = 0
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Fp8Linear) and name.rpartition(".")[2] not in KEPT:
            become_fp8(module, power_of_2, impl)
        elif hasattr(module, "grouped_product"):
            module.grouped_product = partial(grouped_linear, power_of_2=power_of_2, impl=impl)
        else:
            continue
        found += 1
    if not found:
        kept = ", ".join(sorted(KEPT))
        raise ValueError(f"{type(model).__name__} has no nn.Linear or Experts to convert ({kept} stay as they are)")
    return model
