"""What a training run shows and keeps of itself: the bar, log.jsonl, and in loss.png the curve and the balance."""

import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from minids.files import replace_file

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

    def add(self, step, cross_entropy, max_vio, loads):
        """Count a step, after which `step` are done; cross_entropy (nats per token) and max_vio are 0-dim tensors.

        loads [layers,E] are multiples of the layer's mean load.
        """
        self.waiting.append((step, cross_entropy, max_vio, loads))
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
        loads = torch.stack([entry[3] for entry in self.waiting]).mean(0)
        if loads.numel():
            line["loads"] = [[round(load, 3) for load in layer] for layer in loads.tolist()]
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
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    replace_file(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def result_line(result):
    """What a training ends with: the model's bits per byte beside those of gzip and xz."""
    return "held-out bits per byte: {bits_per_byte:.2f} (gzip {gzip:.2f}, xz {xz:.2f})".format(**result)


def last_max_vio(folder, steps=100):
    """The mean MaxVio of the lines of the last `steps` steps in log.jsonl of `folder`, NaN without a line."""
    rows = read_log(folder / "log.jsonl")
    last = [row["max_vio"] for row in rows if row["step"] > rows[-1]["step"] - steps]
    return sum(last) / len(last) if last else math.nan


def plot(folder, result):
    """Draw log.jsonl of `folder` into its loss.png: the curve beside gzip, xz and the held-out `result`, and balance.

    Says where it is, or why there is none.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: matplotlib is not installed (pip install matplotlib); the numbers are in log.jsonl")
        return
    rows = read_log(folder / "log.jsonl")
    layers = max((len(row["loads"]) for row in rows if "loads" in row), default=0)
    heights = (
        [4]
        + [1.4] * any(row.get("max_vio") or "loads" in row for row in rows)
        + [1 + 0.6 * min(layers, 8)] * bool(layers)
    )
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    axes, *below = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    draw_curve(axes, rows, result)
    if below:
        below[0].plot([row["step"] for row in rows], [row["max_vio"] for row in rows], color="C3", lw=1)
        below[0].set(ylabel="MaxVio", ylim=(0, None))
        below[0].text(0.99, 0.95, "0 is perfect balance", ha="right", va="top", transform=below[0].transAxes)
    if layers:
        draw_loads(below[1], rows)
    figure.axes[len(heights) - 1].set_xlabel("step")
    figure.savefig(folder / "loss.png", dpi=120)
    print(f"the curve is in {folder / 'loss.png'}")


def draw_curve(axes, rows, result):
    """The training loss of `rows` on `axes`, and gzip, xz and the held-out result as lines and a point."""
    axes.plot([row["step"] for row in rows], [row["bits_per_byte"] for row in rows], lw=1, label="training")
    for name, style in (("gzip", ":"), ("xz", "--")):
        axes.axhline(result[name], color="gray", ls=style, lw=1, label=f"{name}, held-out: {result[name]:.2f}")
    end = rows[-1]["step"] if rows else 0, result["bits_per_byte"]
    axes.plot(*end, "o", color="C1", label="held-out", clip_on=False)
    axes.annotate(f"{end[1]:.2f}", end, xytext=(-6, 6), textcoords="offset points", ha="right")
    top = min(max((row["bits_per_byte"] for row in rows), default=8.0), 2 * result["gzip"])
    axes.set(ylabel="bits per byte", ylim=(0, max(top, 1.1 * result["bits_per_byte"])))
    axes.legend()


def draw_loads(axes, rows):
    """The loads of `rows` as a heat map over the steps, layer under layer; lines without loads stay blank."""
    known = next(row["loads"] for row in rows if "loads" in row)
    layers, experts, last = len(known), len(known[0]), rows[-1]["step"]
    blank = torch.full((layers * experts,), math.nan)
    lines = torch.stack([torch.tensor(row["loads"]).flatten() if "loads" in row else blank for row in rows])
    columns = torch.linspace(0, last, min(last + 1, 800))  # a long run has more lines than a picture has columns
    shown = lines[torch.searchsorted(torch.tensor([float(row["step"]) for row in rows]), columns)]
    extent = (0, last, layers * experts, 0)
    image = axes.imshow(
        shown.T.numpy(), aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0, vmax=2, extent=extent
    )
    axes.hlines([experts * layer for layer in range(1, layers)], 0, last, color="black", lw=1)
    axes.set_yticks([experts * (layer + 0.5) for layer in range(layers)], range(1, layers + 1))
    axes.set(ylabel=f"MoE layer, its {experts} experts")
    axes.figure.colorbar(image, ax=axes, label="load / mean load", extend="max")
