"""cpu: minids beside transformers' DeepseekV3ForCausalLM on the processor: training, prefill and decode.

Both sides have preset `tiny`, the same weights (saved by minids, opened by both; the logits are compared before a clock
runs) and the same random tokens. Each side is timed in all its forms and stands with its best:

- minids: fp32 and bf16.
- transformers: fp32 and bf16, attention eager and sdpa, experts eager and grouped_mm (in decode batched_mm too).

Training is forward + backward + zero_grad of a batch, without the optimizer's step, which would be the same on both
sides; minids' loss has the balance loss in it besides. bf16 means autocast over fp32 weights in training and bf16
weights in prefill and decode. Prefill and decode are one sequence in inference mode, each side with its own cache, only
the last position's logits; decode is greedy, by a bare loop over the model on both sides (transformers' own `generate`
would cost it more).

`of_roofline` is the arithmetic's share: the FLOPs that a pass takes at least, over those that a matrix product reaches
here in that dtype in the same time. Decoding has none: its few MB stay in the processor's cache, so that neither
products nor the memory bound it.
"""

import itertools
import tempfile
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from minids import accounting
from minids.bench import harness, peaks
from minids.config import ModelConfig
from minids.model import Transformer
from minids.numerics import relative_error

ROOM = 64  # positions that decode may add to a context
AGREE = 1e-5  # of the logits' scale, in fp32


@dataclass
class Sizes:
    """What is timed; `quick` makes it small enough for a test."""

    batch: int = 16
    seq_len: int = 256
    contexts: tuple = (16, 1024, 4096)
    prefill: int = 1024
    new_tokens: int = 32
    rounds: int = 5
    peaks: dict = field(default_factory=dict)  # FLOP/s of a matrix product, by dtype


QUICK = Sizes(batch=2, seq_len=16, contexts=(16, 32), prefill=16, new_tokens=2, rounds=1)


class Minids:
    """Our side of the comparison; the peer below has the same methods."""

    side = "minids"

    def __init__(self, folder):
        self.models = {form: Transformer.from_pretrained(folder, dtype=dtype) for form, dtype in DTYPES.items()}

    def forms(self, case):
        return list(DTYPES)

    def use(self, form, training=False):
        """The model of this form, its implementations chosen; bf16 training is autocast over the fp32 one."""
        return self.models["fp32" if training else form].train(training)

    def loss(self, model, inputs, targets):
        return model.loss(inputs, targets)[0]

    def forward(self, model, tokens, cache=None):
        return model(tokens, cache, last_only=cache is not None)

    def new_cache(self, model, length):
        return model.new_cache(1, length)

    def rewind(self, cache, length):
        for layer in cache:
            layer.length = length


