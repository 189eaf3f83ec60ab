"""FP8 training: formats, scales and block-scaled products; `reference` has the equations."""

from minids.fp8 import reference

__all__ = ["reference"]
