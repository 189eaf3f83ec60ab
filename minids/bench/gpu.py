"""What measuring on a GPU needs: its clock, its peaks, and what a kernel reaches of them.

The clock. Two events on the GPU's own timeline, around the run. Before them the second-level cache is emptied, by
reading a buffer larger than it (writing would leave lines whose write-back the next kernel pays for), and the GPU is
kept waiting while the processor queues the run: what it takes Python to launch kernels is then not in the figure, for
anybody. That holds for launches that take less than LEAD; a run that waits for the GPU itself pays for it.

The peaks. A copy (bytes read + bytes written) and a bf16 product of 8192³ on random numbers are measured in the same
run. `of_copy` and `of_matmul` are shares of those; `of_roofline` is the least time that the published peaks allow
(minids.accounting), over the time measured, and None for a GPU that the table does not have.

Bytes and FLOPs come from arithmetic: what the function must read, write and multiply at least.

Without a GPU, under --quick, Triton interprets the kernels on the processor: everything runs once and nothing is timed.
"""

import torch

from minids import accounting, triton_env
from minids.bench import harness
from minids.numerics import TOLERANCE, relative_error

LEAD = 2e-3  # seconds that the GPU waits while a run is queued
ROOM = 0.9  # of the free memory: what a side may take
PUBLISHED = {  # what a device's name must hold, and must not, to be the GPU of accounting's table
    "H100": ("PCIe", "NVL"),
    "H200": ("NVL",),
    "H800": ("PCIe",),
    "A100": ("PCIE",),
    "RTX 4090": ("Laptop", " D"),
    "RTX 4060 Laptop": (),
}


class Device:
    """The GPU of this run with its clock and measured peaks; without one the processor, and no clock."""

    def __init__(self, quick=False):
        self.cuda = triton_env.mode() == "gpu"
        self.where = torch.device("cuda" if self.cuda else "cpu")
        self.name = torch.cuda.get_device_name() if self.cuda else None
        self.published = published(self.name, torch.cuda.get_device_properties(0).total_memory) if self.cuda else None
        self.copy = self.matmul = self.clock = None
        if self.cuda:
            self.clock = Clock()
            size, numbers = (8192, 2**28) if not quick else (512, 2**20)
            self.copy, self.matmul = copy_peak(self.clock, numbers), matmul_peak(self.clock, size)

    def settings(self):
        """What a result says of the device: its measured peaks, the table's GPU, and how the clock works."""
        peaks = {"copy_bytes_per_s": self.copy, "bf16_flops_per_s": self.matmul, "published": self.published}
        return {**peaks, "lead_s": LEAD, "flushed_bytes": self.clock.flush.nbytes if self.clock else None}

    def free(self):
        """Bytes that may still be allocated, 0.9 of what is free; without a GPU no limit is known."""
        if not self.cuda:
            return float("inf")
        torch.cuda.empty_cache()
        return ROOM * torch.cuda.mem_get_info()[0]

    def figures(self, seconds, bytes, flops=0):
        """What a run of `seconds` reaches: GB/s, TFLOP/s, shares of the measured and of the published peaks."""
        found = {"bytes": bytes, "flops": flops, "GB/s": bytes / seconds / 1e9, "TFLOP/s": flops / seconds / 1e12}
        found |= {"of_copy": bytes / seconds / self.copy, "of_matmul": flops / seconds / self.matmul}
        least = accounting.roofline_seconds(flops, bytes, self.published) if self.published else None
        return {**found, "of_roofline": least and least / seconds}


class Clock:
    """clock(run): seconds of `run` on the GPU, its caches cold and its kernels queued before they start."""

    def __init__(self):
        cache = torch.cuda.get_device_properties(0).L2_cache_size
        self.flush = torch.ones(max(4 * cache, 2**28) // 4, device="cuda")
        self.cycles = 10**7
        torch.cuda._sleep(self.cycles)  # the first launch loads the kernel
        self.cycles = int(self.cycles * LEAD / elapsed(lambda: torch.cuda._sleep(self.cycles)))

    def __call__(self, run):
        self.flush.amax()
        torch.cuda._sleep(self.cycles)
        return elapsed(run)


def elapsed(run):
    """Seconds between two events around `run`."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def copy_peak(clock, numbers, rounds=20):
    """Bytes a second, read and written, of copying `numbers` floats: the median round."""
    source = torch.ones(numbers, device="cuda")
    target = torch.empty_like(source)
    seconds = [clock(lambda: target.copy_(source)) for _ in range(rounds)]
    return 2 * source.nbytes / sorted(seconds)[rounds // 2]


def matmul_peak(clock, size, rounds=20):
    """FLOP/s of a bf16 product [size,size] on random numbers: the median round."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = [clock(lambda: a @ b) for _ in range(rounds)]
    return 2 * size**3 / sorted(seconds)[rounds // 2]


def published(name, memory):
    """The GPU of accounting.GPUS that a device of this name and memory (bytes) is, or None."""
    for key, other in PUBLISHED.items():
        same_memory = abs(memory / accounting.GPUS[key].memory - 1) < 0.1
        if key in name and same_memory and not any(word in name for word in other):
            return key
    return None


def measure(device, case, contenders, rounds, **notes):
    """harness.measure in µs on the device's clock, with what each form reaches; without a clock each runs once."""
    if device.clock is None:
        forms = []
        for contender in contenders:
            contender.run(contender.prepare())
            untimed = {"median": None, "min": None, "max": None, "rounds": 0}
            forms.append({"side": contender.side, "form": contender.form, **untimed})
        best = {form["side"]: form for form in reversed(forms)}
        return {"case": case, "unit": "µs", **notes, "forms": forms, "best": best, "ratio": None}
    outcome = harness.measure(case, contenders, None, rounds, clock=device.clock, **notes)
    for contender, form in zip(contenders, outcome["forms"], strict=True):
        form |= device.figures(form["median"] / 1e6, **contender.work)
    return outcome


def tried(name, attempt, skipped, optional=False):
    """What `attempt()` gives, or None where it cannot run here; then `skipped` says of `name` why.

    What is wrong with minids passes, but for the memory that it may lack. So does the BenchError of a wrong result,
    unless the side is `optional`: somebody else's package.
    """
    try:
        return attempt()
    except torch.OutOfMemoryError:
        skipped[name] = "it ran out of the GPU's memory"
    except ImportError as error:
        if name.startswith("minids"):
            raise
        skipped[name] = f"it cannot be imported ({error})"
    except harness.BenchError as error:
        if not optional:
            raise
        skipped[name] = str(error)
    except Exception as error:
        if name.startswith("minids"):
            raise
        skipped[name] = f"it does not run here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return None


def agrees(name, got, want, dtype):
    """Raise BenchError where a result differs from the fp32 reference by more than `dtype` explains."""
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        error, allowed = relative_error(one.float(), other), TOLERANCE[dtype]
        if not error < allowed:
            raise harness.BenchError(
                f"{name}'s result {index} differs from the fp32 reference by {error:.1e}, allowed is {allowed:.0e}"
            )
