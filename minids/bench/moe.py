"""moe: the routed experts, forward and backward, and their grouped products, beside torch, transformers and Liger.

Shapes in bf16: DeepSeek-V2-Lite's (16384 tokens, 6 of 64 experts, 2048 -> 1408) and those of preset `small` (32768
tokens, 4 of 32, 512 -> 256). Two routings: uniform, each token's experts drawn alike; skewed, expert e with a weight of
1/(e+1), as a router without balancing tends to. MaxVio stands in each case's note.

The experts alone, without gate and shared experts, from indices and gates to the summed result:

- minids: the kernels. torch, "grouped_mm": minids' layer without Triton, two F.grouped_mm; "loop": the equations.
- transformers: DeepseekV3's experts by grouped_mm. Liger, where it is installed: its fused function of the same.

Backward is timed without the forward pass before it. The products alone stand beside F.grouped_mm: one expert's rows by
its matrix (up, down and their gradients of x), and the gradient of the weights. Before any clock each side is compared
with the fp32 equations on fewer rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.func import functional_call

from minids.bench import gpu, harness, layers
from minids.moe import Experts, reference

BYTES, ROUNDS = 2, 20
SEED = 0


class Shape(NamedTuple):
    """M tokens, A of E experts each, D hidden, F expert width."""

    name: str
    M: int
    A: int
    E: int
    D: int
    F: int


SHAPES = [Shape("V2-Lite", 16384, 6, 64, 2048, 1408), Shape("small", 32768, 4, 32, 512, 256)]
TINY = [Shape("tiny", 40, 2, 5, 32, 16)]
ROUTINGS = ("uniform", "skewed")


def choices(shape, routing, rows, where):
    """indices [rows,A]: A different experts, drawn without replacement with equal or falling weights."""
    draw = torch.Generator().manual_seed(SEED)
    weight = torch.ones(shape.E) if routing == "uniform" else 1 / torch.arange(1.0, shape.E + 1)
    noise = -torch.rand(rows, shape.E, generator=draw).clamp_min(1e-30).log()  # the least of noise / weight wins
    return (noise / weight).topk(shape.A, largest=False).indices.to(where)


def max_vio(shape, routing):
    """MaxVio of the case's routing."""
    load = choices(shape, routing, shape.M, "cpu").flatten().bincount(minlength=shape.E).float()
    return reference.max_violation(load).item()


# The experts: each side gives function(x, gates, gate_up_proj, down_proj, indices) -> [M,D] ---------------------------


def formula(x, gates, gate_up_proj, down_proj, indices):
    return reference.experts_loop(x, indices, gates, gate_up_proj, down_proj)


def ours(impl):
    def build(_):
        with torch.device("meta"):
            module = Experts(1, 1, 1)  # its weights come with each call

        def run(x, gates, gate_up_proj, down_proj, indices):
            weights = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
            return functional_call(module, weights, (x, indices, gates, impl))

        return run

    return build


def transformers_experts(shape):
    def build(_):
        from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

        cfg = v3.DeepseekV3Config(hidden_size=shape.D, moe_intermediate_size=shape.F, n_routed_experts=shape.E)
        cfg._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            module = v3.DeepseekV3MoE(cfg).experts

        def run(x, gates, gate_up_proj, down_proj, indices):
            weights = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
            return functional_call(module, weights, (x, indices, gates))

        return run

    return build


def liger(_):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(x, gates, gate_up_proj, down_proj, indices):
        return LigerFusedMoEFunction.apply(x, gate_up_proj, down_proj, indices.int(), gates)

    return run


@dataclass(frozen=True)
class Layer:
    """The routed experts at one shape and routing: what layers.case times."""

    shape: Shape
    routing: str
    sides: dict = field(default_factory=dict)
    formula: Callable = formula

    @property
    def name(self):
        return f"experts {self.shape.name}, {self.routing}"

    def draw(self, rows, where):
        """What gets a gradient (x, gates, weights), and the indices; `rows` tokens."""
        _, _, A, E, D, width = self.shape
        normal = partial(layers.random, where=where)
        weights = normal(E, 2 * width, D) * D**-0.5, normal(E, D, width) * width**-0.5
        gates = torch.rand(rows, A, device=where).softmax(-1).to(torch.bfloat16)
        return [normal(rows, D), gates, *weights], [choices(self.shape, self.routing, rows, where)]

    def work(self, rows, backward):
        """Three products of N rows, twice that in backward; weights, tokens and results once, gradients too."""
        _, _, A, E, D, width = self.shape
        numbers = 3 * E * D * width + 2 * rows * D
        return {"flops": (12 if backward else 6) * rows * A * D * width, "bytes": BYTES * numbers * (1 + backward)}


