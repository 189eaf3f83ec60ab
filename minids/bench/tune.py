"""Other sizes, warps and stages of a kernel beside those that are shipped: suites mla, moe, fp8 and layers with --tune.

Which configurations fit a GPU is known without one (tests/test_compiled.py); which is the fastest is not. A trial here
is one kernel at one shape, in the configuration that its module gives, and in a handful of others. What another one
computes is compared with what the shipped one does, in memory that was filled with NaN before; one that is wrong, or
does not fit, is skipped and named. The others are timed as in the suites, in turn and in one run.

The result is one of its own, "tune-mla" and so on. Its cases are the trials, "minids" is what is shipped, the other
sides are the changes; `ratio` is the time of the best of these over that of what is shipped, `winner` the fastest of
all. Nothing in the package changes by itself: a winner goes into its module's table by hand, and test_compiled.py says
whether it fits the other GPUs.
"""

import importlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from minids.bench import fp8, gpu, harness, layers, mla, moe
from minids.numerics import TOLERANCE

ROUNDS, BF16 = 12, torch.bfloat16


class Trial(NamedTuple):
    """One kernel at one shape: `build(where)` gives run(), which gives its results; `work` are its bytes and FLOPs.

    `changes` are {setting of the module named `home`: value}; a dict changes some entries of what a function gives.
    """

    name: str
    home: str
    build: Callable
    changes: list
    work: dict


def run(suite, quick=False, save=None, until=None):
    """The result of trying the kernels of `suite`, saved after each trial."""
    torch.manual_seed(0)
    device, rounds = gpu.Device(quick), 1 if quick else ROUNDS
    with torch.no_grad():
        steps = {trial.name: partial(case, device, trial, rounds) for trial in TRIALS[suite](quick)}
        settings = {"rounds": rounds, "inputs": "normal, seed 0", **device.settings()}
        outcome = harness.result(f"tune-{suite}", [], {}, settings, quick, device.name)
        return harness.gather(steps, outcome, save, until)


def case(device, trial, rounds):
    """One trial: what is shipped, and every change that computes the same, timed; the fastest is its `winner`."""
    module, skipped = importlib.import_module(trial.home), {}
    run = trial.build(device.where)
    with poisoned():
        want = [result.float() for result in run()]

    def timed(change, _):
        with changed(module, change):
            run()

    contenders = [harness.Contender("minids", "as shipped", partial(timed, {}), work=trial.work)]
    for change in trial.changes:

        def right(change=change):
            with poisoned(), changed(module, change):
                return same(run(), want)

        if gpu.tried(label(change), right, skipped, optional=True):
            contenders.append(harness.Contender(label(change), "", partial(timed, change), work=trial.work))
    outcome = gpu.measure(device, trial.name, contenders, rounds, skipped=skipped)
    medians = {form["side"]: form["median"] for form in outcome["forms"] if form["median"] is not None}
    if medians:
        outcome["winner"] = min(medians, key=medians.get)
        outcome["note"] = f"the fastest is {'what is shipped' if outcome['winner'] == 'minids' else outcome['winner']}"
    return outcome


def same(got, want):
    """True; raises BenchError where a result differs from the shipped configuration's by more than bf16 explains."""
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        error = ((one.float() - other).abs().max() / other.abs().max()).item()
        if not error < TOLERANCE[BF16]:
            raise harness.BenchError(f"its result {index} differs from the shipped configuration's by {error:.1e}")
    return True


def label(change):
    """A change in words: "BLOCK_N 32, num_stages 4"."""
    entries = [value if isinstance(value, dict) else {name: value} for name, value in change.items()]
    return ", ".join(f"{name} {value}" for entry in entries for name, value in entry.items())


@contextmanager
def changed(module, change):
    """Within it settings of `module` are changed, and what it remembers of them is forgotten."""
    originals = {name: getattr(module, name) for name in change}
    put(module, {name: instead(originals[name], value) for name, value in change.items()})
    try:
        yield
    finally:
        put(module, originals)


def put(module, settings):
    for name, value in settings.items():
        setattr(module, name, value)
    for value in vars(module).values() if settings else ():
        getattr(value, "cache_clear", lambda: None)()


def instead(original, value):
    """What takes a setting's place: a number, a function that gives `value`, or one whose dict has these entries."""
    if not callable(original):
        return value
    if not isinstance(value, dict):
        return lambda *_: value
    return lambda *given: {**original(*given), **value}


