"""ladder: dense MHA, GQA, MLA, MLA with experts, then FP8: what each rung buys on the same text.

Five models of one preset, in one run: `tiny` on Python's standard library on a processor, `small` on all installed
packages on a GPU. They have the same layers, width and vocabulary and about the same active parameters: the dense ones
get a SwiGLU as wide as that takes. GQA has the fewest groups whose cache is not smaller than MLA's. FP8 is multiplied
by a GPU that can, and emulated elsewhere, which shows its error and not its speed.

- Speed: a training step (with the optimizers' step), decoding of one sequence at several contexts; the rungs in turns.
  All decode through their modules; the shorter path of decode.py, which only MLA has, is measured in suite cpu.
- Peak memory of a training step, and the cache's bytes per token.
- Loss: held-out bits per byte (of the first files of the held-out text, see settings), the same batches for all rungs,
  once after equal seconds, once after equal FLOPs (accounting.train_flops_per_token). Seconds become steps by the
  measured speed; the FLOPs are those that the slowest rung has done in that time. An emulated rung has no time that
  says anything, so it is trained to equal FLOPs alone. The rate is constant, and falls to zero over the last 30% of
  the steps: the shorter run is a branch of the longer one.

A rung pays where it is better than the one before it with every seed.
"""

import itertools
import math
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial

import torch

from minids import accounting
from minids.bench import harness
from minids.bench.ladder_report import conditions, draw, table, verdicts
from minids.bench.ladder_rungs import DECAY, Learner, Rung, Text, rungs
from minids.numerics import has_fast_bf16
from minids.train import DEFAULTS

__all__ = ["Rung", "conditions", "draw", "run", "rungs", "table", "verdicts"]

ROOM = 64  # positions that decoding may add to a context
MINUTES = 10.0  # of the whole run, where none are given
LEAST = 5.0  # seconds of a training; a shorter one says nothing
SLACK = 0.95  # of the time that is left: what the trainings are planned to take


@dataclass
class Sizes:
    """What is run; `quick` makes it small enough for a test."""

    preset: str
    data: str
    seeds: int
    contexts: tuple
    batch_size: int
    seq_len: int
    lr: float
    new_tokens: int = 16
    rounds: int = 5
    heldout_bytes: int = 2**17


def sizes_for(device, quick):
    """The Sizes for this device: `small` with one seed on a GPU, `tiny` with three on a processor."""
    if quick:
        return Sizes("tiny", "stdlib", 2, (16, 32), 4, 64, 0.01, new_tokens=2, rounds=1, heldout_bytes=1)
    if device == "cuda":
        return Sizes("small", "installed", 1, (1024, 4096, 16384), **DEFAULTS["small"], heldout_bytes=2**21)
    return Sizes("tiny", "stdlib", 3, (16, 1024, 4096), **DEFAULTS["tiny"])


# The run ---------------------------------------------------------------------------------------------------------


def run(quick=False, save=None, until=None):
    """The result of the suite, a case for each rung, saved after each training; `until` (monotonic) ends it."""
    until = until or time.monotonic() + 60 * MINUTES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = sizes_for(device, quick)
    text = Text(sizes, device)
    models = rungs(sizes.preset, max(sizes.contexts) + ROOM)
    cases = [facts(name, rung, sizes.seq_len, emulated=rung.fp8 and device == "cpu") for name, rung in models.items()]
    settings = {**asdict(sizes), "device": device, "bf16": has_fast_bf16(torch.device(device)), **text.settings()}
    settings["configs"] = {name: rung.cfg.to_hf() for name, rung in models.items()}
    name = torch.cuda.get_device_name() if device == "cuda" else None
    outcome = harness.result("ladder", cases, {}, settings, quick, name)
    outcome["complete"] = False
    save = save or (lambda outcome: None)
    for measure in (training_speed, decoding_speed, peak_memory):
        measure(models, text, sizes, outcome)
        save(outcome)
    seconds, patience = SLACK * (until - time.monotonic()), 1.5
    if quick:
        seconds, patience = 1.0, math.inf
    train_all(models, text, sizes, outcome, save, seconds, patience)
    return outcome


