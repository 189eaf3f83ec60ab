"""The traffic meter: what a Triton kernel moves and multiplies, counted exactly while the interpreter runs it.

    with meter() as m:
        add_kernel[(4,)](x, y, out, 1000, BLOCK=256)
    m.loaded, m.stored  # 8000 and 4000 bytes

Counted: every load, store and atomic of a lane whose mask is true, through pointers, block pointers and tensor
descriptors; an atomic reads and writes its element once (a compare-and-swap also where the comparison fails). Of the
arithmetic, the multiply-adds of `tl.dot`, of whole tiles; a sum or an exponential is not counted. `distinct_loaded`
counts a byte once in each launch, so loaded / distinct_loaded says how often a kernel reads the same data again. A GPU
moves sectors of 32 bytes, and its caches serve some re-reads: the counts are what the program asks for.

Out of bounds is an access outside every tensor that was passed to the kernel, each from its first element to the last
that its strides reach: past the end of a slice too, though its storage goes on. Not noticed are an access in the gaps
between a slice's rows, and one that leaves its tensor and lands in another that was passed. A read out of bounds gives
NaN (0 for integers), a write is dropped, and the kernel goes on.
"""

import torch

from minids import accounting
from minids.lab import meter_hooks


class Meter:
    """Counts of all launches inside `with`: bytes loaded and stored, multiply-adds, programs, launches, out of bounds.

    Entering raises triton_env.TritonUnavailable where kernels do not run in the interpreter. Meters nest: an inner
    launch counts in all of them. A meter that is entered again goes on counting.
    """

    def __init__(self):
        self.loaded = self.stored = self.distinct_loaded = self.multiply_adds = self.programs = self.launches = 0
        self.out_of_bounds = []

    @property
    def bytes(self):
        """Bytes loaded and stored."""
        return self.loaded + self.stored

    @property
    def flops(self):
        """FLOPs of the dots, two per multiply-add."""
        return 2 * self.multiply_adds

    def roofline(self, gpu="H200", dtype=torch.bfloat16):
        """Seconds that these bytes and FLOPs take at least on `gpu`; raises ValueError for an unknown GPU or dtype."""
        return accounting.roofline_seconds(self.flops, self.bytes, gpu, dtype)

    def rooflines(self, dtype=torch.bfloat16):
        """{GPU: seconds at least} for every GPU of accounting.GPUS that multiplies `dtype`."""
        return {name: self.roofline(name, dtype) for name, gpu in accounting.GPUS.items() if dtype in gpu.flops}

    def __enter__(self):
        meter_hooks.enter(self)
        return self

    def __exit__(self, *error):
        meter_hooks.leave(self)

    def __str__(self):
        again = f" ({self.distinct_loaded:,} distinct)" if self.distinct_loaded != self.loaded else ""
        rows = [
            ("launches, programs", f"{self.launches:,}, {self.programs:,}"),
            ("bytes loaded", f"{self.loaded:,}{again}"),
            ("bytes stored", f"{self.stored:,}"),
            ("multiply-adds in tl.dot", f"{self.multiply_adds:,}"),
            ("out of bounds", f"at {len(self.out_of_bounds)} of the kernel's lines" if self.out_of_bounds else "none"),
        ]
        lines = [f"{name:<25}{value}" for name, value in rows]
        return "\n".join(lines + [str(found) for found in self.out_of_bounds])


def meter():
    """A new Meter, for `with meter() as m`."""
    return Meter()


def call(function, *args, **kwargs):
    """(result, Meter) of `function(*args, **kwargs)`, whatever it launches inside."""
    with meter() as m:
        result = function(*args, **kwargs)
    return result, m
