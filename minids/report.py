"""What a training run shows and keeps of itself: the bar, log.jsonl and the curve in loss.png."""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

FLUSH_EVERY = 10  # steps between two readings of the losses; a GPU is waited for only then


class Diverged(ValueError):
    """A loss that is no longer a number."""


class Progress:
    """A bar with bits per byte, tokens/s and MaxVio, and the same numbers as lines of log.jsonl.

    One log line holds the means over the steps since the line before. `done` steps are already trained: lines of
    later steps, which a killed run may have left, are dropped, because these steps are about to be trained again.
    """

    def __init__(self, path, steps, done, tokens_per_step, bytes_per_token):
        self.path, self.tokens_per_step = Path(path), tokens_per_step
        self.bits_per_nat = 1 / (math.log(2) * bytes_per_token)
        keep_lines(self.path, done)
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self.bar = tqdm(total=steps, initial=done, unit="step", mininterval=interval, dynamic_ncols=True)
        self.waiting, self.since, self.smooth = [], time.perf_counter(), None

    def add(self, step, cross_entropy, max_vio):
        """Count a step, after which `step` are done; cross_entropy (nats per token) and max_vio are 0-dim tensors."""
        self.waiting.append((step, cross_entropy, max_vio))
        if len(self.waiting) >= FLUSH_EVERY:
            self.flush()

    def flush(self):
        """Read what waits, write its line and move the bar; raises Diverged where the loss is not a number."""
        if not self.waiting:
            return
        count = len(self.waiting)
        bits = sum(float(entry[1]) for entry in self.waiting) / count * self.bits_per_nat
        if not math.isfinite(bits):
            raise Diverged(f"the loss is not a number at step {self.waiting[-1][0]}; begin again with a smaller --lr")
        vio = sum(float(entry[2]) for entry in self.waiting) / count
        now = time.perf_counter()
        speed = count * self.tokens_per_step / (now - self.since)
        line = {"step": self.waiting[-1][0], "bits_per_byte": bits, "tokens_per_second": speed, "max_vio": vio}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.smooth = bits if self.smooth is None else 0.8 * self.smooth + 0.2 * bits
        self.bar.set_postfix_str(f"{self.smooth:.3f} bits/byte, {speed:,.0f} tokens/s, MaxVio {vio:.2f}", refresh=False)
        self.bar.update(count)
        self.waiting, self.since = [], now

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not any(error):
            self.flush()
        self.bar.close()


def read_log(path):
    """The whole lines of a log.jsonl as dicts; a line that a kill cut short is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def keep_lines(path, done):
    """Drop from a log.jsonl the lines of steps after `done`, and a line that was cut short."""
    rows = [row for row in read_log(path) if row["step"] <= done]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def result_line(result):
    """What a training ends with: the model's bits per byte beside those of gzip and xz."""
    return "held-out bits per byte: {bits_per_byte:.2f} (gzip {gzip:.2f}, xz {xz:.2f})".format(**result)


def plot(folder, result):
    """Draw log.jsonl of `folder` into its loss.png, beside gzip, xz and the held-out `result`; say so, or why not."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: matplotlib is not installed (pip install matplotlib); the numbers are in log.jsonl")
        return
    rows = read_log(folder / "log.jsonl")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["step"] for row in rows], [row["bits_per_byte"] for row in rows], lw=1, label="training")
    for name, style in (("gzip", ":"), ("xz", "--")):
        axes.axhline(result[name], color="gray", ls=style, lw=1, label=f"{name}, held-out: {result[name]:.2f}")
    axes.plot(rows[-1]["step"] if rows else 0, result["bits_per_byte"], "o", color="C1", label="held-out")
    axes.annotate(f"{result['bits_per_byte']:.2f}", (rows[-1]["step"] if rows else 0, result["bits_per_byte"]))
    top = min(max((row["bits_per_byte"] for row in rows), default=8.0), 2 * result["gzip"])
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, max(top, 1.1 * result["bits_per_byte"])))
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)
    print(f"the curve is in {folder / 'loss.png'}")
