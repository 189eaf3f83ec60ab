"""Training within a notebook: any loss, for some minutes or steps, with a live curve and samples on the way.

The corpus, vocabulary, batches, optimizers and schedule are those of `python -m minids.train`; what differs is that
the model may be the learner's own code, and that nothing is written to disk.
"""

import contextlib
import math
import time
from dataclasses import dataclass, field

import torch

from minids import data, generate, optim
from minids.lab import plots
from minids.lab.budget import fast
from minids.lab.show import in_jupyter
from minids.numerics import has_fast_bf16, seed_everything
from minids.run import BIAS_RATE, CLIP, WARMUP_STEPS, WEIGHT_DECAY

BATCH, LENGTH, RATE = 16, 256, 0.01
REDRAW = 3.0  # seconds between two pictures of the curve


@dataclass
class Text:
    """What a lesson trains on: the corpus, its vocabulary, its tokens in one row."""

    corpus: object
    tokenizer: object
    tokens: torch.Tensor
    bytes_per_token: float


@dataclass
class Trained:
    """A model after training: its curve as rows of (seconds, step, bits per byte), samples as (seconds, text).

    `seconds` are those of training, without pictures and samples.
    Of a model with experts: `loads` [steps, layers, E] of each step, as multiples of the layer's mean load, and
    `max_vio` [steps], their MaxVio averaged over the layers; without experts both are empty.
    """

    model: object
    text: Text
    rows: list = field(default_factory=list)
    samples: list = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = math.nan
    balance: list = field(default_factory=list, repr=False)  # (MaxVio, loads) of each step

    @property
    def loads(self):
        return torch.stack([loads for _, loads in self.balance]) if self.balance else torch.zeros(0, 0, 0)

    @property
    def max_vio(self):
        return torch.stack([violation for violation, _ in self.balance]) if self.balance else torch.zeros(0)

    def heldout(self):
        """(nats per token, tokens, bytes) of the held-out files, by the model's own forward (two files if fast())."""
        corpus = self.text.corpus
        if fast():
            corpus = data.Corpus(corpus.name, corpus.train, corpus.heldout[:2])
        with precision():
            return data.heldout_nats(self.model, self.text.tokenizer, corpus, LENGTH, BATCH)


def precision():
    """Autocast to bfloat16 where this CPU multiplies it in hardware."""
    return torch.autocast("cpu", torch.bfloat16, has_fast_bf16(torch.device("cpu")))


def load_text(vocab_size=2048):
    """The Text of Python's standard library, its vocabulary cached."""
    corpus = data.load_corpus("stdlib")
    tokenizer = data.load_tokenizer(corpus, vocab_size)
    tokens = data.encode_files(tokenizer, corpus.train)
    return Text(corpus, tokenizer, tokens, sum(map(len, corpus.train)) / len(tokens))


def train_live(
    model,
    text,
    minutes=None,
    steps=None,
    loss=None,
    seed=0,
    rate=RATE,
    sample_at=(),
    prompt="def ",
    live=True,
    bias_rate=BIAS_RATE,
):
    """Train `model` on `text` for `minutes`, or for `steps` steps, and give a Trained.

    loss(model, inputs, targets) gives (what to differentiate, cross-entropy in nats), as Transformer.loss does, which
    it is by default. `bias_rate` is what the routers' biases move by in a step. `sample_at` are the seconds at which
    the model writes a sample that begins with `prompt`. With `live` a curve is drawn on the way, beside gzip and xz.
    Ctrl-C (interrupt) ends it early and keeps what is there.
    """
    if (minutes is None) == (steps is None):
        raise ValueError(f"minutes is {minutes} and steps is {steps}; give one of the two")
    seed_everything(seed)
    run, picture = Trained(model, text), Curve(text.corpus) if live else None
    optimizers = optim.build_optimizers(model, rate, rate, WEIGHT_DECAY)
    due, waiting, clock, step = sorted(sample_at), [], Clock(), 0
    model.train()
    with contextlib.suppress(KeyboardInterrupt):
        while (done := step / steps if steps else clock.seconds() / (60 * minutes)) < 1:
            waiting.append(one_step(run, optimizers, loss or type(model).loss, step, done, seed, rate))
            if hasattr(model, "update_expert_bias"):
                run.balance.append(model.update_expert_bias(bias_rate))
            step += 1
            if step % 10 == 0:
                with clock.paused():
                    note(run, clock, step, waiting, picture)
                    if due and clock.seconds() >= due[0]:
                        run.samples.append((due.pop(0), sample(run, prompt)))
    run.seconds = clock.seconds()
    run.tokens_per_second = step * BATCH * LENGTH / run.seconds
    note(run, clock, step, waiting, picture, last=True)
    model.eval()
    return run