def facts(name, rung, seq_len, emulated):
    """What arithmetic says of a rung; the FLOPs are of training, the cache is in bf16."""
    total, active = accounting.parameters(rung.cfg)
    found = {"case": name, "unit": "bits/byte", "parameters": total, "active": active, "emulated": emulated}
    found["flops_per_token"] = accounting.train_flops_per_token(rung.cfg, seq_len)
    return found | {"cache_bytes_per_token": accounting.kv_bytes_per_token(rung.cfg, torch.bfloat16)}


# Speed and memory ------------------------------------------------------------------------------------------------


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turns(case, amount, sizes, build, models, skipped):
    """{rung: {"median", "min", "max"}} in `amount` units a second, of the contender that `build(name)` makes of each.

    On a processor, which drifts, the rungs take turns. On a GPU each has the memory for itself; who does not fit into
    it gets a line in `skipped`.
    """
    clock, figures = partial(harness.wall_clock, synchronize=synchronize), {}
    for names in [[name] for name in models] if torch.cuda.is_available() else [list(models)]:
        try:
            contenders = [harness.Contender("minids", name, *build(name)) for name in names]
            forms = harness.measure(case, contenders, amount, sizes.rounds, clock=clock)["forms"]
        except torch.OutOfMemoryError:
            skipped[f"{names[0]}, {case}"] = "it ran out of the GPU's memory"
            continue
        figures |= {form["form"]: {key: form[key] for key in ("median", "min", "max")} for form in forms}
    return figures


def training_speed(models, text, sizes, outcome):
    """Tokens/s of a whole training step."""

    def build(name):
        learner = Learner(models[name], text, 0)
        return (lambda _: learner.step(),)

    amount = sizes.batch_size * sizes.seq_len
    figures = in_turns("training", amount, sizes, build, models, outcome["skipped"])
    for case in outcome["cases"]:
        case["train_tokens_per_s"] = figures.get(case["case"])


def decoding_speed(models, text, sizes, outcome):
    """Tokens/s of greedy decoding of one sequence with its cache, at each context."""
    for case in outcome["cases"]:
        case["decode_tokens_per_s"] = {}
    for context in sizes.contexts:

        def build(name, context=context):
            decoder = Decoder(Learner(models[name], text, 0).model, context, text)
            return partial(decoder.extend, sizes.new_tokens), decoder.rewind

        what = f"decoding at {context}"
        figures = in_turns(what, sizes.new_tokens, sizes, build, models, outcome["skipped"])
        for case in outcome["cases"]:
            case["decode_tokens_per_s"][str(context)] = figures.get(case["case"])


class Decoder:
    """A model whose cache holds `context` tokens, to which new ones are added again and again."""

    def __init__(self, model, context, text):
        self.context = context
        self.model = model.eval().to(torch.bfloat16 if text.device == "cuda" else torch.float32)
        model.register_forward_hook(lambda *_: None)  # hooked, none takes the flat step of decode.py that MLA alone has
        self.prompt = torch.randint(model.cfg.vocab_size, (1, context), device=text.device)
        self.cache = model.new_cache(1, context + ROOM)
        with torch.inference_mode():
            model(self.prompt, self.cache, last_only=True)

    def rewind(self):
        for layer in self.cache:
            layer.length = self.context

    @torch.inference_mode()
    def extend(self, new_tokens, _):
        tokens = self.prompt[:, -1:]
        for _ in range(new_tokens):
            tokens = self.model(tokens, self.cache, last_only=True).argmax(-1)


def peak_memory(models, text, sizes, outcome):
    """Bytes at the peak of a training step: weights, gradients, optimizers' state and activations."""
    for case in outcome["cases"]:
        try:
            learner = Learner(models[case["case"]], text, 0)
            learner.step()  # the optimizers' state is there from now on
            case["peak_bytes"] = peak_bytes(learner)
        except torch.OutOfMemoryError:
            outcome["skipped"][f"{case['case']}, peak memory"] = "it ran out of the GPU's memory"


