"""How minids is measured: contenders alternate in one run, and what counts is the ratio of their medians.

A machine's speed drifts (heat, neighbours, memory), so two figures from two runs say little. Here every round times
each contender once, A B C, A B C, ..., after one round that is thrown away; the drift then meets all of them alike. A
contender's figure is the median over the rounds, its spread the smallest and the largest. Where a side comes in several
forms (a dtype, an implementation) each is timed, and its best one stands for it.

A result carries where it comes from: versions, processor, threads, date, commit and command. A side whose package is
absent is skipped, and named.
"""

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch


class BenchError(ValueError):
    """A comparison that would say nothing; the message tells why."""


@dataclass
class Contender:
    """One form of one side: `prepare()` runs untimed, and what it gives goes to `run`, which is timed."""

    side: str
    form: str
    run: Callable
    prepare: Callable = lambda: None


def alternate(contenders, rounds, synchronize=lambda: None):
    """Seconds of each round, a list per contender: after a round for warm-up, every round times each of them once."""
    seconds = [[] for _ in contenders]
    gc.collect()
    gc.freeze()  # what lives on is not searched again, so that collecting before each run is cheap
    for index in range(rounds + 1):
        for contender, times in zip(contenders, seconds, strict=True):
            state = contender.prepare()
            gc.collect()  # nobody pays for another's garbage
            synchronize()
            start = time.perf_counter()
            contender.run(state)
            synchronize()
            elapsed = time.perf_counter() - start
            if index:
                times.append(elapsed)
    gc.unfreeze()
    return seconds


def measure(case, contenders, amount, rounds, unit="tokens/s", **notes):
    """Time `contenders` on one case whose run does `amount` units of work.

    Gives {"case", "unit", "forms", "best", "ratio", ...notes}: `forms` has the median, min and max rate of every
    contender, `best` the fastest form of each side, `ratio` minids' best over the best of all others (None if alone).
    """
    seconds = alternate(contenders, rounds)
    forms = []
    for contender, times in zip(contenders, seconds, strict=True):
        rates = {"median": amount / statistics.median(times), "min": amount / max(times), "max": amount / min(times)}
        forms.append({"side": contender.side, "form": contender.form, **rates, "rounds": rounds})
    best = {}
    for form in sorted(forms, key=lambda form: -form["median"]):
        best.setdefault(form["side"], form)
    others = [form["median"] for side, form in best.items() if side != "minids"]
    ratio = best["minids"]["median"] / max(others) if others and "minids" in best else None
    return {"case": case, "unit": unit, **notes, "forms": forms, "best": best, "ratio": ratio}


def result(suite, cases, skipped, settings, quick=False):
    """The dict that a suite gives back and a record holds; `skipped` maps a side's name to the reason."""
    return {
        "suite": suite,
        "quick": quick,
        "settings": settings,
        "cases": cases,
        "skipped": skipped,
        "provenance": provenance(),
    }


def provenance():
    """Where a figure comes from: device, versions, threads, date, commit."""
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if sys.modules.get("transformers"):
        facts["transformers"] = sys.modules["transformers"].__version__
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return facts


def cpu_name():
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def load_average():
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def commit():
    """The commit of this source tree, with "+changes" where tracked files differ from it; None outside git."""
    folder = Path(__file__).parents[2]
    try:
        options = {"cwd": folder, "capture_output": True, "text": True, "check": True, "timeout": 10}
        if Path(subprocess.run(["git", "rev-parse", "--show-toplevel"], **options).stdout.strip()) != folder:
            return None  # an installed copy inside somebody else's repository
        name = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return name + ("+changes" if changed else "")


def table(outcome):
    """A result as text: per case, the best form of each side with its spread, and minids' ratio to the best other."""
    rows = [("", "minids", "beside it", "ratio")]
    for case in outcome["cases"]:
        others = sorted((f for s, f in case["best"].items() if s != "minids"), key=lambda form: -form["median"])
        peer = f"{others[0]['side']} {cell(others[0])}" if others else "-"
        ratio = f"{case['ratio']:.2f}×" if case["ratio"] else "-"
        own = cell(case["best"]["minids"]) if "minids" in case["best"] else "-"
        rows.append((f"{case['case']}, {case['unit']}", own, peer, ratio))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{case['case']}: {case['note']}" for case in outcome["cases"] if case.get("note")]
    lines += [f"skipped {side}: {reason}" for side, reason in outcome["skipped"].items()]
    facts = outcome["provenance"]
    where = f"{facts['cpu']}, {facts['threads']} of {facts['cores']} threads, torch {facts['torch']}"
    lines.append(f"{where}, commit {facts['commit']}, {facts['date']}")
    return "\n".join(lines)


def cell(form):
    low, high = (f"{form[key]:,.0f}" for key in ("min", "max"))
    return f"{form['median']:,.0f} ({low}-{high}) {form['form']}"
