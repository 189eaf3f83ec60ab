"""This machine's roofline, measured: multiply-adds a second of a large matrix product, bytes a second of a copy."""

import time
from dataclasses import dataclass

import torch

from minids.bench import harness
from minids.numerics import has_fast_bf16


@dataclass(frozen=True)
class Machine:
    """A device and its measured peaks: `flops` per second (of `dtype` products), `bandwidth` in bytes per second."""

    name: str
    flops: float
    bandwidth: float
    dtype: torch.dtype

    @property
    def ridge(self):
        """FLOPs per byte above which the arithmetic, below which the memory sets the time."""
        return self.flops / self.bandwidth


def measure(dtype=None, size=1024, megabytes=128, rounds=9):
    """Measure this machine (its GPU where there is one): the fastest of `rounds` products [size,size], and of copies.

    A peak is what a machine can do, and its neighbours can only hide it: hence the fastest round, not the median.
    `dtype` None is bfloat16 where the hardware multiplies it, else float32.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype or (torch.bfloat16 if has_fast_bf16(torch.device(device)) else torch.float32)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = min(seconds_of(lambda: a @ b, rounds))
    source = torch.ones(megabytes * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    copying = min(seconds_of(lambda: target.copy_(source), rounds))
    threads = torch.get_num_threads()
    here = f"{harness.cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
    name = torch.cuda.get_device_name() if device == "cuda" else here
    return Machine(name, 2 * size**3 / seconds, 2 * source.numel() * 4 / copying, dtype)


def seconds_of(run, rounds):
    """The seconds of each of `rounds` calls, after one call for warm-up; a GPU is waited for."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]
