"""train: whole steps of training and their loss, beside transformers, torch.compile, Liger and cut-cross-entropy.

On a GPU, random tokens and weights, autocast to bf16 over fp32 weights; what matters most comes first:

- A step of `base` (16 sequences of 2048) and of `small` (32 of 1024): forward, backward, clipping, Muon and AdamW.
  minids: bf16; FP8 by fp8.convert, from sm_89 on; and forward and backward in one CUDA graph. transformers:
  DeepseekV3ForCausalLM with sdpa and grouped_mm; in cases of their own its layers and loss by torch.compile, each layer
  by itself, so that alike layers are compiled once. All begin with one model's weights: before any clock the logits are
  compared in fp32 (transformers' experts in its plain form there), and the losses of what is timed within a hundredth.
- Linear + cross-entropy, forward and backward in bf16: 16384 tokens, width 2048 and 32768 words; width 7168 and the
  129280 words of V3. minids: the kernel, and "torch", its chunks without one. torch: the formula, the formula compiled,
  and F.linear_cross_entropy in chunks where torch has it. Liger and cut-cross-entropy where they are installed.
- A profile of minids' step: its ten costliest kernels, under the record's key "profile".

Times are in µs; a step's form has "tokens/s" besides. "peak_bytes" is torch.cuda.max_memory_allocated: of a step with
weights and optimizers' state, of a loss above its inputs. FLOPs are accounting.train_flops_per_token, and 6·M·D·V.
transformers' step does not move the routers' biases, and has no balance loss; minids' does, and has.
"""

from functools import partial

import torch
import torch.nn.functional as F

from minids import fp8, layers
from minids.bench import gpu, harness, tables
from minids.bench.fp8 import Side, timed
from minids.bench.train_step import RATE, Graphed, Sides, Step
from minids.numerics import relative_error

ROUNDS, BF16 = 6, torch.bfloat16
STEPS = {"base": (16, 2048), "small": (32, 1024)}  # sequences and their length
LOSSES = [(16384, 2048, 32768), (16384, 7168, 129280)]  # M, D, V
TINY, TINY_LOSSES = {"tiny": (2, 16)}, [(40, 32, 257)]
CLOSE = 0.01  # the losses, in bf16 and FP8


# A step ----------------------------------------------------------------------------------------------------------


def step(device, sides_of, preset, how, rounds):
    """A step of minids in bf16 and FP8 beside transformers'; `how`, one of them by "CUDA graph" or "torch.compile"."""
    sides = sides_of(preset)
    batch, length = sides.inputs[0].shape
    skipped, own = {}, [Side("minids", "bf16", sides.minids)]
    peer = Side("transformers", "grouped_mm", sides.transformers, optional=True)
    if how == "torch.compile":
        own += [Side("transformers", "compiled", sides.compiled, optional=True)]
    elif how == "CUDA graph":
        graph = gpu.tried("CUDA graph", sides.recorded, skipped, optional=True)
        own += [peer] + ([Side("minids", "CUDA graph", lambda: graph, optional=True)] if graph else [])
    else:
        own += [Side("minids", "FP8", partial(sides.minids, fp8.convert))] * ("FP8" in precisions(device)) + [peer]

    def right(side, function):
        if not (error := relative_error(function(*sides.inputs), sides.want)) < CLOSE:
            raise harness.BenchError(f"{side.name}'s loss differs by {error:.1%}, allowed is {CLOSE:.0%}")

    name = ", ".join(filter(None, (f"step of {preset}, {batch}×{length}", how)))
    case = timed(device, name, own, sides.inputs, right, sides.work, rounds, sides.known)
    case["skipped"] |= skipped
    for form in case["forms"]:
        form["tokens/s"] = None if form["median"] is None else batch * length / form["median"] * 1e6
    case = with_peaks(device, case, sides.known, sides.inputs)
    sides.known.pop("minids CUDA graph", None)  # it holds the memory of a whole step
    return case


def precisions(device):
    """The precisions in which minids' step runs here."""
    old = device.cuda and torch.cuda.get_device_capability() < (8, 9)
    return ("bf16",) if old else ("bf16", "FP8")


def with_peaks(device, case, known, inputs):
    """The case with "peak_bytes" of each form, and a note that says rates and peaks."""
    notes = []
    for form in case["forms"]:
        name = f"{form['side']} {form['form']}".rstrip()
        form["peak_bytes"] = gpu.tried(f"peak of {name}", partial(peak, device, known[name], inputs), case["skipped"])
        said = [f"{form['tokens/s']:,.0f} tokens/s"] if form.get("tokens/s") else []
        said += [f"{form['peak_bytes'] / 1e9:.2f} GB"] if form["peak_bytes"] else []
        notes += [f"{name} {', '.join(said)}"] if said else []
    return {**case, "note": "; ".join(notes)}


def peak(device, function, inputs):
    """The most bytes that a run holds at once: above what is there, but for a step with its state; None on a CPU."""
    if not device.cuda or isinstance(function, Graphed):  # what a graph needs is held all the time
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function(*inputs)
    torch.cuda.synchronize()
    above = torch.cuda.max_memory_allocated() - before
    return above + (function.state_bytes() if isinstance(function, Step) else 0)


# The loss --------------------------------------------------------------------------------------------------------


def formula(x, weight, targets):
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def compiled_formula():
    torch._dynamo.reset()
    return torch.compile(formula, dynamic=False)


def chunked():
    options = torch.nn.LinearCrossEntropyOptions()  # torch 2.13
    return partial(F.linear_cross_entropy, options=options)


def liger():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def run(x, weight, targets):
        result = LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)
        return result[0] if isinstance(result, tuple) else result

    return run