class Transformers:
    """transformers' DeepseekV3ForCausalLM; raises ImportError where transformers is absent."""

    side = "transformers"

    def __init__(self, folder):
        from transformers import DeepseekV3ForCausalLM, DynamicCache
        from transformers.utils import logging as hf_logging

        hf_logging.set_verbosity_error()
        hf_logging.disable_progress_bar()
        self.cache_class = DynamicCache
        self.models = {form: DeepseekV3ForCausalLM.from_pretrained(folder, dtype=d) for form, d in DTYPES.items()}

    def forms(self, case):
        experts = ["eager", "grouped_mm"] + ["batched_mm"] * (case == "decode")
        return [" ".join(words) for words in itertools.product(DTYPES, ["sdpa", "eager"], experts)]

    def use(self, form, training=False):
        dtype, attention, experts = form.split()
        model = self.models["fp32" if training else dtype].train(training)
        model.set_attn_implementation(attention)
        model.set_experts_implementation(experts)
        return model

    def loss(self, model, inputs, targets):
        logits = model(inputs, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def forward(self, model, tokens, cache=None):
        if cache is None:
            return model(tokens, use_cache=False).logits
        return model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def new_cache(self, model, length):
        return self.cache_class(config=model.config)

    def rewind(self, cache, length):
        surplus = cache.get_seq_length() - length
        if surplus:
            cache.crop(-surplus)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(quick=False, save=None, until=None):
    """The result of the suite, saved after each case; raises BenchError where the two sides' logits differ."""
    sizes = QUICK if quick else Sizes()
    torch.manual_seed(0)
    cfg = ModelConfig.preset("tiny", max_position_embeddings=max(sizes.contexts) + ROOM)
    sides, skipped = open_sides(cfg)
    check_agreement(sides, cfg)
    sizes.peaks = {form: peaks.measure(dtype, size=128 if quick else 1024).flops for form, dtype in DTYPES.items()}
    settings = {**vars(sizes), "config": cfg.to_hf(), "tokens": "random, seed 0"}
    cases = {"training": partial(training, sides, cfg, sizes), "prefill": partial(prefill, sides, cfg, sizes)}
    cases |= {f"decode at {context}": partial(decode, sides, cfg, sizes, context) for context in sizes.contexts}
    return harness.gather(cases, harness.result("cpu", [], skipped, settings, quick), save, until)


def open_sides(cfg):
    """Both sides with the same random weights, by way of a checkpoint; and what was skipped, with the reason."""
    skipped = {}
    with tempfile.TemporaryDirectory() as folder:
        Transformer(cfg).save_pretrained(folder)
        sides = [Minids(folder)]
        try:
            sides.append(Transformers(folder))
        except ImportError as error:
            skipped["transformers"] = f"it cannot be imported ({error}); pip install transformers"
    return sides, skipped


@torch.inference_mode()
def check_agreement(sides, cfg):
    """Raise BenchError where a side's fp32 logits are not those of the first: then its speed says nothing."""
    tokens = torch.randint(cfg.vocab_size, (2, 64))
    logits = [side.forward(side.use(side.forms("training")[0]), tokens) for side in sides]
    for side, got in zip(sides[1:], logits[1:], strict=True):
        error = relative_error(got, logits[0])
        if not error < AGREE:
            raise harness.BenchError(f"{side.side}'s logits differ from minids' by {error:.1e}, allowed is {AGREE:.0e}")


def training(sides, cfg, sizes):
    """Forward, backward and zero_grad of one batch."""
    tokens = torch.randint(cfg.vocab_size, (sizes.batch, sizes.seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(side, form, model):
        with torch.autocast("cpu", torch.bfloat16, enabled=form.startswith("bf16")):
            loss = side.loss(model, inputs, targets)
        loss.backward()
        model.zero_grad()

    contenders = contend(sides, "training", step, lambda side, form: side.use(form, training=True))
    note = "forward + backward + zero_grad, no optimizer step"
    name = f"training {sizes.batch}×{sizes.seq_len}"
    case = harness.measure(name, contenders, inputs.numel(), sizes.rounds, note=note)
    return with_shares(case, accounting.train_flops_per_token(cfg, sizes.seq_len), sizes)


def prefill(sides, cfg, sizes):
    """A prompt into an empty cache."""
    prompt = torch.randint(cfg.vocab_size, (1, sizes.prefill))

    @torch.inference_mode()
    def prepare(side, form):
        model = side.use(form)
        return model, side.new_cache(model, sizes.prefill)

    @torch.inference_mode()
    def fill(side, form, state):
        model, cache = state
        side.forward(model, prompt, cache)

    contenders = contend(sides, "prefill", fill, prepare)
    case = harness.measure(f"prefill {sizes.prefill}", contenders, sizes.prefill, sizes.rounds)
    head = 2 * cfg.vocab_size * cfg.hidden_size * (1 - 1 / sizes.prefill)  # needed for the last position only
    return with_shares(case, accounting.train_flops_per_token(cfg, sizes.prefill) / 3 - head, sizes)


def with_shares(case, flops_per_token, sizes):
    """The case, each form with its share of what a matrix product of its dtype reaches on this machine."""
    for form in case["forms"]:
        form["of_roofline"] = form["median"] * flops_per_token / sizes.peaks[form["form"].split()[0]]
    return case


def decode(sides, cfg, sizes, context):
    """New tokens for one sequence whose cache holds `context` tokens; it is rewound before each round."""
    prompt = torch.randint(cfg.vocab_size, (1, context))
    caches = {}

    @torch.inference_mode()
    def prepare(side, form):
        model, key = side.use(form), (side.side, form.split()[0])
        if key not in caches:
            caches[key] = side.new_cache(model, context + ROOM)
            side.forward(model, prompt, caches[key])
        side.rewind(caches[key], context)
        return model, caches[key]

    @torch.inference_mode()
    def extend(side, form, state):
        model, cache = state
        tokens = prompt[:, -1:]
        for _ in range(sizes.new_tokens):
            tokens = side.forward(model, tokens, cache).argmax(-1)

    contenders = contend(sides, "decode", extend, prepare)
    return harness.measure(f"decode at {context}", contenders, sizes.new_tokens, sizes.rounds)


def contend(sides, case, run, prepare):
    """A contender for each form of each side, from functions of (side, form)."""
    return [
        harness.Contender(side.side, form, partial(run, side, form), partial(prepare, side, form))
        for side in sides
        for form in side.forms(case)
    ]
