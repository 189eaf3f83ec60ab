"""What the lessons measure on this machine: its peaks, medians, races, and the records of others."""

import gc
import statistics
import time

import torch

from minids import bench
from minids.bench import tables
from minids.bench.peaks import Machine, measure, seconds_of

__all__ = ["Machine", "measure", "median_seconds", "race", "recorded", "seconds_of"]


def recorded(suite):
    """Print the recorded result of a benchmark suite with where it comes from, or that nothing is recorded yet."""
    found = bench.record(suite)
    how = f" (python -m minids.bench {suite})" if suite in bench.SUITES else ""
    print(tables.table(found) if found else f"on an H200: nothing is recorded yet{how}")


def median_seconds(run, rounds=5):
    """The median time of `rounds` calls, in seconds, after one call for warm-up; a GPU is waited for."""
    return statistics.median(seconds_of(run, rounds))


def race(runs, rounds=5):
    """The median seconds of each of `runs` {name: function}, in turns A B A B ...; a GPU is waited for.

    Machines drift, and in turns the drift meets all alike. A round for warm-up comes first, and is thrown away.
    """
    times = {name: [] for name in runs}
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()  # nobody pays for another's garbage
    try:
        for _ in range(rounds + 1):
            for name, run in runs.items():
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                began = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - began)
    finally:
        if was_on:
            gc.enable()
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}
