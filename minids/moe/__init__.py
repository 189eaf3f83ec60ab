"""DeepSeekMoE: routers, experts, balance; `reference` has the equations, `layer` the modules.

`kernels` and `dispatch_kernels` are in Triton; they load when they are first used.
"""

from minids.layers import late_modules
from minids.moe import reference
from minids.moe.layer import Experts, Gate, MoE

__all__ = ["Experts", "Gate", "MoE", "reference"]
__getattr__, __dir__ = late_modules(__name__, __all__, "kernels", "dispatch_kernels")