@contextmanager
def poisoned():
    """Within it torch fills what it allocates with NaN: a result that nobody writes is not another run's."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


# The trials ----------------------------------------------------------------------------------------------------------


def of(table, *changes):
    """Changes of what the function `table` gives."""
    return [{table: change} for change in changes]


def tile(m=None, n=None, k=None, warps=None, stages=None, **more):
    """The entries of a table of sizes that are not None."""
    entries = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages, **more}
    return {name: value for name, value in entries.items() if value is not None}


def mla_trials(quick):
    many = of("blocks", tile(n=32), tile(n=32, stages=3), tile(n=32, stages=4), {"BLOCK_H": 32, "SWAP": True})
    few = of(
        "blocks", {"BLOCK_H": 32, "num_warps": 8}, *(tile(n=n, stages=s, SWAP=False) for n, s in ((64, 2), (32, 4)))
    )
    few += of("blocks", tile(n=32, stages=5, SWAP=False), tile(n=16, stages=8, SWAP=False), tile(warps=8, SWAP=False))
    few += [{"blocks": tile(n=n, stages=stages, SWAP=False), "choose_splits": 2} for n, stages in ((64, 2), (32, 3))]
    parts = [{"choose_splits": splits} for splits in (2, 3, 4)]
    more = [{"choose_splits": splits} for splits in (8, 16, 32, 64, 128)]
    shapes = [(128, 4096, 128, many + parts), (128, 4096, 16, few + parts), (1, 32768, 128, more), (1, 32768, 16, more)]
    if quick:
        shapes = [(2, 128, 2, of("blocks", tile(n=32)) + parts[:1])]
    for B, S, H, changes in shapes:
        one = mla.Case(B, S, H, **(mla.TINY if quick else {}))

        def build(where, one=one):
            run = mla.minids(mla.Data(one, where))
            return lambda: [run()]

        yield Trial(f"decode, {one.name}", "minids.mla.kernels", build, changes, mla.latent_work(one))


def moe_trials(quick):
    wide = of(
        "blocks", tile(stages=3), tile(n=128, stages=3), tile(n=128, warps=4, stages=3), tile(m=64, n=128, warps=4)
    )
    up = of("blocks", tile(stages=3), tile(n=64), tile(n=64, warps=4, stages=3), tile(m=64, warps=4, stages=3))
    weight = of("blocks", tile(stages=4), tile(n=128, stages=4), tile(m=64, n=128, warps=4), tile(k=32, stages=6))
    narrow = of("blocks", tile(n=32), tile(n=128), tile(k=128, stages=3), tile(stages=6), tile(m=64), tile(warps=8))
    kinds = {"up": up, "down": wide, "dx": wide, "back": up, "dW": weight}
    for shape in moe.TINY if quick else moe.SHAPES[:1]:
        few = shape._replace(name=f"{shape.name}, 128 tokens", M=128)
        trials = [(shape, kind, changes) for kind, changes in kinds.items()]
        trials += [] if quick else [(few, kind, narrow) for kind in ("up", "down")]
        for of_shape, kind, changes in trials:
            build, work = partial(expert_run, of_shape, kind), expert_work(of_shape, kind)
            yield Trial(f"{kind}, {of_shape.name}", "minids.moe.kernels", build, changes[: 2 if quick else None], work)


def expert_run(shape, kind, where):
    """A function that runs the experts' kernel `kind` on tokens that are routed uniformly."""
    from minids.moe import dispatch_kernels, kernels

    (x, gates, gate_up, down), (indices,) = moe.layer(shape, "uniform").draw(shape.M, where)
    order, token, _, ends = dispatch_kernels.dispatch_plan(indices, shape.E)
    pre, act = (layers.random(shape.M * shape.A, size, where=where) for size in (2 * shape.F, shape.F))
    return {
        "up": lambda: kernels.up(x, gate_up, gates, order, ends),
        "down": lambda: [kernels.grouped_gemm(act, down, ends)],
        "dx": lambda: [kernels.grouped_gemm(pre, gate_up.transpose(1, 2), ends)],
        "back": lambda: kernels.down_backward(x, down, gates, pre, order, ends),
        "dW": lambda: [kernels.grouped_gemm_dw(x, pre, ends, x_token=token)],
    }[kind]


