"""How minids is measured: contenders alternate in one run, and what counts is the ratio of their medians.

A machine's speed drifts (heat, neighbours, memory), so two figures from two runs say little. Here every round times
each contender once, A B C, A B C, ..., after one round that is thrown away; the drift then meets all of them alike. A
contender's figure is the median over the rounds, its spread the smallest and the largest. Where a side comes in several
forms (a dtype, an implementation) each is timed, and its best one stands for it. Who computes another function (a
baseline) is shown, and left out of the ratio.

A result carries where it comes from: versions, processor, threads, date, commit and command. A side whose package is
absent is skipped, and named. What is special about a GPU stands in gpu.py.
"""

import gc
import hashlib
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch


class BenchError(ValueError):
    """A comparison that would say nothing; the message tells why."""


@dataclass
class Contender:
    """One form of one side: `prepare()` runs untimed, and what it gives goes to `run`, which is timed.

    `work` are the bytes and FLOPs of a run where they are known; `same` is False for one that computes something else.
    """

    side: str
    form: str
    run: Callable
    prepare: Callable = lambda: None
    work: dict = field(default_factory=dict)
    same: bool = True


def wall_clock(run, synchronize=lambda: None):
    """The seconds that `run()` takes."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def alternate(contenders, rounds, synchronize=lambda: None, clock=None):
    """Seconds of each round, a list per contender: after a round for warm-up, every round times each of them once.

    `clock(run)` gives the seconds of a run; without one they are the wall's, `synchronize()` waits before and after.
    """
    clock = clock or partial(wall_clock, synchronize=synchronize)
    seconds = [[] for _ in contenders]
    gc.collect()
    gc.freeze()  # what lives on is not searched again, so that collecting before each run is cheap
    for index in range(rounds + 1):
        for contender, times in zip(contenders, seconds, strict=True):
            state = contender.prepare()
            gc.collect()  # nobody pays for another's garbage
            elapsed = clock(partial(contender.run, state))
            if index:
                times.append(elapsed)
    gc.unfreeze()
    return seconds


def measure(case, contenders, amount, rounds, unit="tokens/s", clock=None, **notes):
    """Time `contenders` on one case whose run does `amount` units of work; where that is None the figures are in µs.

    Gives {"case", "unit", "forms", "best", "ratio", ...notes}: `forms` has the median, min and max of every contender,
    `best` the fastest form of each side, `ratio` how many times as fast minids' best is as the best of all others that
    compute the same (None if alone).
    """
    seconds = alternate(contenders, rounds, clock=clock)
    forms = []
    for contender, times in zip(contenders, seconds, strict=True):
        figures = {"median": statistics.median(times), "min": min(times), "max": max(times)}
        if amount is None:
            unit, figures = "µs", {key: value * 1e6 for key, value in figures.items()}
        else:
            figures = {"median": amount / figures["median"], "min": amount / max(times), "max": amount / min(times)}
        forms.append({"side": contender.side, "form": contender.form, **figures, "rounds": rounds})
    slowness = {id(form): statistics.median(times) for form, times in zip(forms, seconds, strict=True)}
    best = {}
    for form in sorted(forms, key=lambda form: slowness[id(form)]):
        best.setdefault(form["side"], form)
    alike = {contender.side for contender in contenders if contender.same}
    others = [slowness[id(form)] for side, form in best.items() if side != "minids" and side in alike]
    ratio = min(others) / slowness[id(best["minids"])] if others and "minids" in best else None
    return {"case": case, "unit": unit, **notes, "forms": forms, "best": best, "ratio": ratio}


def result(suite, cases, skipped, settings, quick=False, device=None):
    """The dict that a suite gives back and a record holds; `skipped` maps a side's name to the reason.

    `device` names what was measured, None is the processor: a suite has one record for each.
    """
    return {
        "suite": suite,
        "device": device or cpu_name(),
        "quick": quick,
        "complete": True,
        "settings": settings,
        "cases": cases,
        "skipped": skipped,
        "provenance": provenance(),
    }


def gather(measures, outcome, save=None, until=None):
    """`outcome` with the cases of `measures` (name to function), saved after each: what is measured is not lost.

    After `until` (of time.monotonic) no case is begun; those left out are named among the skipped. So is one that
    fails: the others are measured, and at the end the first one's error is raised.
    """
    outcome["complete"], whole, first = False, True, None
    for name, measure_it in measures.items():
        if until is not None and time.monotonic() > until:
            outcome["skipped"][name], whole = "the time given (--minutes) was over", False
            continue
        try:
            outcome["cases"].append(measure_it())
        except Exception as error:
            traceback.print_exc()
            outcome["skipped"][name] = f"it failed ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
            first, whole = first or error.with_traceback(None), False  # its frames hold the case's tensors
        outcome["provenance"] |= versions()  # of what the case has imported
        if save:
            save(outcome)
    outcome["complete"] = whole
    if first:
        raise first
    return outcome


def slug(device):
    """The name of a device as part of a file's name: "NVIDIA H200" is nvidia-h200."""
    return re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")


def provenance():
    """Where a figure comes from: device, versions, threads, date, commit."""
    facts = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    facts |= versions()
    if torch.cuda.is_available():
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "driver": driver()}
    return facts


def versions():
    """The versions of what has been imported besides torch."""
    loaded = {name: sys.modules.get(name) for name in ("transformers", "triton")}
    return {name: module.__version__ for name, module in loaded.items() if module}


def machine():
    """Eight digits that stand for this machine, so that its records do not take the place of another's."""
    parts = [str(uuid.getnode()), platform.node()]
    identity = Path("/etc/machine-id")
    if identity.exists():
        parts = [identity.read_text(encoding="utf-8").strip()]
    if torch.cuda.is_available():
        parts.append(str(getattr(torch.cuda.get_device_properties(0), "uuid", "")))
    return hashlib.sha256(" ".join([*parts, cpu_name()]).encode()).hexdigest()[:8]


def driver():
    """The version of NVIDIA's driver, None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


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
    """The commit of this source tree, with "+changes" where tracked files differ from it; None outside git.

    A copy of the tree without its history is told by the environment: MINIDS_COMMIT.
    """
    if os.environ.get("MINIDS_COMMIT"):
        return os.environ["MINIDS_COMMIT"]
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
