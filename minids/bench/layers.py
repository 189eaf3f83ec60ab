"""layers: RMSNorm, RoPE and SwiGLU, forward and backward, beside torch and Liger, on a GPU.

32768 tokens in bf16, the widths of DeepSeek-V3 and then of V2-Lite; a layer moves bytes and multiplies next to nothing,
so what counts is its share of the bandwidth of a plain copy.

- minids: layer_kernels. torch: the formula in pieces, in fp32 inside; and F.rms_norm, and F.silu in bf16.
- torch.compile: the formula in pieces, compiled for these sizes.
- Liger, where it is installed: RMSNorm (its llama form) and SwiGLU. Its RoPE is another function (it turns i and
  i + R/2 where DeepSeek turns 2i and 2i+1; in place, queries and keys at once), so it is not timed.

Forward is as in training, what backward needs is kept. Backward is timed without the forward pass before it, and as
Liger writes its gradients over its inputs, all sides get fresh ones each round. Before any clock every side's results
and gradients are compared with fp32 on fewer rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from minids.bench import gpu, harness

TOKENS, BYTES, ROUNDS, EPS = 32768, 2, 20, 1e-6


@dataclass(frozen=True)
class Layer:
    """One layer at one size.

    `draw(rows, where)` gives what it gets a gradient for, and the rest; `formula(*both)` is its definition, `moves` how
    many tensors of its size forward and backward read and write.
    """

    name: str
    width: int
    draw: Callable
    formula: Callable
    sides: dict
    moves: tuple
    small: int = 0  # bytes of weights or tables, for each pass

    def work(self, rows, backward):
        return {"bytes": BYTES * self.moves[backward] * rows * self.width + self.small}


# The formulas ----------------------------------------------------------------------------------------------------


def rms_norm(x, weight):
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.float()).to(x.dtype)


def rope(x, cos, sin):
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def silu_mul(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def random(*shape, where):
    return torch.randn(*shape, device=where, dtype=torch.bfloat16)


def norm_inputs(width, rows, where):
    return [random(rows, width, where=where), random(width, where=where)], []


def rope_inputs(heads, R, rows, where):
    angles = torch.arange(rows, device=where)[:, None] * 10000.0 ** -(torch.arange(0, R, 2, device=where) / R)
    return [random(rows, heads, R, where=where)], [angles.cos(), angles.sin()]


def gate_inputs(width, rows, where):
    return [random(rows, width, where=where), random(rows, width, where=where)], []


# The sides: each gives a function like the formula --------------------------------------------------------------------


def kernel(name, *more):
    def build(formula):
        from minids import layer_kernels

        return lambda *inputs: getattr(layer_kernels, name)(*inputs, *more)

    return build


def plain(formula):
    return formula


def torch_norm(formula):
    return lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS)


def torch_gate(formula):
    return lambda gate, up: F.silu(gate) * up


def compiled(formula):
    torch._dynamo.reset()  # each size by itself: no kernel for sizes that may change
    return torch.compile(formula, dynamic=False)


def liger_norm(formula):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", True)


def liger_gate(formula):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def sides(own, function="", by_function=None, liger=None):
    """(side, form): how to build it, of those that a layer has; `function` is torch's own for a part of it."""
    every = {("minids", ""): own, ("torch", "in pieces"): plain, ("torch", function): by_function}
    every |= {("torch.compile", ""): compiled, ("Liger", ""): liger}
    return {key: build for key, build in every.items() if build}


def norm(width):
    own = sides(kernel("rms_norm", EPS), "F.rms_norm", torch_norm, liger_norm)
    return Layer(f"RMSNorm {width}", width, partial(norm_inputs, width), rms_norm, own, (2, 3), 2 * BYTES * width)


def turn(heads, R, tokens=TOKENS):
    draw = partial(rope_inputs, heads, R)
    return Layer(f"RoPE {heads}×{R}", heads * R, draw, rope, sides(kernel("rope")), (2, 2), 4 * tokens * R)


def gate(width):
    own = sides(kernel("silu_mul"), "F.silu", torch_gate, liger_gate)
    return Layer(f"SwiGLU {width}", width, partial(gate_inputs, width), silu_mul, own, (3, 5))