class Clock:
    """Seconds of training, without those of the pauses for pictures and samples."""

    def __init__(self):
        self.began, self.stopped = time.perf_counter(), None

    def seconds(self):
        return (self.stopped or time.perf_counter()) - self.began

    @contextlib.contextmanager
    def paused(self):
        self.stopped = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - self.stopped
            self.stopped = None


def note(run, clock, step, waiting, picture, last=False):
    """Turn the losses that wait into one row of the curve, and draw it."""
    if waiting:
        bits = float(torch.stack(waiting).mean()) / math.log(2) / run.text.bytes_per_token
        run.rows.append((clock.seconds(), step, bits))
        waiting.clear()
    if picture:
        picture.draw(run.rows, last)


def one_step(run, optimizers, loss, step, done, seed, rate):
    """One step of training, `done` (0 to 1) of the way; gives the cross-entropy in nats per token, a 0-dim tensor."""
    factor = min(1.0, (step + 1) / WARMUP_STEPS) * (1 - done)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
    inputs, targets = data.batch(run.text.tokens, step, seed, BATCH, LENGTH)
    with precision():
        total, nats = loss(run.model, inputs, targets)
    total.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), CLIP)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return nats


def sample(run, prompt):
    """What the model writes after `prompt`: 60 tokens."""
    ids = torch.tensor([run.text.tokenizer.encode(prompt).ids])
    out = generate(run.model, ids, 60, temperature=0.7, top_p=0.95, seed=0)
    run.model.train()
    return run.text.tokenizer.decode(out[0].tolist())


class Curve:
    """The loss while it falls, beside gzip and xz: one picture, drawn again in its place every few seconds."""

    def __init__(self, corpus):
        self.anchors = {"gzip": corpus.gzip_bpb, "xz": corpus.xz_bpb}
        self.handle, self.drawn = None, -math.inf

    def draw(self, rows, last=False):
        """Draw the (seconds, step, bits per byte) of `rows`; where no notebook shows pictures, print a line."""
        now = time.perf_counter()
        if not rows or (now - self.drawn < REDRAW and not last):
            return
        self.drawn = now
        if not in_jupyter():
            print(f"{rows[-1][0]:4.0f} s, step {rows[-1][1]}: {rows[-1][2]:.2f} bits per byte")
            return
        fig = self.figure(rows)
        content, metadata = plots.bundle(plots.png(fig), fig, f"Training loss: {rows[-1][2]:.2f} bits per byte")
        if self.handle is None:
            from IPython.display import display

            self.handle = display(content, metadata=metadata, display_id=True, raw=True)
        else:
            self.handle.update(content, metadata=metadata, raw=True)

    def figure(self, rows):
        fig, axes = plots.figure()
        axes.plot([r[0] for r in rows], [r[2] for r in rows], marker="", label="training")
        for (name, bits), dash in zip(self.anchors.items(), (":", "--"), strict=True):
            axes.axhline(bits, color=plots.INK, linestyle=dash, linewidth=1)
            axes.annotate(f"{name} {bits:.2f}", (0, bits), xytext=(4, 3), textcoords="offset points")
        axes.set(xlabel="seconds", ylabel="bits per byte", ylim=(0.8, 3.8), xlim=(0, None))
        return fig
