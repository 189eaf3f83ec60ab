"""DeepSeekMoE: routers, experts, balance; `reference` has the equations, `layer` the modules.

`kernels` and `dispatch_kernels` are in Triton; they load when they are first used.
"""

import importlib

from minids.moe import reference
from minids.moe.layer import Experts, Gate, MoE

__all__ = ["Experts", "Gate", "MoE", "reference"]


def __getattr__(name):
    if name not in ("kernels", "dispatch_kernels"):
        raise AttributeError(f"minids.moe has no {name!r}; it has {', '.join(__all__)}, kernels and dispatch_kernels")
    return importlib.import_module(f"minids.moe.{name}")


def __dir__():
    return [*__all__, "kernels", "dispatch_kernels"]