def cut():
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def differentiated(build):
    """function(x, weight, targets) that gives the loss of `build()` and its gradients."""
    function = build()

    def run(x, weight, targets):
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = function(x, weight, targets)
        return loss.detach(), *torch.autograd.grad(loss, (x, weight))

    return run


def loss(device, M, D, V, rounds, known):
    """Linear + cross-entropy, every side compared with the formula in fp32 on a smaller case before it is timed."""
    ours = partial(partial, layers.linear_cross_entropy)
    builds = {
        ("minids", "", False): partial(ours, impl="triton"),
        ("torch", "in full", False): lambda: formula,
        ("Liger", "", True): liger,
        ("CCE", "", True): cut,
        ("minids", "torch", False): partial(ours, impl="torch"),
        ("torch", "F.linear_cross_entropy", True): chunked,
        **({("torch.compile", "", True): compiled_formula} if device.cuda else {}),
    }
    sides = [Side(*name[:2], partial(differentiated, build), name[2]) for name, build in builds.items()]

    def draw(M, D, V):
        targets = torch.randint(V, (M,), device=device.where)
        targets[::7] = -100
        normal = partial(torch.randn, device=device.where, dtype=BF16)
        return normal(M, D), normal(V, D) * D**-0.5, targets

    few = draw(160, 64, 1000) if device.cuda else draw(20, 16, 99)
    want = differentiated(lambda: formula)(few[0].float(), few[1].float(), few[2])

    def right(side, function):
        gpu.agrees(side.name, function(*few), want, BF16)

    inputs, work = draw(M, D, V), {"flops": 6 * M * D * V, "bytes": 4 * (M * D + V * D)}
    case = timed(device, f"linear + cross-entropy {M}×{D}×{V}", sides, inputs, right, work, rounds, known)
    return with_peaks(device, case, known, inputs)


# The profile -----------------------------------------------------------------------------------------------------


def profile(device, sides_of, preset, form):
    """The ten costliest kernels of minids' step in this form, and their share of a step's time."""
    sides, case = sides_of(preset), {"case": f"profile of {preset} {form}", "unit": "µs", "ratio": None}
    function = sides.known.get(f"minids {form}")
    if not isinstance(function, Step):
        return {**case, "profile": [], "summary": "not profiled", "note": function or "this step has not run before"}
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CUDA if device.cuda else kinds.CPU]) as found:
        function(*sides.inputs)
        if device.cuda:
            torch.cuda.synchronize()
    of = "self_device_time_total" if device.cuda else "self_cpu_time_total"
    events = [e for e in found.key_averages() if getattr(e, of) and not e.is_user_annotation]
    events.sort(key=lambda e: -getattr(e, of))
    total = sum(getattr(e, of) for e in events)
    rows = [{"kernel": e.key[:90], "calls": e.count, "µs": getattr(e, of)} for e in events[:10]]
    if device.clock is None:
        return {**case, "profile": [{**row, "µs": None, "share": None} for row in rows], "summary": "ran, not timed"}
    rows = [{**row, "share": row["µs"] / total} for row in rows]
    times = sorted(1e6 * device.clock(partial(function, *sides.inputs)) for _ in range(3))
    whole = dict(zip(("min", "median", "max"), times, strict=True))
    busy = f"kernels take {total:,.0f} µs, a step {whole['median']:,.0f} µs"
    return {**case, "profile": rows, "kernels": total, "step": whole, "summary": busy}


def table(outcome):
    """The timed cases as every suite shows them, and each profile below."""
    text = [tables.plain_table({**outcome, "cases": [case for case in outcome["cases"] if "best" in case]})]
    for case in outcome["cases"]:
        if "profile" in case:
            rows = [(f"{case['case']}: {case['summary']}", "calls", "µs", "share")]
            for row in case["profile"]:
                figures = ("-", "-") if row["µs"] is None else (f"{row['µs']:,.0f}", f"{row['share']:.1%}")
                rows.append((row["kernel"], str(row["calls"]), *figures))
            text += tables.columns(rows) + ([case["note"]] if case.get("note") else [])
    return "\n".join(text)


# The suite -------------------------------------------------------------------------------------------------------


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where minids' result is wrong."""
    torch.manual_seed(0)
    device, rounds, opened, known = gpu.Device(quick), 1 if quick else ROUNDS, {}, {}
    sizes, losses = (TINY, TINY_LOSSES) if quick else (STEPS, LOSSES)

    def sides_of(preset):
        if preset not in opened:
            opened.clear()  # one preset's models at a time
            opened[preset] = Sides(device, preset, *sizes[preset])
        return opened[preset]

    steps = {}
    for preset, one in zip(sizes, losses, strict=True):
        whole = partial(step, device, sides_of, preset, rounds=rounds)
        steps[f"step of {preset}"] = partial(whole, "")
        steps[f"linear + cross-entropy {one[2]}"] = partial(loss, device, *one, rounds, known)
        for form in precisions(device):
            steps[f"profile of {preset} {form}"] = partial(profile, device, sides_of, preset, form)
        for how in ("CUDA graph", "torch.compile") if device.cuda else ():  # what is compiled stays so
            steps[f"step of {preset}, {how}"] = partial(whole, how)
    settings = {"rounds": rounds, "steps": sizes, "rate": RATE, "inputs": "random, seed 0", **device.settings()}
    skipped = {} if "FP8" in precisions(device) else {"FP8": "this GPU does not multiply it (sm_89 or newer does)"}
    skipped |= {} if device.cuda else dict.fromkeys(("torch.compile", "CUDA graph"), "there is no GPU")
    return harness.gather(steps, harness.result("train", [], skipped, settings, quick, device.name), save, until)
