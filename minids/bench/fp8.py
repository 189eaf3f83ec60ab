"""fp8: quantisers, block-scaled products, a Linear's forward and backward, a step of training; beside bf16 and peers.

On a GPU that multiplies FP8, random numbers, scales that are powers of 2:

- quantise: 16384 tokens of 7168 in 1x128 tiles, the same with the transposed layout of Wgrad, and a weight in blocks;
  beside the formula in torch, compiled where that can be. What counts is the share of a copy's bandwidth.
- products: Fprop's and Dgrad's (tiles by blocks) and Wgrad's (tiles by tiles), both operands quantised already. minids:
  kernels.matmul_blockscaled. torch, "scaled_mm": cuBLAS by its block recipe. SGLang, where it is installed: its Triton
  kernel of Fprop. torch, "bf16": the product that FP8 has to beat.
- linear: forward and backward with all quantisation. minids: Fp8Linear. torchao, where it is installed: its blockwise
  Linear. torch, "bf16": nn.Linear.
- step: forward, backward and zero_grad of preset `small`, by fp8.convert and in bf16.

Before any clock every FP8 side is compared with the product of what was quantised, in fp32, on a smaller case; the
Linears with fp32 within what the format's rounding explains.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minids.bench import gpu, harness
from minids.config import ModelConfig
from minids.fp8 import Fp8Linear, convert, reference
from minids.model import Transformer
from minids.numerics import relative_error

ROUNDS, TOKENS, BF16 = 20, 16384, torch.bfloat16
FORMAT = 0.1  # of the largest result: how far FP8's rounding (2^-4 at most a number) takes a whole Linear
PRODUCTS = [(8192, 8192, 8192), (4096, 7168, 16384), (4096, 24576, 7168), (4096, 2048, 2048)]  # M, N, K
LINEARS = [(TOKENS, 4096, 4096), (TOKENS, 7168, 7168), (TOKENS, 2048, 2048)]


class Side(NamedTuple):
    """Who is timed: `build()` gives function(*inputs); what `optional` sides lack is said, and they are skipped."""

    side: str
    form: str
    build: Callable
    optional: bool = False

    @property
    def name(self):
        return f"{self.side} {self.form}".rstrip()


def timed(device, name, sides, inputs, right, work, rounds, known):
    """One case of `sides` on `inputs`; a side of which `right(function)` says nothing wrong is kept in `known`."""
    skipped, contenders = {}, []
    for side in sides:
        if side.name not in known:

            def checked(side=side):
                function = side.build()
                right(side, function)
                return function

            known[side.name] = gpu.tried(side.name, checked, skipped, side.optional) or skipped[side.name]
        function = known[side.name]
        if isinstance(function, str):
            skipped[side.name] = function
        elif gpu.tried(side.name, lambda function=function: (function(*inputs), True)[1], skipped, side.optional):
            run = partial(lambda function, _: function(*inputs), function)
            contenders.append(harness.Contender(side.side, side.form, run, work=work))
    return gpu.measure(device, name, contenders, rounds, skipped=skipped)


def random(*shape, where):
    return torch.randn(*shape, device=where, dtype=BF16)


# Quantisers ------------------------------------------------------------------------------------------------------


def kernels():
    from minids.fp8 import quantize_kernels

    return quantize_kernels


def in_pieces(x, both=False):
    """reference.quantize_tiles with torch's cast, as torch.compile can take it; with `both` that of x.T too."""
    tiles = x.float().unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.ceil(torch.log2((tiles.abs().amax(-1) / 448.0).clamp_min(2.0**-126))))
    codes = (tiles / scale.unsqueeze(-1)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(-2)
    return (codes, scale, *in_pieces(x.T.contiguous())) if both else (codes, scale)


def compiled(both):
    torch._dynamo.reset()
    return torch.compile(partial(in_pieces, both=both), dynamic=False)


QUANTIZERS = {  # bytes a number: read in bf16, written in E4M3, 4 for each scale
    "1x128 tiles": (2 + 1 + 4 / 128, partial(reference.quantize_tiles, power_of_2=True)),
    "1x128 and 128x1 tiles": (2 + 2 * (1 + 4 / 128), None),
    "128x128 blocks": (2 + 1 + 4 / 128**2, partial(reference.quantize_blocks, power_of_2=True)),
}


def quantise(device, what, rows, width, rounds):
    """One quantiser, bit-equal to the reference before it is timed (the formula in torch: within a step)."""
    bytes_each, want_of = QUANTIZERS[what]
    both = want_of is None
    if what == "128x128 blocks":
        sides = [Side("minids", "", lambda: partial(kernels().quantize_blocks, power_of_2=True))]
    else:
        sides = [Side("minids", "", lambda: partial(kernels().quantize_tiles, power_of_2=True, both=both))]
        sides += [Side("torch", "in pieces", lambda: partial(in_pieces, both=both))]
        sides += [Side("torch.compile", "", partial(compiled, both), optional=True)] if device.cuda else []
    few = random(256, 384, where=device.where)

    def right(side, function):
        want = want_of(few) if want_of else (*QUANTIZERS["1x128 tiles"][1](few), *QUANTIZERS["1x128 tiles"][1](few.T))
        gpu.agrees(side.name, [t.float() for t in function(few)], [t.float() for t in want], BF16)

    inputs, work = (random(rows, width, where=device.where),), {"bytes": int(bytes_each * rows * width), "flops": 0}
    return timed(device, f"quantise {rows}×{width}, {what}", sides, inputs, right, work, rounds, {})


# Products --------------------------------------------------------------------------------------------------------


def ours():
    from minids.fp8 import kernels

    return lambda x, xs, w, ws, *_: kernels.matmul_blockscaled(x, xs, w, ws, BF16)


def scaled_mm():
    recipes = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128

    def run(x, xs, w, ws, *_):  # the layouts that torch's _scaled_block1x128_... ask for
        rows = xs.T.contiguous().T
        if len(ws) == len(w):
            return F.scaled_mm(x, w.T, rows, recipes[0], ws.T.contiguous().T, recipes[0], output_dtype=BF16)
        blocks = F.pad(ws, (0, -ws.shape[1] % 4)) if ws.shape[1] % 4 else ws
        return F.scaled_mm(x, w.T, rows, recipes[0], blocks.T, recipes[1], output_dtype=BF16)

    return run


def sglang():
    from sglang.srt.layers.quantization.fp8_kernel import w8a8_block_fp8_matmul_triton as multiply

    return lambda x, xs, w, ws, *_: multiply(x, w, xs.contiguous(), ws.contiguous(), [128, 128], BF16)


def plain():
    return lambda x, xs, w, ws, x_bf16, w_bf16: x_bf16 @ w_bf16.T


def operands(M, N, K, wgrad, where):
    """x and w quantised, and in bf16: [M,K] and [N,K]; for Wgrad both in tiles."""
    x, w = random(M, K, where=where), random(N, K, where=where)
    by = kernels()
    quantize_w = by.quantize_tiles if wgrad else by.quantize_blocks
    return *by.quantize_tiles(x, power_of_2=True), *quantize_w(w, power_of_2=True), x, w


def product(device, M, N, K, wgrad, rounds, known):
    """One product; on the first case of a kind all FP8 sides are compared with reference.matmul_blockscaled."""
    sides = [Side("minids", "", ours), Side("torch", "scaled_mm", scaled_mm, optional=True)]
    sides += [] if wgrad else [Side("SGLang", "", sglang, optional=True)]
    sides += [Side("torch bf16", "", plain)]
    few = operands(256, 384, 512, wgrad, device.where)

    def right(side, function):
        want = (
            few[4].float() @ few[5].float().T if side.side == "torch bf16" else reference.matmul_blockscaled(*few[:4])
        )
        gpu.agrees(side.name, [function(*few)], [want], BF16)

    inputs = operands(M, N, K, wgrad, device.where)
    work = {"flops": 2 * M * N * K, "bytes": M * K + N * K + 2 * M * N}
    name = f"{'Wgrad' if wgrad else 'Fprop'} {M}×{N}×{K}"
    return timed(device, name, sides, inputs, right, work, rounds, known)


# Linear ----------------------------------------------------------------------------------------------------------


def linear_step(module):
    """function(x, dy, weight): forward and backward of `module` with this weight; gives dx and dW."""

    def run(x, dy, weight):
        x = x.detach().requires_grad_()
        if module.weight is not weight:
            module.weight = weight
        return torch.autograd.grad(module(x), (x, weight), dy)

    return run


def torchao():
    from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinear

    module = Float8BlockwiseLinear.from_float(nn.Linear(256, 256, bias=False, dtype=BF16, device="cuda"))
    return linear_step(module)


def linear(device, M, N, K, rounds, known):
    """Forward and backward of a Linear [N,K] on M tokens, weight in bf16, everything that is quantised included."""
    ours = partial(Fp8Linear, 1, 1, impl="auto" if device.cuda else "triton")
    sides = [Side("minids", "", lambda: linear_step(ours()))]
    sides += [Side("torchao", "blockwise", torchao, optional=True)]
    sides += [Side("torch bf16", "", lambda: linear_step(nn.Linear(1, 1, bias=False)))]

    def draw(M, N, K):
        weight = nn.Parameter(random(N, K, where=device.where) * K**-0.5)
        return random(M, K, where=device.where), random(M, N, where=device.where), weight

    few = draw(384, 256, 512)

    def right(side, function):
        for one, want in zip(function(*few), (few[1] @ few[2], few[1].T @ few[0]), strict=True):
            error = relative_error(one.float(), want.float())
            if not error < FORMAT:
                raise harness.BenchError(f"{side.name}'s gradient is off by {error:.1e}, allowed is {FORMAT:.0e}")

    work = {"flops": 6 * M * N * K, "bytes": 2 * (4 * M * K + 2 * M * N + 3 * N * K)}
    name = f"linear forward + backward {M}×{N}×{K}"
    return timed(device, name, sides, draw(M, N, K), right, work, rounds, known)


# A step ----------------------------------------------------------------------------------------------------------


def step(device, preset, batch, length, rounds):
    """Forward, backward and zero_grad of a preset, autocast to bf16 over fp32 weights, converted and not."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset(preset)).to(device.where).train()
    tokens = torch.randint(model.cfg.vocab_size, (batch, length + 1), device=device.where)

    def build(model):
        def run(inputs, targets):
            with torch.autocast(device.where.type, BF16):
                loss, nats = model.loss(inputs, targets)
            loss.backward()
            model.zero_grad()
            return nats

        return run

    inputs = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    want = build(model)(*inputs)
    sides = [
        Side("minids", "fp8", lambda: build(convert(copy.deepcopy(model)))),
        Side("minids bf16", "", lambda: build(model)),
    ]

    def right(side, function):
        if not relative_error(function(*inputs), want) < 0.01:
            raise harness.BenchError(f"{side.name}'s loss differs from bf16's by more than 1%")

    work = {"flops": 0, "bytes": 0}
    return timed(device, f"train step {preset}, {batch}×{length}", sides, inputs, right, work, rounds, {})


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where minids' result is wrong."""
    torch.manual_seed(0)
    device, rounds, steps = gpu.Device(quick), 1 if quick else ROUNDS, {}
    products, linears = ([(64, 128, 256)], [(64, 128, 256)]) if quick else (PRODUCTS, LINEARS)
    rows, width, whole = (128, 256, ("tiny", 1, 16)) if quick else (TOKENS, 7168, ("small", 16, 1024))
    for wgrad in (False, True):
        known = {}
        for M, N, K in products:
            name = f"{'Wgrad' if wgrad else 'Fprop'} {M}×{N}×{K}"
            steps[name] = partial(product, device, M, N, K, wgrad, rounds, known)
    known_linears = {}
    for M, N, K in linears:
        steps[f"linear {M}×{N}×{K}"] = partial(linear, device, M, N, K, rounds, known_linears)
    for what in QUANTIZERS:
        steps[f"quantise {what}"] = partial(quantise, device, what, rows, width, rounds)
    steps["train step"] = partial(step, device, *whole, rounds)
    settings = {"rounds": rounds, "inputs": "normal, seed 0", "scales": "powers of 2", **device.settings()}
    return harness.gather(steps, harness.result("fp8", [], {}, settings, quick, device.name), save, until)
