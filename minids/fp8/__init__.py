"""FP8 training: `reference` has the equations, `layer` the Linear that trains in FP8, and converts models to it.

`kernels` and `quantize_kernels` are in Triton and load when they are first used; elsewhere `emulate` takes their place.
"""

from minids.fp8 import emulate, reference
from minids.fp8.layer import Fp8Linear, convert, grouped_linear
from minids.layers import late_modules

__all__ = ["Fp8Linear", "convert", "emulate", "grouped_linear", "reference"]
__getattr__, __dir__ = late_modules(__name__, __all__, "kernels", "quantize_kernels")