def expert_work(shape, kind):
    """The FLOPs of one product, or of gate's and up's, and its bytes: weights, rows read, rows written."""
    N, D, width = shape.M * shape.A, shape.D, shape.F
    both = 1 if kind in ("down", "back") else 2
    rows = {"up": shape.M * D + 3 * N * width, "back": shape.M * D + 5 * N * width, "down": N * (D + width)}
    numbers = rows.get(kind, N * 2 * width + (N if kind == "dx" else shape.M) * D) + both * shape.E * D * width
    return {"flops": 2 * both * N * D * width, "bytes": 2 * numbers}


def fp8_trials(quick):
    large = of("config", *(tile(stages=n) for n in (4, 5, 6)), tile(m=64, warps=4), tile(m=64, warps=4, stages=4))
    small = of("config", tile(stages=2), tile(stages=4), tile(m=128, warps=8))
    for M, N, K, wgrad in [(64, 128, 256, False)] if quick else [(*fp8.PRODUCTS[i], i == 3) for i in (0, 1, 2, 3)]:
        for tiles in (wgrad,) if quick else (False, True)[: 1 + (M == 8192)]:

            def build(where, sizes=(M, N, K, tiles)):
                inputs, multiply = fp8.operands(*sizes, where), fp8.ours()
                return lambda: [multiply(*inputs)]

            name = f"{'Wgrad' if tiles else 'Fprop'} {M}×{N}×{K}"
            changes, work = (small if tiles else large), {"flops": 2 * M * N * K, "bytes": M * K + N * K + 2 * M * N}
            yield Trial(name, "minids.fp8.kernels", build, changes[: 2 if quick else None], work)
    rows, width = (128, 256) if quick else (fp8.TOKENS, 7168)
    for what in list(fp8.QUANTIZERS)[1:]:

        def build(where, what=what):
            x = fp8.random(rows, width, where=where)
            options = {"transposed": True} if "blocks" in what else {"both": True}
            quantise = fp8.kernels().quantize_blocks if "blocks" in what else fp8.kernels().quantize_tiles
            return lambda: quantise(x, power_of_2=True, **options)

        work = {"flops": 0, "bytes": 4 * rows * width}  # read in bf16, written in E4M3 twice
        yield Trial(f"quantise {what}", "minids.fp8.quantize_kernels", build, [{"WARPS": 4}, {"WARPS": 16}], work)


def layer_trials(quick):
    stages = of("row_sizes", *({"STAGES": n} for n in (1, 3, 4)), {"num_warps": 8}, {"num_warps": 16})
    rows, widths = (16, (48,)) if quick else (layers.TOKENS, (7168, 2048))
    for width in widths:
        for back in (False, True):
            changes = stages + [{"BACKWARD" if back else "FORWARD": warps} for warps in (16, 32, 48, 64)]
            work = {"flops": 0, **layers.norm(width).work(rows, back)}
            name = f"RMSNorm {width} {'backward' if back else 'forward'}"
            build = partial(norm_run, rows, width, back)
            yield Trial(name, "minids.layer_kernels", build, changes[: 2 if quick else None], work)
    for layer in [layers.gate(40)] if quick else [layers.gate(18432), layers.gate(2048), layers.turn(128, 64)]:

        def build(where, layer=layer):
            inputs = [t for group in layer.draw(rows, where) for t in group]
            function = layer.sides["minids", ""](layer.formula)
            return lambda: [function(*inputs)]

        work = {"flops": 0, **layer.work(rows, False)}
        numbers = [{"NUMBERS": size} for size in ((1024,) if quick else (1024, 4096, 8192))]
        yield Trial(f"{layer.name} forward", "minids.layer_kernels", build, numbers, work)


def norm_run(rows, width, backward, where):
    from minids import layer_kernels

    x, weight, dy = layers.random(rows, width, where=where), layers.random(width, where=where), None
    if not backward:
        return lambda: layer_kernels.rms_norm_forward(x, weight, layers.EPS)
    r, dy = layer_kernels.rms_norm_forward(x, weight, layers.EPS)[1], torch.randn_like(x)
    return lambda: layer_kernels.rms_norm_backward(x, weight, r, dy)


TRIALS = {"mla": mla_trials, "moe": moe_trials, "fp8": fp8_trials, "layers": layer_trials}
