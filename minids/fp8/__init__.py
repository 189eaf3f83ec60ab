"""FP8 training: `reference` has the equations, `layer` the Linear that trains in FP8, and converts models to it.

`kernels` and `quantize_kernels` are in Triton and load when they are first used; elsewhere `emulate` takes their place.
"""

import importlib

from minids.fp8 import emulate, reference
from minids.fp8.layer import Fp8Linear, convert, grouped_linear

__all__ = ["Fp8Linear", "convert", "emulate", "grouped_linear", "reference"]


def __getattr__(name):
    if name not in ("kernels", "quantize_kernels"):
        raise AttributeError(f"minids.fp8 has no {name!r}; it has {', '.join(__all__)}, kernels and quantize_kernels")
    return importlib.import_module(f"minids.fp8.{name}")


def __dir__():
    return [*__all__, "kernels", "quantize_kernels"]