COMPILED = ("torch.compile", "FlexAttention")  # these need a GPU here, and a compiler of C++
OPTIONAL = (*COMPILED, "Liger", "transformers", "SDPA")
LAYERS = [norm(7168), gate(2048), turn(128, 64), gate(18432), norm(2048), turn(16, 64)]  # what matters most first
TINY = [norm(48), gate(40), turn(2, 8, tokens=16)]


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where a side's result is wrong."""
    skipped = {"Liger's RoPE": "it is another function: numbers i and i + R/2 turned together, in place"}
    rows = 16 if quick else TOKENS
    return both_ways("layers", TINY if quick else LAYERS, "tokens", rows, skipped, quick, save, until)


def both_ways(suite, layers, what, rows, skipped, quick, save, until):
    """The result of a suite that times `layers` forward and backward over `rows`, called `what` in its settings."""
    torch.manual_seed(0)
    device = gpu.Device(quick)
    rounds = 1 if quick else ROUNDS
    if not device.cuda:
        sides = {side for layer in layers for side, _ in layer.sides}
        skipped |= {side: "nothing is compiled without a GPU" for side in COMPILED if side in sides}
    steps = {}
    for layer in layers:
        functions = {}  # of the sides, built once for both directions
        for backward in (False, True):
            name = f"{layer.name} {'backward' if backward else 'forward'}"
            steps[name] = partial(case, device, layer, name, backward, rows, rounds, skipped, functions)
    settings = {what: rows, "rounds": rounds, "dtype": "bf16", "inputs": "normal, seed 0", **device.settings()}
    outcome = harness.result(suite, [], skipped, settings, quick, device.name)
    return harness.gather(steps, outcome, save, until)


def case(device, layer, name, backward, rows, rounds, missing, functions):
    """One layer in one direction, timed; who is `missing` is not tried, whom `functions` has was found right before."""
    skipped, contenders = {}, []
    need, free = (len(layer.sides) + 4) * layer.work(rows, backward)["bytes"], device.free()
    if need > free:
        why = f"the case needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return gpu.measure(device, name, [], rounds, skipped={"all sides": why})
    inputs = layer.draw(rows, where=device.where)
    for (side, form), build in layer.sides.items():
        label, optional = f"{side} {form}".rstrip(), side in OPTIONAL
        if side in missing:
            continue
        if label not in functions:
            functions[label] = gpu.tried(label, partial(checked, label, build, layer, device.where), skipped, optional)
        if functions[label] is None:
            continue
        one = Pass(functions[label], inputs, backward)
        if gpu.tried(label, lambda one=one: one.run(one.prepare()), skipped, optional) is not None:
            contenders.append(harness.Contender(side, form, one.run, one.prepare, layer.work(rows, backward)))
    return gpu.measure(device, name, contenders, rounds, skipped=skipped)


class Pass:
    """A function's forward or backward pass over its own copies of the inputs, which are made anew before each run."""

    def __init__(self, function, inputs, backward):
        (self.originals, self.rest), self.function, self.backward = inputs, function, backward
        self.inputs = [t.clone().requires_grad_() for t in self.originals]
        self.drawn = self.grad = None

    def prepare(self):
        with torch.no_grad():
            for mine, original in zip(self.inputs, self.originals, strict=True):
                mine.copy_(original)
        if not self.backward:
            return None
        out = self.function(*self.inputs, *self.rest)
        if self.grad is None:
            self.drawn, self.grad = torch.randn_like(out), torch.empty_like(out)
        self.grad.copy_(self.drawn)
        return out

    def run(self, out):
        if self.backward:
            return torch.autograd.grad(out, self.inputs, self.grad)
        return [self.function(*self.inputs, *self.rest)]


def checked(label, build, layer, where, rows=100):
    """The side's function, after a comparison of its results and gradients on a few rows with the formula's in fp32."""
    inputs, rest = layer.draw(rows, where=where)
    function = build(layer.formula)
    grad = torch.randn_like(layer.formula(*inputs, *rest))

    def results(function, inputs, grad):
        inputs = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*inputs, *rest)
        return [out.detach().clone(), *torch.autograd.grad(out, inputs, grad.clone())]

    want = results(layer.formula, [t.float() for t in inputs], grad.float())
    gpu.agrees(label, results(function, inputs, grad), want, torch.bfloat16)
    return function