def peak_bytes(learner):
    """Of one step: by torch's memory tracker on a processor, by the allocator on a GPU."""
    if learner.text.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        learner.step()
        return torch.cuda.max_memory_allocated()
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker.track_external(learner.model, *learner.optimizers)
    with tracker:
        learner.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


# Loss at equal time and at equal FLOPs --------------------------------------------------------------------------------


def plan(cases, sizes, seconds, evaluations):
    """({rung: steps at equal time}, {rung: steps at equal FLOPs}, seconds of one training) for `seconds` in all.

    `evaluations` {rung: seconds of one} are part of them. The FLOPs are those of the rung that does the fewest in its
    time; a rung that is emulated has no time of its own, and comes to those FLOPs however long it takes.
    """
    tokens = sizes.batch_size * sizes.seq_len
    step = {case["case"]: tokens / case["train_tokens_per_s"]["median"] for case in cases}
    flops = {case["case"]: tokens * case["flops_per_token"] for case in cases}
    clocked = [case["case"] for case in cases if not case["emulated"]]
    slowest = min(flops[name] / step[name] for name in clocked)
    shares = {name: slowest * step[name] / flops[name] for name in step}  # of the time, until the FLOPs are done
    costs = [1 + DECAY * share if name in clocked else share for name, share in shares.items()]
    evaluation = sizes.seeds * sum(evaluations[name] * (1 + (name in clocked)) for name in step)
    each = max(0.0, seconds - evaluation) / (sizes.seeds * sum(costs))
    by_time = {name: max(2, int(each / step[name])) for name in clocked}
    by_flops = {name: max(1, min(int(each * slowest / flops[name]), by_time.get(name, 10**9))) for name in step}
    return by_time, by_flops, each


def train_all(models, text, sizes, outcome, save, seconds, patience):
    """Train every rung with every seed, seed after seed, in some `seconds`; what is measured goes into the cases.

    A machine that has become slower may take `patience` times as long; what is not begun by then is skipped.
    """
    cases, began = [case for case in outcome["cases"] if case["train_tokens_per_s"]], time.monotonic()
    evaluations = {
        case["case"]: text.evaluation_seconds(Learner(models[case["case"]], text, 0).model) for case in cases
    }
    by_time, by_flops, each = plan(cases, sizes, seconds, evaluations)
    outcome["settings"]["seconds_each"] = each
    if each < LEAST and patience < math.inf:
        outcome["skipped"]["all trainings"] = f"the time given (--minutes) leaves {each:.0f} s for each; give more"
        return
    for case in cases:
        for kind, steps in (("equal_time", by_time), ("equal_flops", by_flops)):
            case[kind] = {"steps": steps.get(case["case"]), "bits_per_byte": [], "seconds": []}
    for seed, case in itertools.product(range(sizes.seeds), cases):
        if time.monotonic() - began > patience * seconds:
            outcome["skipped"][f"{case['case']}, seed {seed}"] = "the time given (--minutes) was over"
            continue
        try:
            train_one(Learner(models[case["case"]], text, seed), case)
        except torch.OutOfMemoryError:
            outcome["skipped"][f"{case['case']}, seed {seed}"] = "it ran out of the GPU's memory"
        save(outcome)
    outcome["complete"] = all("--minutes" not in reason for reason in outcome["skipped"].values())


def train_one(learner, case):
    """Train one rung to both ends, each a branch of one training that leaves it where the rate begins to fall."""
    seconds, ends = 0.0, {}
    for kind in ("equal_flops", "equal_time"):
        steps = case[kind]["steps"]
        if steps is None:
            continue
        if steps not in ends:
            decay = int(DECAY * steps)
            seconds += timed(learner.train_to, steps - decay)
            one = learner.branch()
            falling = timed(one.train_to, steps, decay)
            ends[steps] = seconds + falling, learner.text.bits_per_byte(one.model)
        for key, value in zip(("seconds", "bits_per_byte"), ends[steps], strict=True):
            case[kind][key].append(value)
    case["summary"] = f"{statistics.mean(case['equal_flops']['bits_per_byte']):.3f} bits/byte at equal FLOPs"


def timed(function, *arguments):
    return harness.wall_clock(lambda: function(*arguments), synchronize)