def layer(shape, routing):
    sides = {("minids", ""): ours("triton"), ("torch", "grouped_mm"): ours("torch"), ("torch", "loop"): ours("loop")}
    sides |= {("transformers", "grouped_mm"): transformers_experts(shape), ("Liger", ""): liger}
    return Layer(shape, routing, sides)


# The products --------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """One grouped product, K numbers of a row to J; with `weight` the gradient of the weights [E,J,K] instead."""

    name: str
    K: int
    J: int
    weight: bool = False


def products(shape):
    D, width = shape.D, shape.F
    yield Product("up", D, 2 * width)
    yield Product("down", width, D)
    yield Product("dW of down", width, D, weight=True)


def product_sides(product):
    """{side: function(x, other, ends)}; other is weights [E,J,K], or dy [N,J]."""
    from minids.moe import kernels

    if product.weight:
        return {
            ("minids", ""): kernels.grouped_gemm_dw,
            ("torch", "grouped_mm"): lambda x, dy, ends: F.grouped_mm(dy.T, x, offs=ends),
        }
    return {
        ("minids", ""): kernels.grouped_gemm,
        ("torch", "grouped_mm"): lambda x, w, ends: F.grouped_mm(x, w.mT, offs=ends),
    }


def product_inputs(shape, product, routing, rows, where):
    load = choices(shape, routing, rows, "cpu").flatten().bincount(minlength=shape.E)
    ends, N = load.cumsum(0).int().to(where), rows * shape.A
    x = layers.random(N, product.K, where=where)
    size = (N, product.J) if product.weight else (shape.E, product.J, product.K)
    return x, layers.random(*size, where=where) * (1 if product.weight else product.K**-0.5), ends


def product_case(device, shape, product, routing, rows, rounds):
    """One grouped product, every side compared with fp32 before it is timed."""
    equation = reference.grouped_gemm_dw if product.weight else reference.grouped_gemm
    few, skipped, contenders = product_inputs(shape, product, routing, min(rows, 100), device.where), {}, []
    want = equation(few[0].float(), few[1].float(), few[2])
    inputs = product_inputs(shape, product, routing, rows, device.where)
    numbers = inputs[0].numel() + inputs[1].numel() + (shape.E * product.J * product.K if product.weight else 0)
    numbers += 0 if product.weight else len(inputs[0]) * product.J
    work = {"flops": 2 * len(inputs[0]) * product.K * product.J, "bytes": BYTES * numbers}
    for (side, form), function in product_sides(product).items():
        label = f"{side} {form}".rstrip()

        def right(label=label, function=function):
            gpu.agrees(label, [function(*few)], [want], torch.bfloat16)
            return function(*inputs)

        if gpu.tried(label, right, skipped) is not None:
            run = partial(lambda function, _: function(*inputs), function)
            contenders.append(harness.Contender(side, form, run, work=work))
    return gpu.measure(device, f"{product.name} {shape.name}, {routing}", contenders, rounds, skipped=skipped)


# The suite -----------------------------------------------------------------------------------------------------------


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where minids' or torch's result is wrong."""
    torch.manual_seed(SEED)
    device, skipped, rounds, steps = gpu.Device(quick), {}, 1 if quick else ROUNDS, {}
    shapes = TINY if quick else SHAPES
    for shape in shapes:
        functions = {}  # of the sides, built once for both directions and routings
        for routing in ROUTINGS:
            one = layer(shape, routing)
            for backward in (False, True):
                name = f"{one.name} {'backward' if backward else 'forward'}"
                steps[name] = partial(expert_case, device, one, name, backward, rounds, skipped, functions)
        for product in products(shape):
            name = f"{product.name} {shape.name}"
            for routing in ROUTINGS:
                steps[f"{name}, {routing}"] = partial(product_case, device, shape, product, routing, shape.M, rounds)
    described = [{**shape._asdict(), **{f"MaxVio {r}": max_vio(shape, r) for r in ROUTINGS}} for shape in shapes]
    settings = {"shapes": described, "rounds": rounds, "dtype": "bf16", "inputs": "normal, seed 0", **device.settings()}
    return harness.gather(steps, harness.result("moe", [], skipped, settings, quick, device.name), save, until)


def expert_case(device, one, name, backward, rounds, skipped, functions):
    """The experts in one direction, with MaxVio as its note."""
    outcome = layers.case(device, one, name, backward, one.shape.M, rounds, skipped, functions)
    return {**outcome, "note": f"MaxVio {max_vio(one.shape, one.routing):.2f}"}
